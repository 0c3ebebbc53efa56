// The forward pass of attention: softmax(q k^T) v without the scores ever being in memory (Vaswani et al., 2017; in
// tiles with a running maximum and sum as in Dao et al., 2022; a block for each tile of queries as in Dao, 2023).
//
// A block has 64 rows, 16 for each of its four warps. The query tile stays in shared memory; tiles of keys and of
// values come in turn through a ring of slots, copied asynchronously while earlier ones are multiplied. One barrier for
// each tile tells that the next one has arrived and that the slot of the previous one may be filled again.

#include "attention/forward_cuda.h"

#include "attention/cuda_masks.h"
#include "attention/cuda_products.h"
#include "device/launch.h"

namespace velm::cuda {
namespace {

// Keys of a tile, slots of the ring, and the blocks that fit on a multiprocessor by registers. The largest block of
// shared memory that all devices have is 99 KiB.
template <int kElement, int kDim>
struct Shape;
template <>
struct Shape<2, 64> {
  static constexpr int kKeys = 64, kSlots = 4, kBlocks = 3;
};
template <>
struct Shape<2, 128> {
  static constexpr int kKeys = 64, kSlots = 2, kBlocks = 2;
};
template <>
struct Shape<2, 256> {
  static constexpr int kKeys = 32, kSlots = 3, kBlocks = 2;
};
template <>
struct Shape<4, 64> {
  static constexpr int kKeys = 32, kSlots = 4, kBlocks = 2;
};
template <>
struct Shape<4, 128> {
  static constexpr int kKeys = 32, kSlots = 2, kBlocks = 2;
};
template <>
struct Shape<4, 256> {
  static constexpr int kKeys = 16, kSlots = 2, kBlocks = 2;
};

template <class T, int kDim>
struct Storage {
  using Of = Shape<sizeof(T), kDim>;
  SharedArray<T, kRows * kDim> query;
  SharedArray<T, Of::kSlots, Of::kKeys * kDim> ring;
  RowTable rows;
};

struct Grid {
  int row_blocks, heads;
  // Rows are those of all query heads of a key head.
  bool shares;
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, Shape<sizeof(T), kDim>::kBlocks)
    forward_kernel(const Inputs<T> a, const Rows<T> out, const Global<float> logsumexp, int out_width,
                   const Grid grid) {
  using Of = Shape<sizeof(T), kDim>;
  constexpr int kKeys = Of::kKeys, kTiles = kKeys / 8, kSlots = Of::kSlots;
  auto& shared = dynamic_shared<Storage<T, kDim>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 32 * 16;

  int row_block = static_cast<int>(blockIdx.x) % grid.row_blocks;
  // The longest rows first: the last blocks to run are then short.
  if (a.causal) row_block = grid.row_blocks - 1 - row_block;
  const int head = static_cast<int>(blockIdx.x) / grid.row_blocks % grid.heads;
  const int index = static_cast<int>(blockIdx.x) / grid.row_blocks / grid.heads;
  const int kv_head = grid.shares ? head : head / a.group;
  const Sequence s(a, index);
  const int total = grid.shares ? a.group * s.queries : s.queries;
  if (row_block * kRows >= total) return;
  fill_rows(shared.rows, a, s, index, grid.shares ? head * a.group : head, row_block * kRows, total);
  __syncthreads();
  const Horizon horizon(shared.rows);

  int tile = horizon.template next<kKeys>(0);
  if (tile != kNoTile)
    copy_rows<T, kDim, kRows>(shared.query, a.head_dim, a.query_width, [&](int row) {
      const int query = shared.rows.query[row], of_head = shared.rows.head[row];
      return query < 0 ? Global<const T>(nullptr) : a.query.at(s.batch, of_head, s.first_query + query);
    });

  // The ring is filled kSlots - 1 tiles ahead, with keys and values in turn.
  int ahead = tile, ahead_slot = 0, slot = 0;
  const auto fill = [&](bool with_value) {
    if (ahead != kNoTile) {
      const int start = ahead * kKeys;
      const Rows<const T>& rows = with_value ? a.value : a.key;
      copy_tile<T, kDim, kKeys>(shared.ring[ahead_slot], rows.at(s.batch, kv_head, s.first_key + start), rows.row,
                                horizon.end - start, with_value ? a.value_dim : a.head_dim,
                                with_value ? a.value_width : a.key_width);
      if (with_value) ahead = horizon.template next<kKeys>(ahead + 1);
    }
    // An empty group where there is nothing left, so that the waits count the same.
    cp_async_commit();
    ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
  };
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) fill(i % 2);

  float sums[2] = {}, highest[2] = {-kInfinity, -kInfinity}, total_out[kDim / 8][4] = {};
  while (tile != kNoTile) {
    const int start = tile * kKeys;
    cp_async_wait<kSlots - 2>();
    __syncthreads();
    fill(kSlots % 2 == 0);
    float p[kTiles][4] = {};
    multiply_transposed<T, kDim, kTiles>(p, shared.query, warp_row, shared.ring[slot], a.head_dim);
    slot = slot + 1 == kSlots ? 0 : slot + 1;

    scale_scores(p, a.product, a.cap);
    unsigned seen = kAll;
    if (a.hides_within_rows() || !horizon.all_see(start, kKeys)) {
      uint64_t open = ~uint64_t{0};
      if (a.key_mask) open = open_keys<kKeys>(a, index, start, horizon.end);
      mask_scores(p, a, shared.rows, index, warp_row, start, open);
      seen = seen_keys(p);
    }
    float decay[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = highest[half];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) most = fmaxf(most, fmaxf(p[j][2 * half], p[j][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
      // A row that has seen nothing yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf).
      const float shift = most == -kInfinity ? 0.0f : most;
      decay[half] = exp2_approximate(highest[half] - shift);
      highest[half] = most;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          p[j][i] = exp2_approximate(p[j][i] - shift);
          sum += p[j][i];
        }
      sums[half] = sums[half] * decay[half] + sum;
    }
    // Rare after the first tiles.
    if (__any_sync(kAll, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) total_out[j][i] *= decay[i / 2];
    }
    if (a.seed) {
      unsigned kept[2];
      kept_weights<kTiles>(kept, a, shared.rows, index, warp_row, start);
      drop_weights(p, kept);
    }

    cp_async_wait<kSlots - 2>();
    __syncthreads();
    fill(kSlots % 2 != 0);
    constexpr unsigned kEverything = (1u << 2 * kTiles) - 1;
    if (__all_sync(kAll, (seen & kEverything) == kEverything))
      multiply<T, kDim, kTiles, false>(total_out, p, shared.ring[slot], a.value_dim, seen);
    else
      multiply<T, kDim, kTiles, true>(total_out, p, shared.ring[slot], a.value_dim, seen);
    slot = slot + 1 == kSlots ? 0 : slot + 1;
    tile = horizon.template next<kKeys>(tile + 1);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = sums[half];
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    // Infinite and NaN sums are results; only a sum of exactly nothing is an empty row.
    const bool empty = sum == 0.0f;
    const float scale = empty ? 0.0f : a.keep_scale / sum;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      total_out[j][2 * half] *= scale;
      total_out[j][2 * half + 1] *= scale;
    }
    const int row = warp_row + group + 8 * half, query = shared.rows.query[row], of_head = shared.rows.head[row];
    if (member == 0 && query >= 0) {
      const int64_t at = a.cu_seqlens_q ? of_head * int64_t{a.queries} + s.first_query + query
                                        : (index * int64_t{a.heads} + of_head) * a.queries + query;
      logsumexp[at] = empty ? -kInfinity : (highest[half] + log2f(sum)) * kLn2;
    }
  }
  // No other warp reads these rows of the query tile.
  const Shared<T> stage = shared.query;
  store_rows<T, kDim>(stage + warp_row * kDim, total_out, a.value_dim, out_width, [&](int row) {
    const int query = shared.rows.query[warp_row + row], of_head = shared.rows.head[warp_row + row];
    return query < 0 ? Global<T>(nullptr) : out.at(s.batch, of_head, s.first_query + query);
  });
}

}  // namespace

void attention_forward(const AttentionForward& p, Stream stream) {
  // Heads that share a key head share a block where one head alone would not fill it.
  const int64_t group = p.heads / p.kv_heads;
  const bool shares = group > 1 && p.longest_queries < kRows;
  const int64_t rows = shares ? p.longest_queries * group : p.longest_queries;
  const Grid grid{static_cast<int>((rows + kRows - 1) / kRows), static_cast<int>(shares ? p.kv_heads : p.heads),
                  shares};
  const int64_t blocks = p.batch * grid.heads * grid.row_blocks;
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("velm: attention_forward: more than 2^31 - 1 blocks of queries");
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    with_dim(std::max(p.head_dim, p.value_dim), [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      launch<forward_kernel<T, kDim>>(static_cast<unsigned>(blocks), kThreads, sizeof(Storage<T, kDim>), stream,
                                      inputs_of<T>(p), rows_of<T>(p.out), global<float>(p.logsumexp),
                                      copy_width(p.out, p.dtype), grid);
    });
  });
}

}  // namespace velm::cuda
