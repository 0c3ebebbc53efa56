// Exact merge of attention over shards of the keys: one warp per row, one pass over the shards, forward and backward.

#include "attention/merge_attention/cuda.h"

#include <type_traits>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/reduce.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int kMostWarps = 4;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

// What a lane keeps of a row between the shards, in accesses of `Width` elements 32 lanes apart.
constexpr int kSteps = 2;

template <class T>
struct Rows {
  Global<T> data;
  int64_t batch_stride, head_stride, query_stride;
};

template <class T>
struct ShardPointers {
  Rows<const T> out;
  Rows<T> grad_out;
  ReadOnly<float> logsumexp;
  Global<float> grad_logsumexp;
};

template <class T>
struct Arguments {
  unsigned heads, query_blocks;
  int64_t queries, dim;
  int shards;
  bool wants_outs, wants_logsumexps;
  ReadOnly<float> grad_logsumexp;
  ShardPointers<T> shard[kMostShards];
};

// Where a row of (batch, heads, queries) lies.
struct Place {
  int64_t batch, head, query;

  // A block takes neighbouring queries of one head, one for each warp.
  DEVICE_INLINE explicit Place(unsigned heads, unsigned query_blocks)
      : batch(blockIdx.x / query_blocks / heads),
        head(blockIdx.x / query_blocks % heads),
        query(int64_t{blockIdx.x % query_blocks} * blockDim.y + threadIdx.y) {}
};

template <class T>
DEVICE_INLINE auto row_of(const Rows<T>& rows, const Place& at) {
  return rows.data + (at.batch * rows.batch_stride + at.head * rows.head_stride + at.query * rows.query_stride);
}

DEVICE_INLINE float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMostWarps)
    forward_kernel(const Arguments<T> a, Rows<T> out, Global<float> logsumexp) {
  const int lane = static_cast<int>(threadIdx.x);
  const Place at(a.heads, a.query_blocks);
  // Whole warps leave: the lanes of one share the row.
  if (at.query >= a.queries) return;
  const int64_t row = (at.batch * a.heads + at.head) * a.queries + at.query;

  float mine = -kInfinity;
  if (lane < a.shards) mine = a.shard[lane].logsumexp[row];
  const unsigned present = __ballot_sync(kAll, mine != -kInfinity);
  const float highest = warp_max(mine);
  const float base = highest == -kInfinity ? 0.0f : highest;
  // Of a NaN the sum makes a NaN, which the maximum passed over. Of infinities it makes infinity, and weights of NaN.
  float weight = lane >= a.shards ? 0.0f : mine == base ? 1.0f : expf(mine - base);
  const float sum = warp_sum(weight);
  const bool empty = sum == 0.0f;
  weight = empty ? 0.0f : base == kInfinity ? mine - mine : weight / sum;
  if (lane == 0) logsumexp[row] = empty ? -kInfinity : base + logf(sum);

  const Global<T> to = row_of(out, at);
  for (int64_t first = 0; first < a.dim; first += 32 * Width * kSteps) {
    float total[kSteps][Width] = {};
    for (int s = 0; s < a.shards; ++s) {
      const float w = __shfl_sync(kAll, weight, s);
      // A shard without keys is not read; one of so small a weight that it is 0 is.
      if (!(present >> s & 1)) continue;
      const auto from = row_of(a.shard[s].out, at);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int64_t column = first + (i * 32 + lane) * Width;
        if (column >= a.dim) break;
        const auto x = load<Width>(from + column);
#pragma unroll
        for (int k = 0; k < Width; ++k) total[i][k] = fmaf(w, to_float(x[k]), total[i][k]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t column = first + (i * 32 + lane) * Width;
      if (column >= a.dim) break;
      Vector<T, Width> result;
#pragma unroll
      for (int k = 0; k < Width; ++k) result[k] = from_float<T>(total[i][k]);
      store(to + column, result);
    }
  }
}

// With w_s = exp(lse_s - lse): grad_out_s = w_s grad, and grad_lse_s = w_s (grad . out_s - sum of w_t (grad . out_t) +
// grad_lse).
template <class T, int Width>
__global__ void __launch_bounds__(32 * kMostWarps, 8)
    backward_kernel(const Arguments<T> a, Rows<const T> grad, ReadOnly<float> logsumexp) {
  const int lane = static_cast<int>(threadIdx.x);
  const Place at(a.heads, a.query_blocks);
  if (at.query >= a.queries) return;
  const int64_t row = (at.batch * a.heads + at.head) * a.queries + at.query;

  float mine = -kInfinity;
  if (lane < a.shards) mine = a.shard[lane].logsumexp[row];
  const float total = logsumexp[row];
  // The softmax of the logsumexps but for the rounding of the total, which is as large as the last place of a large
  // number, and divided out. NaN where one of them is infinity.
  float weight = mine == -kInfinity ? 0.0f : total == kInfinity ? total - total : expf(mine - total);
  const float sum = warp_sum(weight);
  weight = mine == -kInfinity ? 0.0f : weight / sum;
  const unsigned present = __ballot_sync(kAll, mine != -kInfinity);

  const auto from = row_of(grad, at);
  // Of the shard with the lane's number.
  float product = 0.0f;
  for (int64_t first = 0; first < a.dim; first += 32 * Width * kSteps) {
    float g[kSteps][Width] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t column = first + (i * 32 + lane) * Width;
      // The gradient of a row without keys is not read either.
      if (column >= a.dim || !present) break;
      const auto x = load<Width>(from + column);
#pragma unroll
      for (int k = 0; k < Width; ++k) g[i][k] = to_float(x[k]);
    }
    for (int s = 0; s < a.shards; ++s) {
      const float w = __shfl_sync(kAll, weight, s);
      const bool is_present = present >> s & 1;
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int64_t column = first + (i * 32 + lane) * Width;
        if (column >= a.dim) break;
        if (a.wants_outs) {
          Vector<T, Width> result;
#pragma unroll
          for (int k = 0; k < Width; ++k) result[k] = from_float<T>(is_present ? w * g[i][k] : 0.0f);
          store(row_of(a.shard[s].grad_out, at) + column, result);
        }
        if (a.wants_logsumexps && is_present) {
          const auto x = load<Width>(row_of(a.shard[s].out, at) + column);
#pragma unroll
          for (int k = 0; k < Width; ++k) dot = fmaf(g[i][k], to_float(x[k]), dot);
        }
      }
      if (a.wants_logsumexps) {
        dot = warp_sum(dot);
        if (lane == s) product += dot;
      }
    }
  }
  if (!a.wants_logsumexps) return;
  const float mean = warp_sum(weight * product);
  if (lane < a.shards) {
    const float shift = (a.grad_logsumexp ? a.grad_logsumexp[row] : 0.0f) - mean;
    a.shard[lane].grad_logsumexp[row] = mine == -kInfinity ? 0.0f : weight * (product + shift);
  }
}

template <class T>
Rows<T> rows_of(const View& rows) {
  return {global<T>(rows), rows.stride[0], rows.stride[1], rows.stride[2]};
}

struct Grid {
  unsigned blocks, warps, query_blocks;
};

Grid grid_of(const Merge& p) {
  const int64_t warps = p.queries() < kMostWarps ? p.queries() : kMostWarps;
  const int64_t query_blocks = warps ? (p.queries() + warps - 1) / warps : 0;
  return {static_cast<unsigned>(p.batch() * p.heads() * query_blocks), static_cast<unsigned>(warps),
          static_cast<unsigned>(query_blocks)};
}

template <class T>
Arguments<T> arguments_of(const Merge& p) {
  Arguments<T> a{};
  a.heads = static_cast<unsigned>(p.heads());
  a.query_blocks = grid_of(p).query_blocks;
  a.queries = p.queries();
  a.dim = p.dim();
  a.shards = p.shards;
  a.wants_outs = static_cast<bool>(p.shard[0].grad_out);
  a.wants_logsumexps = static_cast<bool>(p.shard[0].grad_logsumexp);
  a.grad_logsumexp = global<const float>(p.grad_logsumexp);
  for (int s = 0; s < p.shards; ++s)
    a.shard[s] = {rows_of<const T>(p.shard[s].out), rows_of<T>(p.shard[s].grad_out),
                  global<const float>(p.shard[s].logsumexp), global<float>(p.shard[s].grad_logsumexp)};
  return a;
}

// Wide enough that one step of a warp covers a row, as far as all the tensors allow.
int width_of(const Merge& p) {
  int width = p.dim() > 64 ? 4 : p.dim() > 32 ? 2 : 1;
  const auto fits = [&] {
    bool all = p.dim() % width == 0 && is_aligned(p.out, width);
    for (int s = 0; s < p.shards; ++s)
      all = all && is_aligned(p.shard[s].out, width) && is_aligned(p.shard[s].grad_out, width);
    return all;
  };
  while (!fits()) width /= 2;
  return width;
}

template <class F>
void with_width(int width, const F& f) {
  if (width == 4) return f(std::integral_constant<int, 4>{});
  if (width == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

}  // namespace

void merge_attention_forward(const Merge& p, Stream stream) {
  const Grid grid = grid_of(p);
  if (grid.blocks == 0) return;
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    with_width(width_of(p), [&](auto width) {
      launch<forward_kernel<T, decltype(width)::value>>(grid.blocks, dim3(32, grid.warps), 0, stream,
                                                        arguments_of<T>(p), rows_of<T>(p.out),
                                                        global<float>(p.logsumexp));
    });
  });
}

void merge_attention_backward(const Merge& p, Stream stream) {
  const Grid grid = grid_of(p);
  if (grid.blocks == 0) return;
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    with_width(width_of(p), [&](auto width) {
      launch<backward_kernel<T, decltype(width)::value>>(grid.blocks, dim3(32, grid.warps), 0, stream,
                                                         arguments_of<T>(p), rows_of<const T>(p.out),
                                                         global<const float>(p.logsumexp));
    });
  });
}

}  // namespace velm::cuda
