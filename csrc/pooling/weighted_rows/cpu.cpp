// weighted_rows: sums of a few rows of a table with weights. Backward gathers too: for each row of the table what read
// it, in order, so that nothing is added by two threads.

#include <algorithm>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "simd/parallel.h"
#include "simd/vec.h"

namespace velm {
namespace {

using namespace simd;

// Vectors of features that are summed at once, in registers.
constexpr int kBlock = 8;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Rows that are summed: numbers, of which those out of [0, rows) are none, and weights.
struct Terms {
  const int32_t* index;
  const float* weight;
  int64_t count, rows;
};

// The sum of features [c, c + Count * kLanes), or of the first `left` of one vector.
template <int Count, bool kPart, class T>
VELM_INLINE void sum_of(const T* x, int64_t row_stride, const Terms& terms, int64_t c, int left, T* out) {
  Vec sum[Count];
  unroll<Count>([&](auto v) { sum[v] = zero(); });
  for (int64_t e = 0; e < terms.count; ++e) {
    const int64_t index = terms.index[e];
    if (index < 0 || index >= terms.rows) continue;
    const T* row = x + index * row_stride + c;
    const Vec weight(terms.weight[e]);
    unroll<Count>(
        [&](auto v) { sum[v] = fma(kPart ? load_first(row, left) : load(row + v * kLanes), weight, sum[v]); });
  }
  unroll<Count>([&](auto v) {
    if constexpr (kPart) {
      store_first(out + c, sum[v], left);
    } else {
      store(out + c + v * kLanes, sum[v]);
    }
  });
}

template <class T>
void sum_row(const T* x, int64_t row_stride, const Terms& terms, int64_t dim, T* out) {
  int64_t c = 0;
  for (; c + kBlock * kLanes <= dim; c += kBlock * kLanes) sum_of<kBlock, false>(x, row_stride, terms, c, 0, out);
  for (; c + kLanes <= dim; c += kLanes) sum_of<1, false>(x, row_stride, terms, c, 0, out);
  if (c < dim) sum_of<1, true>(x, row_stride, terms, c, static_cast<int>(dim - c), out);
}

void weighted_rows_forward(Tensor x, Tensor indices, Tensor weights, Tensor out) {
  in_large_pages(out);
  const int64_t batch = x.size(0), rows = x.size(1), dim = x.size(2);
  const int64_t count = indices.size(0), taps = indices.size(1);
  const int64_t batch_stride = x.stride(0), row_stride = x.stride(1);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = const_data<T>(x);
    T* to = mutable_data<T>(out);
    const int32_t* index = const_data<int32_t>(indices);
    const float* weight = const_data<float>(weights);
    parallel_ranges(batch * count, kGrain / std::max<int64_t>(dim, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t entry = i / count, n = i % count;
        sum_row(from + entry * batch_stride, row_stride, {index + n * taps, weight + n * taps, taps, rows}, dim,
                to + i * dim);
      }
    });
  });
}

// For each row of the table the results that read it, in order, and with which weights.
struct Readers {
  std::vector<int64_t> first;
  std::vector<int32_t> result;
  std::vector<float> weight;

  Readers(const Tensor& indices, const Tensor& weights, int64_t rows) : first(static_cast<size_t>(rows) + 2, 0) {
    const int64_t taps = indices.size(1), all = indices.numel();
    const int32_t* index = const_data<int32_t>(indices);
    const float* value = const_data<float>(weights);
    // Counted one place too far on: after the rows were placed, first[r] is where row r begins.
    for (int64_t e = 0; e < all; ++e)
      if (index[e] >= 0 && index[e] < rows) ++first[static_cast<size_t>(index[e]) + 2];
    for (size_t r = 2; r < first.size(); ++r) first[r] += first[r - 1];
    result.resize(static_cast<size_t>(first.back()));
    weight.resize(result.size());
    for (int64_t e = 0; e < all; ++e) {
      if (index[e] < 0 || index[e] >= rows) continue;
      const size_t at = static_cast<size_t>(first[static_cast<size_t>(index[e]) + 1]++);
      result[at] = static_cast<int32_t>(e / taps);
      weight[at] = value[e];
    }
  }

  Terms of(int64_t row, int64_t results) const {
    const int64_t begin = first[static_cast<size_t>(row)], end = first[static_cast<size_t>(row) + 1];
    return {result.data() + begin, weight.data() + begin, end - begin, results};
  }
};

void grad_of_x(const Tensor& grad, const Tensor& indices, const Tensor& weights, const Tensor& grad_x) {
  in_large_pages(grad_x);
  const int64_t batch = grad.size(0), count = grad.size(1), dim = grad.size(2), rows = grad_x.size(1);
  const int64_t batch_stride = grad.stride(0), row_stride = grad.stride(1);
  const Readers readers(indices, weights, rows);
  const int64_t per_row = indices.numel() / std::max<int64_t>(rows, 1) + 1;
  with_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = const_data<T>(grad);
    T* to = mutable_data<T>(grad_x);
    parallel_ranges(batch * rows, kGrain / std::max<int64_t>(dim * per_row, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        sum_row(from + i / rows * batch_stride, row_stride, readers.of(i % rows, count), dim, to + i * dim);
    });
  });
}

template <class T>
float dot(const T* a, const T* b, int64_t dim) {
  Vec sum[4] = {zero(), zero(), zero(), zero()};
  int64_t c = 0;
  for (; c + 4 * kLanes <= dim; c += 4 * kLanes)
    unroll<4>([&](auto v) { sum[v] = fma(load(a + c + v * kLanes), load(b + c + v * kLanes), sum[v]); });
  for (; c + kLanes <= dim; c += kLanes) sum[0] = fma(load(a + c), load(b + c), sum[0]);
  if (const int left = static_cast<int>(dim - c); left > 0)
    sum[1] = fma(load_first(a + c, left), load_first(b + c, left), sum[1]);
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

void grad_of_weights(const Tensor& grad, const Tensor& x, const Tensor& indices, const Tensor& grad_weights) {
  const int64_t batch = x.size(0), rows = x.size(1), dim = x.size(2), taps = indices.size(1);
  with_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T *come = const_data<T>(grad), *from = const_data<T>(x);
    const int32_t* index = const_data<int32_t>(indices);
    float* to = mutable_data<float>(grad_weights);
    const int64_t grain = kGrain / std::max<int64_t>(batch * taps * dim, 1);
    parallel_ranges(indices.size(0), grain, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin * taps; e < end * taps; ++e) {
        to[e] = 0.0f;
        if (index[e] < 0 || index[e] >= rows) continue;
        for (int64_t entry = 0; entry < batch; ++entry)
          to[e] += dot(come + entry * grad.stride(0) + e / taps * grad.stride(1),
                       from + entry * x.stride(0) + index[e] * x.stride(1), dim);
      }
    });
  });
}

void weighted_rows_backward(Tensor grad, std::optional<Tensor> x, Tensor indices, std::optional<Tensor> weights,
                            int64_t, std::optional<Tensor> grad_x, std::optional<Tensor> grad_weights) {
  if (grad_x && weights) grad_of_x(grad, indices, *weights, *grad_x);
  if (grad_weights && x) grad_of_weights(grad, *x, indices, *grad_weights);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "weighted_rows_forward", weighted_rows_forward);
  VELM_KERNEL(m, "weighted_rows_backward", weighted_rows_backward);
}

}  // namespace
}  // namespace velm
