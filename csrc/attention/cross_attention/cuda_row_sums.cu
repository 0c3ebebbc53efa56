// Delta of each row, which the gradients of its scores need, and what its logsumexp is short of: see cuda_backward.h.
// Where the sums are made of products, a block has rows of one head, or of all heads that share a key head where one
// alone would not fill it, and goes over the tiles of keys as grad_query.cu does, values before their keys.

#include "attention/cuda_backward.h"
#include "attention/cuda_masks.h"
#include "device/launch.h"
#include "device/products.h"
#include "device/reduce.h"

namespace velm::cuda {
namespace {

// As in grad_query.cu.
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
struct Sums {
  Rows<const T> grad_out;
  int grad_out_width;
  Rows<const float> grad_logsumexp;
  ReadOnly<float> logsumexp;
  Global<float> delta, shift;
  int row_blocks, heads;
  // Rows are those of all query heads of a key head.
  bool shares;
  // Of rows with a large logsumexp, which has lost the logarithm of the sum; blocks without one do nothing.
  bool only_far;
};

// The last place of a logsumexp of this size is 2^-11. A bias makes such rows, as do masks of large negative numbers.
constexpr float kFarRow = 4096.0f;

DEVICE_INLINE bool is_far(float logsumexp) {
  return fabsf(logsumexp) >= kFarRow && fabsf(logsumexp) < kInfinity;
}

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<sizeof(T), kDim>::kBlockThreads, 2)
    row_sums_kernel(const Inputs<T> a, const Sums<T> g) {
  using Of = Shape<sizeof(T), kDim>;
  constexpr int kKeys = Of::kKeys, kTiles = kKeys / 8, kSlots = Of::kSlots;
  constexpr int kBlockRows = Of::kBlockRows, kBlockThreads = Of::kBlockThreads;
  auto& shared = dynamic_shared<Storage<T, kDim>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 32 * 16;

  const int row_block = static_cast<int>(blockIdx.x) % g.row_blocks;
  const int head = static_cast<int>(blockIdx.x) / g.row_blocks % g.heads, kv_head = g.shares ? head : head / a.group;
  const int index = static_cast<int>(blockIdx.x) / g.row_blocks / g.heads;
  const Sequence s(a, index);
  const int total = g.shares ? a.group * s.queries : s.queries;
  if (row_block * kBlockRows >= total) return;
  fill_rows(shared.rows, a, s, index, g.shares ? head * a.group : head, row_block * kBlockRows, total);
  __syncthreads();
  float logsumexp[2], shift[2], delta[2];
  read_rows(logsumexp, shift, delta, a, s, shared.rows, warp_row, RowStatistics{g.logsumexp, nullptr, nullptr});
  if (g.only_far && !__syncthreads_or(is_far(logsumexp[0]) || is_far(logsumexp[1]))) return;
  const HorizonOf<kBlockRows> horizon(shared.rows);

  int tile = next_tile<kKeys>(horizon, a, index, 0);
  if (tile != kNoTile) {
    const auto copy_block = [&](const Shared<T>& to, const Rows<const T>& rows, int dim, int width) {
      copy_rows<T, kDim, kBlockRows, kBlockThreads>(to, dim, width, [&](int row) {
        const int query = shared.rows.query[row], of_head = shared.rows.head[row];
        return query < 0 ? Global<const T>(nullptr) : rows.at(s.batch, of_head, s.first_query + query);
      });
    };
    copy_block(shared.query, a.query, a.head_dim, a.query_width);
    copy_block(shared.grad_out, g.grad_out, a.value_dim, g.grad_out_width);
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
  ring.fill(copy, false);

  float weights[2] = {}, products[2] = {};
  while (tile != kNoTile) {
    const int start = tile * kKeys;
    // dp
    float e[kTiles][4] = {};
    const Shared<T> values = shared.ring[ring.next(copy, true)];
    multiply_transposed<T, kDim, kTiles>(e, shared.grad_out, warp_row, values, a.value_dim);
    if (a.seed) {
      unsigned kept[2];
      kept_weights<kTiles>(kept, a, shared.rows, index, warp_row, start);
      drop_weights(e, kept);
    }
    const Shared<T> keys = shared.ring[ring.next(copy, false)];
    float p[kTiles][4] = {};
    multiply_transposed<T, kDim, kTiles>(p, shared.query, warp_row, keys, a.head_dim);
    if (a.scales) scale_scores(p, a.product, a.cap);
    if (a.hides_within_rows() || !horizon.all_see(start, kKeys)) {
      uint64_t open = ~uint64_t{0};
      if (a.key_mask) open = open_keys<kKeys>(a, index, start, horizon.end);
      mask_scores(p, a, shared.rows, index, warp_row, start, open);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // What is hidden may be NaN in e.
        const bool is_hidden = p[j][i] == kHidden;
        const float weight = weight_of(p[j][i], a.unit, logsumexp[i / 2], 0.0f);
        weights[i / 2] += is_hidden ? 0.0f : weight;
        products[i / 2] = is_hidden ? products[i / 2] : fmaf(weight, e[j][i], products[i / 2]);
      }
    tile = ahead;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float weight = weights[half], product = products[half];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      weight += __shfl_xor_sync(kAll, weight, step);
      product += __shfl_xor_sync(kAll, product, step);
    }
    const int row = warp_row + group + 8 * half, query = shared.rows.query[row], of_head = shared.rows.head[row];
    if (member != 0 || query < 0 || (g.only_far && !is_far(logsumexp[half]))) continue;
    const int64_t at = s.row_number(a, of_head, query);
    const bool is_empty = weight == 0.0f;
    float sum = a.keep_scale * product / weight;
    if (g.grad_logsumexp.data) sum -= g.grad_logsumexp.at(s.batch, of_head, s.first_query + query)[0];
    g.delta[at] = is_empty ? 0.0f : sum;
    g.shift[at] = is_empty ? 0.0f : -log2f(weight);
  }
}

void sum_rows(const AttentionBackward& p, bool only_far, Stream stream) {
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    with_dim(std::max(p.head_dim(), p.value_dim()), [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      using Of = Shape<sizeof(T), kDim>;
      const int64_t group = p.heads() / p.kv_heads();
      Sums<T> g{};
      g.grad_out = rows_of<const T>(p.grad_out);
      g.grad_out_width = copy_width(p.grad_out);
      g.grad_logsumexp = rows_of<const float>(p.grad_logsumexp);
      g.logsumexp = global<const float>(p.logsumexp);
      g.delta = global<float>(p.delta);
      g.shift = global<float>(p.shift);
      g.only_far = only_far;
      g.shares = group > 1 && p.longest_queries < Of::kBlockRows;
      g.heads = static_cast<int>(g.shares ? p.kv_heads() : p.heads());
      const int64_t rows = g.shares ? p.longest_queries * group : p.longest_queries;
      g.row_blocks = static_cast<int>((rows + Of::kBlockRows - 1) / Of::kBlockRows);
      const int64_t blocks = p.batch * g.heads * g.row_blocks;
      if (blocks == 0) return;
      launch<row_sums_kernel<T, kDim>>(static_cast<unsigned>(blocks), Of::kBlockThreads, sizeof(Storage<T, kDim>),
                                       stream, inputs_of<T>(p), g);
    });
  });
}

// One warp per row: the sum of out * grad_out.
template <class T>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(const Rows<const T> out, const Rows<const T> grad_out, const Rows<const float> grad_logsumexp,
                 const ReadOnly<float> logsumexp, const Global<float> delta, const Global<float> shift, int64_t count,
                 int heads, int queries, int dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= count) return;
  const int batch = static_cast<int>(at / queries / heads), head = static_cast<int>(at / queries % heads);
  const int query = static_cast<int>(at % queries);
  float sum = 0.0f;
  const float of_row = __shfl_sync(kAll, lane == 0 ? float{logsumexp[at]} : 0.0f, 0);
  const auto x = out.at(batch, head, query), y = grad_out.at(batch, head, query);
  // A row that sees nothing has no gradient, whatever stands in its grad_out. One that sees nothing but -inf is NaN.
  const bool is_live = of_row != -kInfinity || __any_sync(kAll, lane == 0 && !(to_float(x[0]) == 0.0f));
  if (is_live) {
    for (int d = lane; d < dim; d += 32) sum = fmaf(to_float(x[d]), to_float(y[d]), sum);
    if (grad_logsumexp.data && lane == 0) sum -= grad_logsumexp.at(batch, head, query)[0];
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  delta[at] = sum;
  shift[at] = is_live && fabsf(of_row) == kInfinity ? of_row - of_row : 0.0f;
}

}  // namespace

void attention_delta(const AttentionBackward& p, Stream stream) {
  // Of packed sequences all tokens are one batch entry.
  const int64_t count = (p.cu_seqlens_q ? 1 : p.batch) * p.heads() * p.queries();
  if (count == 0) return;
  if (attention_sums_rows(p)) return sum_rows(p, false, stream);
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    launch<delta_kernel<T>>(static_cast<unsigned>((count + kWarps - 1) / kWarps), kThreads, 0, stream,
                            rows_of<const T>(p.out), rows_of<const T>(p.grad_out),
                            rows_of<const float>(p.grad_logsumexp), global<const float>(p.logsumexp),
                            global<float>(p.delta), global<float>(p.shift), count, static_cast<int>(p.heads()),
                            static_cast<int>(p.queries()), static_cast<int>(p.value_dim()));
  });
  if (p.bias) sum_rows(p, true, stream);
}

}  // namespace velm::cuda
