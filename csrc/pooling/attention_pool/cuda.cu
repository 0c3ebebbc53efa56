// A few rows attend over the tokens of a segment, which are keys and values at once. The scores are few beside the
// tokens, and are kept between the two products.

#include "pooling/attention_pool/cuda.h"

#include <algorithm>
#include <cmath>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/reduce.h"
#include "pooling/tokens_cuda.h"

namespace velm::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
// Rows and tokens of a tile, and columns of a step.
constexpr int kRows = 16, kTokens = 32, kColumns = 32;
// Sums of a product.
constexpr int kSums = 4;
// Tokens whose gradients a thread adds up for its column.
constexpr int kTokensBackward = 16;
// Blocks that share the tokens of a segment.
constexpr int64_t kMostSplits = 16;

// The first of the weights of a row of a segment; those of a token stand at its number.
DEVICE_INLINE int64_t row_of_weights(const Tokens& tokens, int64_t segment, int64_t row, int64_t rows) {
  return (tokens.bounds ? row : segment * rows + row) * tokens.tokens;
}
DEVICE_INLINE int64_t last_token(const Tokens& tokens, int64_t segment) {
  // Weights of tokens that do not count are written too.
  return tokens.bounds ? tokens.end(segment) : tokens.tokens;
}
DEVICE_INLINE bool counts(const Tokens& tokens, int64_t segment, int64_t token) {
  return token < tokens.end(segment) && !tokens.masks(segment, token);
}

struct ProductsStorage {
  // One more than there are: neighbours in a column lie in different banks.
  SharedArray<float, kRows, kColumns + 1> a;
  SharedArray<float, kTokens, kColumns + 1> x;
};

// weights = a x^T; the tiles of tokens of a segment are shared among `splits` blocks.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    products_kernel(ReadOnly<T> a, ReadOnly<T> x, Global<float> weights, Tokens tokens, int64_t a_segment,
                    int64_t segment_stride, int64_t token_stride, int64_t rows, int64_t dim, unsigned splits,
                    unsigned row_blocks) {
  auto& shared = static_shared<ProductsStorage>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t first_row = int64_t{blockIdx.x % row_blocks} * kRows;
  const int64_t split = blockIdx.x / row_blocks % splits, segment = blockIdx.x / row_blocks / splits;
  const int64_t begin = tokens.begin(segment), end = last_token(tokens, segment);
  for (int64_t first = begin + split * kTokens; first < end; first += int64_t{splits} * kTokens) {
    // Each product in four sums: of one, as long as a row, the weights would have the rounding of every step.
    float sum[kRows / kWarps][kSums] = {};
    for (int64_t column = 0; column < dim; column += kColumns) {
      const bool in = column + lane < dim;
      for (int i = warp; i < kRows; i += kWarps) {
        float value = 0.0f;
        if (in && first_row + i < rows)
          value = to_float(a[segment * a_segment + (first_row + i) * dim + column + lane]);
        shared.a[i][lane] = value;
      }
#pragma unroll 4
      for (int i = warp; i < kTokens; i += kWarps) {
        float value = 0.0f;
        if (in && first + i < end && counts(tokens, segment, first + i))
          value = to_float(x[segment * segment_stride + (first + i) * token_stride + column + lane]);
        shared.x[i][lane] = value;
      }
      __syncthreads();
      for (int first_column = 0; first_column < kColumns; first_column += kSums) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
          const float of_token = shared.x[lane][first_column + k];
#pragma unroll
          for (int i = 0; i < kRows / kWarps; ++i) {
            const float of_row = shared.a[warp * (kRows / kWarps) + i][first_column + k];
            sum[i][k] = fmaf(of_row, of_token, sum[i][k]);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kRows / kWarps; ++i) {
      const int64_t row = first_row + warp * (kRows / kWarps) + i;
      if (row < rows && first + lane < end)
        weights[row_of_weights(tokens, segment, row, rows) + first + lane] =
            (sum[i][0] + sum[i][1]) + (sum[i][2] + sum[i][3]);
    }
  }
}

DEVICE_INLINE float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// Scores to weights: a warp takes one row.
__global__ void __launch_bounds__(kThreads, 8)
    softmax_kernel(Global<float> weights, Global<float> logsumexp, Tokens tokens, int64_t rows, unsigned row_blocks) {
  const int64_t segment = blockIdx.x / row_blocks, row = int64_t{blockIdx.x % row_blocks} * kWarps + threadIdx.y;
  if (row >= rows) return;
  const int64_t number = segment * rows + row, at = row_of_weights(tokens, segment, row, rows);
  const int64_t begin = tokens.begin(segment), end = last_token(tokens, segment);
  float largest = -INFINITY;
  for (int64_t n = begin + threadIdx.x; n < end; n += 32)
    if (counts(tokens, segment, n)) largest = fmaxf(largest, weights[at + n]);
  largest = warp_max(largest);
  const float base = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f;
  for (int64_t n = begin + threadIdx.x; n < end; n += 32)
    if (counts(tokens, segment, n)) sum += expf(weights[at + n] - base);
  const float lse = base + logf(warp_sum(sum));
  if (threadIdx.x == 0) logsumexp[number] = lse;
  for (int64_t n = begin + threadIdx.x; n < end; n += 32) {
    const float weight = counts(tokens, segment, n) ? expf(weights[at + n] - lse) : 0.0f;
    weights[at + n] = weight;
  }
}

// Of one row: scores to weights, and gradients of weights to those of scores. What is taken off the gradients, the sum
// of weight * gradient, is that of grad * out too, but `out` may be of 16 bits: where nearly all weight is on one token
// no more than its rounding would be left. Both sums are those of the weights as they are computed here, and of
// gradients less that of the largest weight (`center`): what is left is a sum of what the other tokens have, with all
// its digits.
__global__ void __launch_bounds__(kThreads, 8)
    softmax_backward_kernel(Global<float> weights, Global<float> grad_weights, ReadOnly<float> logsumexp, Tokens tokens,
                            int64_t rows, unsigned row_blocks) {
  const int64_t segment = blockIdx.x / row_blocks, row = int64_t{blockIdx.x % row_blocks} * kWarps + threadIdx.y;
  if (row >= rows) return;
  const int64_t number = segment * rows + row, at = row_of_weights(tokens, segment, row, rows);
  const float lse = logsumexp[number];
  const int64_t begin = tokens.begin(segment), end = last_token(tokens, segment);
  float largest = -INFINITY, center = 0.0f;
  for (int64_t n = begin + threadIdx.x; n < end; n += 32) {
    const float score = counts(tokens, segment, n) ? static_cast<float>(weights[at + n]) : -INFINITY;
    if (score > largest) {
      largest = score;
      center = grad_weights[at + n];
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, largest, step);
    const float of_other = __shfl_xor_sync(0xffffffffu, center, step);
    // Of equal scores all lanes take the same.
    if (other > largest || (other == largest && (threadIdx.x & step))) center = of_other;
    largest = fmaxf(largest, other);
  }
  // Of an infinite one nothing can be taken off.
  if (!(fabsf(center) < INFINITY)) center = 0.0f;
  float total = 0.0f, product = 0.0f;
  for (int64_t n = begin + threadIdx.x; n < end; n += 32) {
    if (!counts(tokens, segment, n)) continue;
    const float weight = expf(weights[at + n] - lse);
    total += weight;
    product = fmaf(weight, grad_weights[at + n] - center, product);
  }
  const float scale = 1.0f / warp_sum(total), delta = warp_sum(product) * scale;
  for (int64_t n = begin + threadIdx.x; n < end; n += 32) {
    float weight = 0.0f, slope = 0.0f;
    if (counts(tokens, segment, n)) {
      weight = expf(weights[at + n] - lse) * scale;
      slope = weight * ((grad_weights[at + n] - center) - delta);
    }
    weights[at + n] = weight;
    grad_weights[at + n] = slope;
  }
}

struct PooledStorage {
  SharedArray<float, kRows, kTokens> weights;
  SharedArray<int, kTokens> counts;
};

// out = weights x: a thread has one column of a tile of rows of a segment.
template <class T, class O>
__global__ void __launch_bounds__(kThreads, 4)
    pooled_kernel(ReadOnly<float> weights, ReadOnly<T> x, Global<O> out, Tokens tokens, int64_t segment_stride,
                  int64_t token_stride, int64_t rows, int64_t dim, unsigned row_blocks, unsigned column_blocks) {
  auto& shared = static_shared<PooledStorage>();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = int64_t{blockIdx.x % column_blocks} * kThreads + thread;
  const int64_t first_row = int64_t{blockIdx.x / column_blocks % row_blocks} * kRows;
  const int64_t segment = blockIdx.x / column_blocks / row_blocks;
  const int64_t begin = tokens.begin(segment), end = tokens.end(segment);
  float sum[kRows] = {};
  for (int64_t first = begin; first < end; first += kTokens) {
    for (int i = thread; i < kRows * kTokens; i += kThreads) {
      const int64_t row = first_row + i / kTokens, n = first + i % kTokens;
      float weight = 0.0f;
      if (row < rows && n < end) weight = weights[row_of_weights(tokens, segment, row, rows) + n];
      shared.weights[i / kTokens][i % kTokens] = weight;
    }
    if (thread < kTokens) shared.counts[thread] = first + thread < end && counts(tokens, segment, first + thread);
    __syncthreads();
    for (int t = 0; t < kTokens; ++t) {
      if (!shared.counts[t] || column >= dim) continue;
      const float value = to_float(x[segment * segment_stride + (first + t) * token_stride + column]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float weight = shared.weights[i][t];
        sum[i] = fmaf(weight, value, sum[i]);
      }
    }
    __syncthreads();
  }
  if (column >= dim) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (first_row + i < rows) out[(segment * rows + first_row + i) * dim + column] = from_float<O>(sum[i]);
}

struct TokensStorage {
  SharedArray<float, kRows, kTokensBackward> weights, slopes;
};

// grad_x = weights^T grad + grad_weights^T a: a thread has one column of a tile of tokens.
template <class T>
__global__ void __launch_bounds__(kThreads)
    tokens_kernel(ReadOnly<float> weights, ReadOnly<float> grad_weights, ReadOnly<T> grad, ReadOnly<T> a,
                  Global<T> grad_x, Tokens tokens, int64_t a_segment, int64_t rows, int64_t dim, unsigned splits,
                  unsigned column_blocks) {
  auto& shared = static_shared<TokensStorage>();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = int64_t{blockIdx.x % column_blocks} * kThreads + thread;
  const int64_t split = blockIdx.x / column_blocks % splits, segment = blockIdx.x / column_blocks / splits;
  const int64_t begin = tokens.begin(segment), end = last_token(tokens, segment);
  const int64_t segment_of_x = tokens.bounds ? 0 : segment * tokens.tokens;
  for (int64_t first = begin + split * kTokensBackward; first < end; first += int64_t{splits} * kTokensBackward) {
    float sum[kTokensBackward] = {};
    for (int64_t first_row = 0; first_row < rows; first_row += kRows) {
      for (int i = thread; i < kRows * kTokensBackward; i += kThreads) {
        const int64_t row = first_row + i / kTokensBackward, n = first + i % kTokensBackward;
        const int64_t at = row_of_weights(tokens, segment, row, rows) + n;
        const bool in = row < rows && n < end;
        shared.weights[i / kTokensBackward][i % kTokensBackward] = in ? static_cast<float>(weights[at]) : 0.0f;
        shared.slopes[i / kTokensBackward][i % kTokensBackward] = in ? static_cast<float>(grad_weights[at]) : 0.0f;
      }
      __syncthreads();
      for (int i = 0; i < kRows && first_row + i < rows && column < dim; ++i) {
        const float g = to_float(grad[(segment * rows + first_row + i) * dim + column]);
        const float of_row = to_float(a[segment * a_segment + (first_row + i) * dim + column]);
#pragma unroll
        for (int t = 0; t < kTokensBackward; ++t) {
          const float weight = shared.weights[i][t], slope = shared.slopes[i][t];
          sum[t] = fmaf(weight, g, fmaf(slope, of_row, sum[t]));
        }
      }
      __syncthreads();
    }
    if (column >= dim) continue;
    unsigned live = 0;
#pragma unroll 1
    for (int t = 0; t < kTokensBackward; ++t) live |= unsigned{counts(tokens, segment, first + t)} << t;
#pragma unroll
    for (int t = 0; t < kTokensBackward; ++t) {
      if (first + t >= end) continue;
      // Nothing of a NaN gradient comes to a token that does not count, whose weight is 0.
      const float value = live >> t & 1 ? sum[t] : 0.0f;
      grad_x[(segment_of_x + first + t) * dim + column] = from_float<T>(value);
    }
  }
}

// The sum over segments, in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(ReadOnly<float> partials, Global<T> total, int64_t segments, int64_t elements) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0.0f;
  for (int64_t s = 0; s < segments; ++s) sum += partials[s * elements + i];
  total[i] = from_float<T>(sum);
}

struct Grid {
  unsigned row_blocks, column_blocks, splits, softmax_blocks;

  explicit Grid(const AttentionPool& p)
      : row_blocks(divide_up(p.rows(), kRows)),
        column_blocks(divide_up(p.dim(), kThreads)),
        softmax_blocks(divide_up(p.rows(), kWarps)) {
    const int64_t of_segment = p.bounds ? divide_up(p.tokens(), std::max<int64_t>(p.segments(), 1)) : p.tokens();
    splits = static_cast<unsigned>(std::clamp<int64_t>(divide_up(of_segment, 2 * kTokens), 1, kMostSplits));
  }
};

template <class T>
void products(const AttentionPool& p, const Grid& grid, const View& a, bool is_shared, const View& weights,
              Stream stream) {
  launch<products_kernel<T>>(static_cast<unsigned>(p.segments()) * grid.splits * grid.row_blocks, kThreads, 0, stream,
                             global<const T>(a), global<const T>(p.x), global<float>(weights), tokens_of(p),
                             is_shared ? int64_t{0} : p.rows() * p.dim(), p.x.stride[1], p.x.stride[2], p.rows(),
                             p.dim(), grid.splits, grid.row_blocks);
}

template <class T, class O>
void pooled(const AttentionPool& p, const Grid& grid, const View& weights, const View& out, Stream stream) {
  launch<pooled_kernel<T, O>>(static_cast<unsigned>(p.segments()) * grid.row_blocks * grid.column_blocks, kThreads, 0,
                              stream, global<const float>(weights), global<const T>(p.x), global<O>(out), tokens_of(p),
                              p.x.stride[1], p.x.stride[2], p.rows(), p.dim(), grid.row_blocks, grid.column_blocks);
}

}  // namespace

void attention_pool_forward(const AttentionPool& p, Stream stream) {
  if (p.segments() == 0 || p.rows() == 0) return;
  const Grid grid(p);
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    products<T>(p, grid, p.queries, p.is_shared(), p.weights, stream);
    launch<softmax_kernel>(static_cast<unsigned>(p.segments()) * grid.softmax_blocks, dim3(32, kWarps), 0, stream,
                           global<float>(p.weights), global<float>(p.logsumexp), tokens_of(p), p.rows(),
                           grid.softmax_blocks);
    // Without features there is still a logsumexp, which tells whether a row saw anything.
    if (p.dim() != 0) pooled<T, T>(p, grid, p.weights, p.out, stream);
  });
}

void attention_pool_backward(const AttentionPool& p, Stream stream) {
  if (p.rows() == 0 || p.dim() == 0) return;
  const Grid grid(p);
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t elements = p.rows() * p.dim();
    if (p.segments() != 0) {
      products<T>(p, grid, p.queries, p.is_shared(), p.weights, stream);
      products<T>(p, grid, p.grad, false, p.grad_weights, stream);
      launch<softmax_backward_kernel>(static_cast<unsigned>(p.segments()) * grid.softmax_blocks, dim3(32, kWarps), 0,
                                      stream, global<float>(p.weights), global<float>(p.grad_weights),
                                      global<const float>(p.logsumexp), tokens_of(p), p.rows(), grid.softmax_blocks);
      if (p.grad_x)
        launch<tokens_kernel<T>>(static_cast<unsigned>(p.segments()) * grid.splits * grid.column_blocks, kThreads, 0,
                                 stream, global<const float>(p.weights), global<const float>(p.grad_weights),
                                 global<const T>(p.grad), global<const T>(p.queries), global<T>(p.grad_x), tokens_of(p),
                                 p.is_shared() ? int64_t{0} : elements, p.rows(), p.dim(), grid.splits,
                                 grid.column_blocks);
      if (p.grad_queries && p.is_shared())
        pooled<T, float>(p, grid, p.grad_weights, p.partials, stream);
      else if (p.grad_queries)
        pooled<T, T>(p, grid, p.grad_weights, p.grad_queries, stream);
    }
    if (p.grad_queries && p.is_shared())
      launch<sum_kernel<T>>(divide_up(elements, kThreads), kThreads, 0, stream, global<const float>(p.partials),
                            global<T>(p.grad_queries), p.segments(), elements);
  });
}

}  // namespace velm::cuda
