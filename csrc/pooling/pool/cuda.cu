// Pooling over tokens, forward and backward, one pass over the tokens that count.

#include "pooling/pool/cuda.h"

#include <cmath>
#include <type_traits>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "pooling/tokens_cuda.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128, kAlong = 32, kRows = kThreads / kAlong;
constexpr int kMostWidth = 8;
// Tokens that a thread goes through in backward.
constexpr int kTokensBackward = 4;
constexpr float kEps = 1e-6f, kLargest = 3.402823466e38f;

// What some tokens of a column amount to: a sum in `a`; the largest in `a` and its token, -1 for none; of logsumexp the
// largest and the sum of exp(x - a) in `b`; of gem the sum of (b x)^p in `a`, `b` one over the largest, so that no
// power overflows or is lost whatever p is. NaN is no maximum, and comes by way of the sums.
struct State {
  float a, b;
  int token;
};

DEVICE_INLINE State nothing(PoolMode mode) {
  return {mode == kPoolLogSumExp ? -kLargest : 0.0f, mode == kPoolGem ? INFINITY : 0.0f, -1};
}

DEVICE_INLINE float power(float x, float p) {
  return p == 3.0f ? x * x * x : powf(x, p);
}

DEVICE_INLINE void add(State& state, PoolMode mode, float p, float x, int token) {
  if (mode == kPoolMax) {
    if (state.token < 0 || x > state.a || (x != x && state.a == state.a)) state = {x, 0.0f, token};
  } else if (mode == kPoolLogSumExp) {
    if (x > state.a) {
      state.b = state.b * expf(state.a - x) + 1.0f;
      state.a = x;
    } else {
      // Of infinities the difference is NaN.
      state.b += x == state.a ? 1.0f : expf(x - state.a);
    }
  } else if (mode == kPoolGem) {
    // In this order NaN is kept.
    x = x < kEps ? kEps : x;
    const bool is_another_infinity = x == INFINITY && state.b == 0.0f;
    const float ratio = is_another_infinity ? 1.0f : x * state.b;
    if (ratio > 1.0f) {
      state.b = 1.0f / x;
      state.a = state.a * power(1.0f / ratio, p) + 1.0f;
    } else {
      state.a += power(ratio, p);
    }
  } else {
    state.a += x;
  }
}

DEVICE_INLINE void join(State& state, PoolMode mode, float p, const State& other) {
  if (mode == kPoolMax) {
    if (other.token < 0) return;
    const bool is_nan = state.a != state.a, other_is_nan = other.a != other.a;
    const bool ties = is_nan ? other_is_nan : other.a == state.a;
    if (state.token < 0 || (ties ? other.token < state.token : !is_nan && !(other.a <= state.a))) state = other;
  } else if (mode == kPoolLogSumExp) {
    const float largest = other.a > state.a ? other.a : state.a;
    const float mine = state.a == largest ? state.b : state.b * expf(state.a - largest);
    state.b = mine + (other.a == largest ? other.b : other.b * expf(other.a - largest));
    state.a = largest;
  } else if (mode == kPoolGem) {
    const float least = other.b < state.b ? other.b : state.b;
    const float mine = state.b == least ? state.a : state.a * power(least / state.b, p);
    state.a = mine + (other.b == least ? other.a : other.a * power(least / other.b, p));
    state.b = least;
  } else {
    state.a += other.a;
  }
}

DEVICE_INLINE float result(const State& state, PoolMode mode, float p, int count) {
  if (count == 0) return 0.0f;
  if (mode == kPoolLogSumExp) return state.a + logf(state.b);
  const float value = mode == kPoolMean || mode == kPoolGem ? state.a / static_cast<float>(count) : state.a;
  if (mode != kPoolGem) return value;
  const float root = powf(value, 1.0f / p) / state.b;
  return root < kEps ? kEps : root;
}

template <class T>
DEVICE_INLINE void write(const State& state, PoolMode mode, float p, int count, Global<T> out, Global<float> stats,
                         int64_t at) {
  const float value = result(state, mode, p, count);
  out[at] = from_float<T>(value);
  if (mode == kPoolMax)
    pointer_cast<int>(stats)[at] = count ? state.token : -1;
  else if (stats)
    stats[at] = value;
}

struct RowsStorage {
  SharedArray<float, kRows, kAlong * kMostWidth> a, b;
  SharedArray<int, kRows, kAlong * kMostWidth> token;
  SharedArray<int, kRows> count;
};

// Columns side by side in memory: threads along x over the columns of a segment, along y over its tokens.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(ReadOnly<T> x, Tokens tokens, Global<T> out, Global<float> stats, PoolMode mode, float p,
                int64_t segment_stride, int64_t token_stride, int64_t dim, unsigned column_blocks) {
  auto& shared = static_shared<RowsStorage>();
  const int64_t segment = blockIdx.x / column_blocks;
  const int64_t column = (int64_t{blockIdx.x % column_blocks} * kAlong + threadIdx.x) * Width;
  const int64_t begin = tokens.begin(segment), end = tokens.end(segment);
  State state[Width];
#pragma unroll
  for (int k = 0; k < Width; ++k) state[k] = nothing(mode);
  int count = 0;
  for (int64_t n = begin + threadIdx.y; n < end; n += kRows) {
    if (tokens.masks(segment, n)) continue;
    ++count;
    if (column >= dim) continue;
    const auto values = load<Width>(x + (segment * segment_stride + n * token_stride + column));
#pragma unroll
    for (int k = 0; k < Width; ++k) add(state[k], mode, p, to_float(values[k]), static_cast<int>(n - begin));
  }
#pragma unroll
  for (int k = 0; k < Width; ++k) {
    const int at = k * kAlong + static_cast<int>(threadIdx.x);
    shared.a[threadIdx.y][at] = state[k].a;
    shared.b[threadIdx.y][at] = state[k].b;
    shared.token[threadIdx.y][at] = state[k].token;
  }
  if (threadIdx.x == 0) shared.count[threadIdx.y] = count;
  __syncthreads();
  if (threadIdx.y != 0 || column >= dim) return;
  for (int y = 1; y < kRows; ++y) count += shared.count[y];
#pragma unroll
  for (int k = 0; k < Width; ++k) {
    const int at = k * kAlong + static_cast<int>(threadIdx.x);
    for (int y = 1; y < kRows; ++y) {
      const State other{shared.a[y][at], shared.b[y][at], shared.token[y][at]};
      join(state[k], mode, p, other);
    }
    write<T>(state[k], mode, p, count, out, stats, segment * dim + column + k);
  }
}

// Tokens side by side in memory: a warp takes one column of a segment.
template <class T>
__global__ void __launch_bounds__(kThreads)
    columns_kernel(ReadOnly<T> x, Tokens tokens, Global<T> out, Global<float> stats, PoolMode mode, float p,
                   int64_t segment_stride, int64_t dim_stride, int64_t dim) {
  const int64_t number = int64_t{blockIdx.x} * kRows + threadIdx.y;
  if (number >= tokens.segments * dim) return;
  const int64_t segment = number / dim, column = number % dim;
  const int64_t end = tokens.end(segment);
  State state = nothing(mode);
  int count = 0;
  for (int64_t n = threadIdx.x; n < end; n += kAlong) {
    if (tokens.masks(segment, n)) continue;
    ++count;
    add(state, mode, p, to_float(x[segment * segment_stride + column * dim_stride + n]), static_cast<int>(n));
  }
#pragma unroll
  for (int step = kAlong / 2; step > 0; step /= 2) {
    count += __shfl_xor_sync(0xffffffffu, count, step);
    State other;
    other.a = __shfl_xor_sync(0xffffffffu, state.a, step);
    other.b = __shfl_xor_sync(0xffffffffu, state.b, step);
    other.token = __shfl_xor_sync(0xffffffffu, state.token, step);
    join(state, mode, p, other);
  }
  if (threadIdx.x == 0) write<T>(state, mode, p, count, out, stats, number);
}

// How many tokens of a segment count: a warp each.
__global__ void __launch_bounds__(kThreads) counts_kernel(Tokens tokens, Global<int> counts) {
  const int64_t segment = int64_t{blockIdx.x} * kRows + threadIdx.y;
  if (segment >= tokens.segments) return;
  const int64_t begin = tokens.begin(segment), end = tokens.end(segment);
  int count = static_cast<int>(end - begin);
  if (tokens.mask) {
    count = 0;
    for (int64_t n = begin + threadIdx.x; n < end; n += kAlong) count += tokens.masks(segment, n) ? 0 : 1;
#pragma unroll
    for (int step = kAlong / 2; step > 0; step /= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
  }
  if (threadIdx.x == 0) counts[segment] = count;
}

// What a token gets of the gradient of its column.
DEVICE_INLINE float share(PoolMode mode, float p, float grad, float x, float stat, int index, int token, int count) {
  if (mode == kPoolMax) return index == token ? grad : 0.0f;
  if (mode == kPoolSum) return grad;
  // Where all are -inf.
  if (mode == kPoolLogSumExp) return stat == -INFINITY ? 0.0f : grad * expf(x - stat);
  grad /= static_cast<float>(count);
  if (mode == kPoolMean) return grad;
  if (!(x >= kEps)) return 0.0f;
  const float ratio = x / (stat < kEps ? kEps : stat);
  return grad * (p == 3.0f ? ratio * ratio : powf(ratio, p - 1.0f));
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    rows_backward_kernel(ReadOnly<T> grad, ReadOnly<T> x, ReadOnly<float> stats, ReadOnly<int> counts, Tokens tokens,
                         Global<T> grad_x, PoolMode mode, float p, int64_t segment_stride, int64_t token_stride,
                         int64_t dim, unsigned column_blocks) {
  const int64_t column = (int64_t{blockIdx.x % column_blocks} * kAlong + threadIdx.x) * Width;
  if (column >= dim) return;
  const int64_t rows = tokens.bounds ? tokens.tokens : tokens.segments * tokens.tokens;
  int64_t row = (int64_t{blockIdx.x / column_blocks} * kRows + threadIdx.y) * kTokensBackward;
  int64_t segment = 0;
  if (tokens.bounds && row < rows) {
    // The last segment that begins at or before the token.
    for (int64_t high = tokens.segments; high - segment > 1;) {
      const int64_t middle = (segment + high) / 2;
      if (tokens.bounds[middle] <= row)
        segment = middle;
      else
        high = middle;
    }
  }
  for (int i = 0; i < kTokensBackward && row < rows; ++i, ++row) {
    if (tokens.bounds)
      while (segment + 1 < tokens.segments && tokens.bounds[segment + 1] <= row) ++segment;
    else
      segment = row / tokens.tokens;
    const int64_t n = tokens.bounds ? row : row % tokens.tokens;
    const int64_t begin = tokens.begin(segment);
    Vector<T, Width> values;
    if (n < begin || n >= tokens.end(segment) || tokens.masks(segment, n)) {
#pragma unroll
      for (int k = 0; k < Width; ++k) values[k] = from_float<T>(0.0f);
    } else {
      const int count = counts ? counts[segment] : 1;
      const auto g = load<Width>(grad + (segment * dim + column));
      Vector<T, Width> v{};
      if (x) v = load<Width>(x + (segment * segment_stride + n * token_stride + column));
#pragma unroll
      for (int k = 0; k < Width; ++k) {
        const int64_t at = segment * dim + column + k;
        const bool has_stat = mode == kPoolLogSumExp || mode == kPoolGem;
        const float stat = has_stat ? static_cast<float>(stats[at]) : 0.0f;
        const int index = mode == kPoolMax ? static_cast<int>(pointer_cast<const int>(stats)[at]) : 0;
        values[k] = from_float<T>(
            share(mode, p, to_float(g[k]), to_float(v[k]), stat, index, static_cast<int>(n - begin), count));
      }
    }
    store(grad_x + (row * dim + column), values);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    columns_backward_kernel(ReadOnly<T> grad, ReadOnly<T> x, ReadOnly<float> stats, ReadOnly<int> counts, Tokens tokens,
                            Global<T> grad_x, PoolMode mode, float p, int64_t segment_stride, int64_t dim_stride,
                            int64_t dim) {
  const int64_t number = int64_t{blockIdx.x} * kRows + threadIdx.y;
  if (number >= tokens.segments * dim) return;
  const int64_t segment = number / dim, column = number % dim, end = tokens.end(segment);
  const float g = to_float(grad[number]);
  const int count = counts ? counts[segment] : 1;
  const float stat = mode == kPoolLogSumExp || mode == kPoolGem ? static_cast<float>(stats[number]) : 0.0f;
  const int index = mode == kPoolMax ? static_cast<int>(pointer_cast<const int>(stats)[number]) : 0;
  for (int64_t n = threadIdx.x; n < tokens.tokens; n += kAlong) {
    float value = 0.0f;
    if (n < end && !tokens.masks(segment, n)) {
      const float v = x ? to_float(x[segment * segment_stride + column * dim_stride + n]) : 0.0f;
      value = share(mode, p, g, v, stat, index, static_cast<int>(n), count);
    }
    grad_x[number * tokens.tokens + n] = from_float<T>(value);
  }
}

// Calls run with the widest access that the tensors allow.
template <class T, class F>
void with_width(const Pool& p, const View& other, const F& run) {
  constexpr int kVector = sizeof(T) == 4 ? 4 : 8;
  const bool fits =
      p.dim() % kVector == 0 && is_aligned(p.x, kVector) && is_aligned(other, kVector) && is_aligned(p.grad, kVector);
  if (fits)
    run(std::integral_constant<int, kVector>{});
  else
    run(std::integral_constant<int, 1>{});
}

}  // namespace

void pool_forward(const Pool& p, Stream stream) {
  if (p.segments() == 0 || p.dim() == 0) return;
  const dim3 block(kAlong, kRows);
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto x = global<const T>(p.x);
    const auto out = global<T>(p.out);
    const auto stats = global<float>(p.stats);
    if (p.tokens_contiguous)
      return launch<columns_kernel<T>>(divide_up(p.segments() * p.dim(), kRows), block, 0, stream, x, tokens_of(p), out,
                                       stats, p.mode, p.p, p.x.stride[1], p.x.stride[3], p.dim());
    with_width<T>(p, p.out, [&](auto w) {
      constexpr int kWidth = decltype(w)::value;
      const unsigned column_blocks = divide_up(p.dim(), kAlong * kWidth);
      launch<rows_kernel<T, kWidth>>(static_cast<unsigned>(p.segments() * column_blocks), block, 0, stream, x,
                                     tokens_of(p), out, stats, p.mode, p.p, p.x.stride[1], p.x.stride[2], p.dim(),
                                     column_blocks);
    });
  });
}

void pool_backward(const Pool& p, Stream stream) {
  if (p.segments() == 0 || p.dim() == 0 || p.tokens() == 0) return;
  const dim3 block(kAlong, kRows);
  View counted;
  if (p.mode == kPoolMean || p.mode == kPoolGem) {
    counted = p.counts;
    launch<counts_kernel>(divide_up(p.segments(), kRows), block, 0, stream, tokens_of(p), global<int>(counted));
  }
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto grad = global<const T>(p.grad);
    const auto x = global<const T>(p.x);
    const auto stats = global<const float>(p.stats);
    const auto counts = global<const int>(counted);
    const auto grad_x = global<T>(p.grad_x);
    if (p.tokens_contiguous)
      return launch<columns_backward_kernel<T>>(divide_up(p.segments() * p.dim(), kRows), block, 0, stream, grad, x,
                                                stats, counts, tokens_of(p), grad_x, p.mode, p.p, p.x.stride[1],
                                                p.x.stride[3], p.dim());
    with_width<T>(p, p.grad_x, [&](auto w) {
      constexpr int kWidth = decltype(w)::value;
      const unsigned column_blocks = divide_up(p.dim(), kAlong * kWidth);
      const int64_t rows = p.bounds ? p.tokens() : p.segments() * p.tokens();
      launch<rows_backward_kernel<T, kWidth>>(divide_up(rows, kRows * kTokensBackward) * column_blocks, block, 0,
                                              stream, grad, x, stats, counts, tokens_of(p), grad_x, p.mode, p.p,
                                              p.x.stride[1], p.x.stride[2], p.dim(), column_blocks);
    });
  });
}

}  // namespace velm::cuda
