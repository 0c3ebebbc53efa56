// The forward pass of attention: softmax(q k^T) v without the scores ever being in memory (Vaswani et al., 2017; in
// tiles with a running maximum and sum as in Dao et al., 2022; a block for each tile of queries as in Dao, 2023).
//
// A block has 64 rows, 16 for each of its four warps. The query tile stays in shared memory; tiles of keys and of
// values come in turn through a ring of slots, copied asynchronously while earlier ones are multiplied. One barrier for
// each tile tells that the next one has arrived and that the slot of the previous one may be filled again.
//
// Few rows of queries with many keys would leave most of a device idle. There the tiles of keys that a block of rows
// sees are split among several blocks, each of which leaves its result in float32 and its logsumexp, and a second
// kernel weighs them together (Dao et al., Flash-Decoding, 2023), always in the same order.

#include "attention/cuda_forward.h"

#include "attention/cuda_masks.h"
#include "attention/cuda_repair.h"
#include "attention/cuda_splits.h"
#include "device/launch.h"
#include "device/products.h"
#include "device/reduce.h"

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
  // Blocks among which the keys of a block of rows are split.
  int splits;

  int64_t blocks(int64_t batch) const { return batch * heads * row_blocks * splits; }
};

// Of the largest score of a row: whether it is one, and not infinite either. The largest is never NaN.
DEVICE_INLINE bool is_number(float x) {
  return fabsf(x) < -kHidden;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, Shape<sizeof(T), kDim>::kBlocks)
    forward_kernel(const Inputs<T> a, const Rows<T> out, const Global<float> logsumexp, const Global<float> shift,
                   int out_width, const Grid grid, const Partials partials) {
  using Of = Shape<sizeof(T), kDim>;
  constexpr int kKeys = Of::kKeys, kTiles = kKeys / 8, kSlots = Of::kSlots;
  auto& shared = dynamic_shared<Storage<T, kDim>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 32 * 16;

  const int split = static_cast<int>(blockIdx.x) % grid.splits, block = static_cast<int>(blockIdx.x) / grid.splits;
  int row_block = block % grid.row_blocks;
  // The longest rows first: the last blocks to run are then short.
  if (a.causal) row_block = grid.row_blocks - 1 - row_block;
  const int head = block / grid.row_blocks % grid.heads, index = block / grid.row_blocks / grid.heads;
  const int kv_head = grid.shares ? head : head / a.group;
  const Sequence s(a, index);
  const int total = grid.shares ? a.group * s.queries : s.queries;
  if (row_block * kRows >= total) return;
  fill_rows(shared.rows, a, s, index, grid.shares ? head * a.group : head, row_block * kRows, total);
  __syncthreads();
  const Horizon horizon(shared.rows);
  // What rows of this warp see is from here to there, and nothing if it has no rows.
  const int lo = shared.rows.lo[warp_row + lane % 16], hi = shared.rows.hi[warp_row + lane % 16];
  const int warp_lo = __reduce_min_sync(kAll, lo < hi ? lo : kNoTile), warp_hi = __reduce_max_sync(kAll, hi);

  int first = 0, stop = kNoTile;
  if (grid.splits > 1) {
    const int lowest = horizon.template next<kKeys>(0), tiles = (horizon.end + kKeys - 1) / kKeys - lowest;
    if (lowest != kNoTile) {
      first = lowest + first_of_split(tiles, split, grid.splits);
      stop = lowest + first_of_split(tiles, split + 1, grid.splits);
    }
  }
  // The first tile from `from` on that is the block's to do.
  const auto next = [&](int from) {
    const int found = next_tile<kKeys>(horizon, a, index, from);
    return found < stop ? found : kNoTile;
  };
  int tile = next(first);
  const bool is_idle = tile == kNoTile;
  if (tile != kNoTile)
    copy_rows<T, kDim, kRows>(shared.query, a.head_dim, a.query_width, [&](int row) {
      const int query = shared.rows.query[row], of_head = shared.rows.head[row];
      return query < 0 ? Global<const T>(nullptr) : a.query.at(s.batch, of_head, s.first_query + query);
    });

  // Keys and values in turn.
  Ring<kSlots> ring;
  int ahead = tile;
  const auto copy = [&](int slot, bool is_value) {
    if (ahead == kNoTile) return;
    const int start = ahead * kKeys;
    const Rows<const T>& rows = is_value ? a.value : a.key;
    copy_tile<T, kDim, kKeys>(shared.ring[slot], rows.at(s.batch, kv_head, s.first_key + start), rows.row,
                              horizon.end - start, is_value ? a.value_dim : a.head_dim,
                              is_value ? a.value_width : a.key_width);
    if (is_value) ahead = next(ahead + 1);
  };
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) ring.fill(copy, i % 2 != 0);

  float sums[2] = {}, highest[2] = {-kInfinity, -kInfinity}, total_out[kDim / 8][4] = {};
  // Bits of the two rows of a thread: whether they see one of its keys.
  unsigned row_seen = 0;
  while (tile != kNoTile) {
    const int start = tile * kKeys, following = ahead;
    const Shared<T> keys = shared.ring[ring.next(copy, kSlots % 2 == 0)];
    float p[kTiles][4] = {};
    unsigned seen = 0;
    const bool sees = start < warp_hi && start + kKeys > warp_lo;
    if (sees) {
      multiply_transposed<T, kDim, kTiles>(p, shared.query, warp_row, keys, a.head_dim);
      if (a.scales) scale_scores(p, a.product, a.cap);
      seen = kAll;
      if (a.hides_within_rows() || !horizon.all_see(start, kKeys)) {
        uint64_t open = ~uint64_t{0};
        if (a.key_mask) open = open_keys<kKeys>(a, index, start, horizon.end);
        mask_scores(p, a, shared.rows, index, warp_row, start, open);
        row_seen |= seeing_rows(p);
        seen = seen_keys(p);
      } else {
        row_seen = 3;
      }
      float decay[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = highest[half];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) most = fmaxf(most, fmaxf(p[j][2 * half], p[j][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
        // 0 for a row that has seen nothing yet, exp2(-inf - 0) = 0 instead of exp2(-inf + inf), and for one with an
        // infinite score, whose sum then is infinity. NaN passes by the maximum, and by way of the sum becomes all of
        // the row.
        const float base = is_number(most) ? __fmul_rn(most, a.unit_base_2) : 0.0f;
        // Beside an infinite score nothing is left of what came before it; of the sums of some lanes that may be 0.
        const float less = is_number(most) ? base : kInfinity;
        decay[half] = most == highest[half] ? 1.0f : exp2_approximate(__fmul_rn(highest[half], a.unit_base_2) - less);
        highest[half] = most;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            p[j][i] = exp2_approximate(fmaf(p[j][i], a.unit_base_2, -base));
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
    }

    const Shared<T> values = shared.ring[ring.next(copy, kSlots % 2 != 0)];
    constexpr unsigned kEverything = (1u << 2 * kTiles) - 1;
    if (__all_sync(kAll, (seen & kEverything) == kEverything))
      multiply<T, kDim, kTiles, false>(total_out, p, values, a.value_dim, seen);
    else if (sees)
      multiply<T, kDim, kTiles, true>(total_out, p, values, a.value_dim, seen);
    // With two slots the copies have reached the next tile only now.
    tile = kSlots == 2 ? ahead : following;
  }

  row_seen |= __shfl_xor_sync(kAll, row_seen, 1);
  row_seen |= __shfl_xor_sync(kAll, row_seen, 2);
  // Where a row is kept among those of all heads, in the part of the split.
  const auto number_of = [&](int row) {
    return split * partials.rows + s.row_number(a, shared.rows.head[row], shared.rows.query[row]);
  };
  bool has_weights[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = sums[half];
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    // NaN is a result, and that of an infinite sum, and of a sum of 0 where something is seen, as all of it is -inf.
    const bool empty = !(row_seen >> half & 1);
    has_weights[half] = sum > 0.0f && sum < kInfinity;
    // Of several splits others may see more: what is 0 then counts as 0.
    const bool counts_for_nothing = grid.splits > 1 && sum == 0.0f;
    const float scale = sum == kInfinity ? sum - sum : counts_for_nothing ? 1.0f : a.keep_scale / sum;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      // Zero times what other rows see may be NaN.
      total_out[j][2 * half] = empty ? 0.0f : total_out[j][2 * half] * scale;
      total_out[j][2 * half + 1] = empty ? 0.0f : total_out[j][2 * half + 1] * scale;
    }
    const int row = warp_row + group + 8 * half;
    if (member != 0 || shared.rows.query[row] < 0) continue;
    // The sum is that of exponentials relative to the maximum as it was rounded in base 2.
    const float most = is_number(highest[half]) ? highest[half] : 0.0f, base = __fmul_rn(most, a.unit_base_2);
    const float of_sum = fmaf(fmaf(most, a.unit_base_2, -base), -kLn2, logf(sum));
    const float lse = fmaf(most, a.unit, of_sum);
    logsumexp[number_of(row)] = empty ? -kInfinity : lse;
    // NaN where the logsumexp is infinite.
    if (shift) shift[number_of(row)] = empty ? 0.0f : -kLog2E * (fmaf(most, a.unit, -lse) + of_sum);
  }
  // The logsumexp tells that there is nothing.
  if (grid.splits > 1 && is_idle) return;
  const SpoiledRows spoiled(total_out, has_weights);
  if (grid.splits > 1) {
    store_float_rows<kDim>(total_out, a.value_dim, [&](int row) {
      return shared.rows.query[warp_row + row] < 0 ? Global<float>(nullptr)
                                                   : partials.out + number_of(warp_row + row) * partials.stride;
    });
  } else {
    // No other warp reads these rows of the query tile.
    const Shared<T> stage = shared.query;
    store_rows<T, kDim>(stage + warp_row * kDim, total_out, a.value_dim, out_width, [&](int row) {
      const int query = shared.rows.query[warp_row + row], of_head = shared.rows.head[warp_row + row];
      return query < 0 ? Global<T>(nullptr) : out.at(s.batch, of_head, s.first_query + query);
    });
  }
  if (!spoiled.any() || !hides_from_some(a)) return;

  __syncwarp();
  int begin = 0, end = kNoTile;
  if (grid.splits > 1) {
    const int lowest = horizon.template next<kKeys>(0), tiles = (horizon.end + kKeys - 1) / kKeys - lowest;
    begin = (lowest + first_of_split(tiles, split, grid.splits)) * kKeys;
    end = (lowest + first_of_split(tiles, split + 1, grid.splits)) * kKeys;
  }
#pragma unroll 1
  for (int row = warp_row; row < warp_row + 16; ++row) {
    const int query = shared.rows.query[row], of_head = shared.rows.head[row];
    if (query < 0 || !spoiled.has(row - warp_row)) continue;
    const int first_key = max(int{shared.rows.lo[row]}, begin), last_key = min(int{shared.rows.hi[row]}, end);
    const float of_row = logsumexp[number_of(row)];
    RowSum<kDim> sum;
#pragma unroll 1
    for (int key = first_key; key < last_key && !sum.is_nan(a.value_dim); ++key) {
      const PairScore pair = score_of(a, s, index, of_head, query, key);
      if (pair.score == kHidden) continue;
      const float weight = weight_of(pair.score, a.unit, of_row, 0.0f);
      sum.add(keeps(a, index, of_head, query, key) ? weight : 0.0f, a.value.at(s.batch, kv_head, s.first_key + key),
              a.value_dim);
    }
    if (grid.splits > 1)
      sum.put(partials.out + number_of(row) * partials.stride, a.value_dim, a.keep_scale);
    else
      sum.put(out.at(s.batch, of_head, s.first_query + query), a.value_dim, a.keep_scale);
  }
}

// One warp per row: the mean of what its splits left, weighed by their sums of exponentials. A lane holds that of one
// split.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_splits_kernel(const Partials partials, const ReadOnly<float> partial_logsumexp,
                        const ReadOnly<float> partial_shift, int splits, const Rows<T> out,
                        const Global<float> logsumexp, const Global<float> shift, int heads, int queries, int dim,
                        int out_width) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= partials.rows) return;
  const int batch = static_cast<int>(at / queries / heads), head = static_cast<int>(at / queries % heads);
  const int query = static_cast<int>(at % queries);

  float mine = -kInfinity, my_shift = 0.0f;
  if (lane < splits) {
    mine = partial_logsumexp[lane * partials.rows + at];
    my_shift = partial_shift[lane * partials.rows + at];
  }
  float highest = mine;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(kAll, highest, step));
  const float base = is_number(highest) ? highest : 0.0f;
  const unsigned seen = __ballot_sync(kAll, mine != -kInfinity || my_shift != 0.0f);
  // Of a NaN the sum makes a NaN, which the maximum passed over; of infinity, infinity, and of -inf 0, whose shifts are
  // NaN.
  float weight = exp2f(fmaf(mine - base, kLog2E, fabsf(mine) == kInfinity ? 0.0f : -my_shift));
  const float sum = warp_sum(weight);
  const bool empty = seen == 0;
  weight = empty ? 0.0f : weight / sum;
  if (lane == 0) {
    const float of_sum = logf(sum), lse = base + of_sum;
    logsumexp[at] = empty ? -kInfinity : lse;
    if (shift) shift[at] = empty ? 0.0f : -kLog2E * ((base - lse) + of_sum);
  }

  const Global<T> to = out.at(batch, head, query);
  for (int first = 0; first < dim; first += 32 * kVector) {
    const int column = first + lane * kVector;
    float total[kVector] = {};
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const float w = __shfl_sync(kAll, weight, s);
      // What saw nothing has left nothing.
      if (!(seen >> s & 1) || column >= dim) continue;
      const auto x = load<kVector>(partials.out + (s * partials.rows + at) * partials.stride + column);
#pragma unroll
      for (int k = 0; k < kVector; ++k) total[k] = fmaf(w, x[k], total[k]);
    }
    if (column >= dim) continue;
    Vector<T, kVector> result;
#pragma unroll
    for (int k = 0; k < kVector; ++k) result[k] = from_float<T>(total[k]);
    if (out_width == 16 && column + kVector <= dim) {
      store(to + column, result);
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        if (column + k < dim) to[column + k] = result[k];
    }
  }
}

Grid grid_of(const AttentionForward& p) {
  // Heads that share a key head share a block where one head alone would not fill it.
  const int64_t group = p.heads() / p.kv_heads();
  const bool shares = group > 1 && p.longest_queries < kRows;
  const int64_t rows = shares ? p.longest_queries * group : p.longest_queries;
  Grid grid{static_cast<int>((rows + kRows - 1) / kRows), static_cast<int>(shares ? p.kv_heads() : p.heads()), shares,
            1};
  grid.splits = split_count(grid.blocks(p.batch), std::min<int64_t>(rows, kRows), p.longest_keys);
  return grid;
}

// Of packed sequences all tokens are one batch entry.
int64_t rows_of_all(const AttentionForward& p) {
  return (p.cu_seqlens_q ? 1 : p.batch) * p.heads() * p.queries();
}

}  // namespace

int64_t attention_forward_partials(const AttentionForward& p) {
  const int splits = grid_of(p).splits;
  return splits == 1 ? 0 : splits * rows_of_all(p) * (partial_stride(p.value_dim()) + 2);
}

void attention_forward(const AttentionForward& p, Stream stream) {
  const Grid grid = grid_of(p);
  const int64_t blocks = grid.blocks(p.batch);
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("velm: attention_forward: more than 2^31 - 1 blocks of queries");
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    const auto out = rows_of<T>(p.out);
    const auto logsumexp = global<float>(p.logsumexp), shift = global<float>(p.shift);
    const int out_width = copy_width(p.out);
    Partials partials{};
    auto split_logsumexp = logsumexp, split_shift = shift;
    if (grid.splits > 1) {
      partials = {global<float>(p.partials), rows_of_all(p), partial_stride(p.value_dim())};
      split_logsumexp = partials.out + grid.splits * partials.rows * partials.stride;
      split_shift = split_logsumexp + grid.splits * partials.rows;
    }
    with_dim(std::max(p.head_dim(), p.value_dim()), [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      launch<forward_kernel<T, kDim>>(static_cast<unsigned>(blocks), kThreads, sizeof(Storage<T, kDim>), stream,
                                      inputs_of<T>(p), out, split_logsumexp, split_shift, out_width, grid, partials);
    });
    if (grid.splits > 1)
      launch<merge_splits_kernel<T>>(static_cast<unsigned>((partials.rows + kWarps - 1) / kWarps), kThreads, 0, stream,
                                     partials, ReadOnly<float>(split_logsumexp), ReadOnly<float>(split_shift),
                                     grid.splits, out, logsumexp, shift, static_cast<int>(p.heads()),
                                     static_cast<int>(p.queries()), static_cast<int>(p.value_dim()), out_width);
  });
}

}  // namespace velm::cuda
