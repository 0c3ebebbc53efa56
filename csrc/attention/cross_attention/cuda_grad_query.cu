// The gradient of query, and of a bias that broadcasts nowhere: a block for each tile of queries, over the tiles of
// keys. The gradient of a score is p * (dp - delta), see cuda_backward.h; values come before their keys, so that of dp
// and the scores the one can be finished before the other is begun.

#include "attention/cuda_backward.h"
#include "attention/cuda_masks.h"
#include "attention/cuda_repair.h"
#include "device/launch.h"
#include "device/products.h"

namespace velm::cuda {
namespace {

// As in forward.cu. Of 256 floats only half as many rows fit in shared memory, and two warps to a block.
template <int kElement, int kDim>
struct Shape {
  static constexpr bool kFew = kElement == 4 && kDim == 256;
  static constexpr int kBlockRows = kFew ? 32 : kRows, kBlockThreads = 2 * kBlockRows;
  static constexpr int kKeys = kFew ? 16 : kElement == 4 || kDim == 256 ? 32 : 64, kSlots = 2;
};

template <class T, int kDim>
struct Storage {
  using Of = Shape<sizeof(T), kDim>;
  SharedArray<T, Of::kBlockRows * kDim> query, grad_out;
  SharedArray<T, Of::kSlots, Of::kKeys * kDim> ring;
  RowsOfBlock<Of::kBlockRows> rows;
};

template <class T>
struct Gradients {
  Rows<const T> grad_out;
  int grad_out_width;
  RowStatistics of_rows;
  // One of the two.
  Rows<T> query;
  Rows<float> float_query;
  int query_width;
  float scale;
  bool wants_query;
  Global<T> bias;
  Global<float> float_bias;
  int64_t bias_stride[4];
};

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<sizeof(T), kDim>::kBlockThreads, 2)
    grad_query_kernel(const Inputs<T> a, const Gradients<T> g, int row_blocks) {
  using Of = Shape<sizeof(T), kDim>;
  constexpr int kKeys = Of::kKeys, kTiles = kKeys / 8, kSlots = Of::kSlots;
  constexpr int kBlockRows = Of::kBlockRows, kBlockThreads = Of::kBlockThreads;
  auto& shared = dynamic_shared<Storage<T, kDim>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 32 * 16;

  int row_block = static_cast<int>(blockIdx.x) % row_blocks;
  if (a.causal) row_block = row_blocks - 1 - row_block;
  const int head = static_cast<int>(blockIdx.x) / row_blocks % a.heads, kv_head = head / a.group;
  const int index = static_cast<int>(blockIdx.x) / row_blocks / a.heads;
  const Sequence s(a, index);
  const int first_row = row_block * kBlockRows;
  if (first_row >= s.queries) return;
  fill_rows(shared.rows, a, s, index, head, first_row, s.queries);
  __syncthreads();
  const HorizonOf<kBlockRows> horizon(shared.rows);

  int tile = next_tile<kKeys>(horizon, a, index, 0);
  if (tile != kNoTile) {
    const int rows = s.queries - first_row;
    copy_tile<T, kDim, kBlockRows, kBlockThreads>(shared.query, a.query.at(s.batch, head, s.first_query + first_row),
                                                  a.query.row, rows, a.head_dim, a.query_width);
    copy_tile<T, kDim, kBlockRows, kBlockThreads>(shared.grad_out,
                                                  g.grad_out.at(s.batch, head, s.first_query + first_row),
                                                  g.grad_out.row, rows, a.value_dim, g.grad_out_width);
  }
  // Values and keys in turn.
  Ring<kSlots> ring;
  int ahead = tile;
  const auto copy = [&](int slot, bool is_key) {
    if (ahead == kNoTile) return;
    const int start = ahead * kKeys;
    const Rows<const T>& rows = is_key ? a.key : a.value;
    copy_tile<T, kDim, kKeys, kBlockThreads>(shared.ring[slot], rows.at(s.batch, kv_head, s.first_key + start),
                                             rows.row, horizon.end - start, is_key ? a.head_dim : a.value_dim,
                                             is_key ? a.key_width : a.value_width);
    if (is_key) ahead = next_tile<kKeys>(horizon, a, index, ahead + 1);
  };
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) ring.fill(copy, i % 2 != 0);
  float logsumexp[2], shift[2], delta[2];
  read_rows(logsumexp, shift, delta, a, s, shared.rows, warp_row, g.of_rows);

  float grad[kDim / 8][4] = {};
  while (tile != kNoTile) {
    const int start = tile * kKeys, following = ahead;
    // dp - delta
    float e[kTiles][4] = {};
    const Shared<T> values = shared.ring[ring.next(copy, kSlots % 2 == 0)];
    multiply_transposed<T, kDim, kTiles>(e, shared.grad_out, warp_row, values, a.value_dim);
    if (a.seed) {
      unsigned kept[2];
      kept_weights<kTiles>(kept, a, shared.rows, index, warp_row, start);
      drop_weights(e, kept);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) e[j][i] = fmaf(e[j][i], a.keep_scale, -delta[i / 2]);

    const Shared<T> keys = shared.ring[ring.next(copy, kSlots % 2 != 0)];
    float p[kTiles][4] = {};
    multiply_transposed<T, kDim, kTiles>(p, shared.query, warp_row, keys, a.head_dim);
    if (a.scales) scale_scores(p, a.product, 0.0f);
    if (a.cap != 0.0f) cap_scores(p, a.cap, e, g.wants_query);
    unsigned seen = kAll;
    if (a.hides_within_rows() || !horizon.all_see(start, kKeys)) {
      uint64_t open = ~uint64_t{0};
      if (a.key_mask) open = open_keys<kKeys>(a, index, start, horizon.end);
      mask_scores(p, a, shared.rows, index, warp_row, start, open);
      seen = seen_keys(p);
    }
    // What is hidden may be NaN in e.
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        p[j][i] = p[j][i] == kHidden ? 0.0f : weight_of(p[j][i], a.unit, logsumexp[i / 2], shift[i / 2]) * e[j][i];
    const auto store_bias = [&](const auto& bias, auto convert) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = shared.rows.query[warp_row + group + 8 * half], key = start + 2 * member;
        const auto to = bias + (s.batch * g.bias_stride[0] + head * g.bias_stride[1] + query * g.bias_stride[2] + key);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            store_if(query >= 0 && key + 8 * j + i < s.keys, to + (8 * j + i), convert(p[j][2 * half + i]));
      }
    };
    if (g.bias) store_bias(g.bias, from_float<T>);
    if (g.float_bias) store_bias(g.float_bias, from_float<float>);
    if (g.wants_query) {
      constexpr unsigned kEverything = (1u << 2 * kTiles) - 1;
      if (__all_sync(kAll, (seen & kEverything) == kEverything))
        multiply<T, kDim, kTiles, false>(grad, p, keys, a.head_dim, seen);
      else
        multiply<T, kDim, kTiles, true>(grad, p, keys, a.head_dim, seen);
    }
    tile = kSlots == 2 ? ahead : following;
  }
  if (!g.wants_query) return;
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Rows that see nothing: zero times what other rows see may be NaN.
      const bool is_empty = logsumexp[i / 2] == -kInfinity && shift[i / 2] == 0.0f;
      grad[j][i] = is_empty ? 0.0f : grad[j][i] * g.scale;
    }
  // Of a row with another delta, all gradients are NaN.
  const bool has_weights[2] = {fabsf(logsumexp[0]) < kInfinity && fabsf(delta[0]) < kInfinity,
                               fabsf(logsumexp[1]) < kInfinity && fabsf(delta[1]) < kInfinity};
  const SpoiledRows spoiled(grad, has_weights);
  if (g.float_query.data) {
    store_float_rows<kDim>(grad, a.head_dim, [&](int row) {
      const int query = shared.rows.query[warp_row + row];
      return query < 0 ? Global<float>(nullptr) : g.float_query.at(s.batch, head, s.first_query + query);
    });
  } else {
    const Shared<T> stage = shared.query;
    store_rows<T, kDim>(stage + warp_row * kDim, grad, a.head_dim, g.query_width, [&](int row) {
      const int query = shared.rows.query[warp_row + row];
      return query < 0 ? Global<T>(nullptr) : g.query.at(s.batch, head, s.first_query + query);
    });
  }
  if (!spoiled.any() || !hides_from_some(a)) return;

  __syncwarp();
#pragma unroll 1
  for (int row = warp_row; row < warp_row + 16; ++row) {
    const int query = shared.rows.query[row];
    if (query < 0 || !spoiled.has(row - warp_row)) continue;
    RowSum<kDim> sum;
#pragma unroll 1
    for (int key = shared.rows.lo[row]; key < shared.rows.hi[row] && !sum.is_nan(a.head_dim); ++key) {
      const PairScore pair = score_of(a, s, index, head, query, key);
      if (pair.score != kHidden)
        sum.add(grad_of_score(a, s, index, head, query, key, pair, g.grad_out, g.of_rows),
                a.key.at(s.batch, kv_head, s.first_key + key), a.head_dim);
    }
    if (g.float_query.data)
      sum.put(g.float_query.at(s.batch, head, s.first_query + query), a.head_dim, g.scale);
    else
      sum.put(g.query.at(s.batch, head, s.first_query + query), a.head_dim, g.scale);
  }
}

}  // namespace

void attention_grad_query(const AttentionBackward& p, Stream stream) {
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto dim, bool wants_query, bool wants_bias) {
      constexpr int kDim = decltype(dim)::value;
      using Of = Shape<sizeof(T), kDim>;
      const int64_t row_blocks = (p.longest_queries + Of::kBlockRows - 1) / Of::kBlockRows;
      const int64_t blocks = p.batch * p.heads() * row_blocks;
      if (blocks == 0) return;
      Gradients<T> g{};
      g.grad_out = rows_of<const T>(p.grad_out);
      g.grad_out_width = copy_width(p.grad_out);
      g.of_rows = statistics_of(p);
      if (wants_query) {
        g.wants_query = true;
        g.scale = static_cast<float>(p.scale);
        if (p.grad_query.dtype == p.dtype())
          g.query = rows_of<T>(p.grad_query);
        else
          g.float_query = rows_of<float>(p.grad_query);
        g.query_width = copy_width(p.grad_query);
      }
      if (wants_bias) {
        if (p.grad_bias.dtype == p.dtype())
          g.bias = global<T>(p.grad_bias);
        else
          g.float_bias = global<float>(p.grad_bias);
        std::copy(p.grad_bias.stride, p.grad_bias.stride + 4, g.bias_stride);
      }
      launch<grad_query_kernel<T, kDim>>(static_cast<unsigned>(blocks), Of::kBlockThreads, sizeof(Storage<T, kDim>),
                                         stream, inputs_of<T>(p), g, static_cast<int>(row_blocks));
    };
    with_dim(std::max(p.head_dim(), p.value_dim()), [&](auto dim) {
      const bool wants_query = bool(p.grad_query), wants_bias = bool(p.grad_bias);
      // The softcap stands between the two gradients.
      if (wants_query && wants_bias && p.softcap > 0) {
        run(dim, false, true);
        run(dim, true, false);
      } else {
        run(dim, wants_query, wants_bias);
      }
    });
  });
}

}  // namespace velm::cuda
