// The gradients of similarities to the queries and to the rows that were found: each is a sum over pairs in one order.

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "retrieval/topk_similarity/similarity.h"
#include "simd/layout.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace topk;

using Optional = std::optional<Tensor>;

// Numbers below which another thread costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

// The gradient of one row, x, of similarities to others.
template <class X>
struct Sum {
  Metric metric;
  const X* x;
  int64_t dim;
  float* sum;
  float inverse = 1.0f, along = 0.0f;
  bool is_short = false;

  Sum(Metric metric, const X* x, int64_t dim, float* memory) : metric(metric), x(x), dim(dim), sum(memory) {
    std::fill(sum, sum + dim, 0.0f);
    if (metric != Metric::cosine) return;
    const float norm = norm_of(square_sum(x, dim));
    inverse = 1.0f / norm;
    is_short = norm <= kLeastNorm;
  }
  // The similarity to y has this gradient.
  template <class Y>
  void add(float grad, const Y* y) {
    if (metric == Metric::l2) {
      for_vectors([&](Vec a, Vec b, Vec c) { return simd::fma(Vec(2.0f * grad), a - b, c); }, y);
      return;
    }
    float factor = grad;
    if (metric == Metric::cosine) {
      const float inverse_y = 1.0f / norm_of(square_sum(y, dim));
      factor = grad * inverse * inverse_y;
      along += grad * similarity_of<Metric::cosine>(product(y), inverse, inverse_y);
    }
    for_vectors([&](Vec, Vec b, Vec c) { return simd::fma(Vec(factor), b, c); }, y);
  }
  // A row that is not longer than the least norm is divided by that and not by its own.
  template <class Out>
  void finish(Out* out) {
    if (metric == Metric::cosine && !is_short) {
      const Vec factor(-along * inverse * inverse);
      for_vectors([&](Vec a, Vec, Vec c) { return simd::fma(factor, a, c); }, x);
    }
    simd::convert(out, sum, dim);
  }

 private:
  template <class Y>
  float product(const Y* y) const {
    Vec total = simd::zero();
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) total = simd::fma(simd::load(x + i), simd::load(y + i), total);
    if (i < dim) {
      const int n = static_cast<int>(dim - i);
      total = simd::fma(simd::load_first(x + i, n), simd::load_first(y + i, n), total);
    }
    return simd::sum_lanes(total);
  }
  template <class F, class Y>
  void for_vectors(const F& f, const Y* y) {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes)
      simd::store(sum + i, f(simd::load(x + i), simd::load(y + i), simd::load(sum + i)));
    if (i < dim) {
      const int n = static_cast<int>(dim - i);
      simd::store_first(sum + i,
                        f(simd::load_first(x + i, n), simd::load_first(y + i, n), simd::load_first(sum + i, n)), n);
    }
  }
};

template <class Q, class T>
void grad_of_queries(Metric metric, const Tensor& grad, const Tensor& queries, const Tensor& database,
                     const Tensor& places, const Tensor& out) {
  const int64_t k = grad.size(1), dim = queries.size(1);
  const auto* g = const_data<float>(grad);
  const auto* at = const_data<int64_t>(places);
  simd::parallel_ranges(grad.size(0), kGrain / std::max<int64_t>(1, k * dim), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(static_cast<size_t>(dim));
    for (int64_t i = begin; i < end; ++i) {
      Sum<Q> sum(metric, const_data<Q>(queries) + i * queries.stride(0), dim, memory.data());
      for (int64_t j = i * k; j < (i + 1) * k; ++j)
        if (at[j] >= 0) sum.add(g[j], const_data<T>(database) + at[j] * database.stride(0));
      sum.finish(mutable_data<Q>(out) + i * dim);
    }
  });
}

template <class Q, class T>
void grad_of_database(Metric metric, const Tensor& grad, const Tensor& queries, const Tensor& database,
                      const Tensor& places, const Tensor& out) {
  const int64_t k = grad.size(1), dim = queries.size(1), pairs = grad.size(0) * k;
  const auto* g = const_data<float>(grad);
  const auto* at = const_data<int64_t>(places);
  T* to = mutable_data<T>(in_large_pages(out));
  simd::parallel_ranges(out.size(0) * dim, 1 << 18, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<void*>(to + begin), 0, sizeof(T) * static_cast<size_t>(end - begin));
  });
  // Pairs by the row that they read, those of a row in their order.
  std::vector<std::pair<int64_t, int64_t>> sorted;
  for (int64_t j = 0; j < pairs; ++j)
    if (at[j] >= 0) sorted.emplace_back(at[j], j);
  std::sort(sorted.begin(), sorted.end());
  std::vector<int64_t> starts;
  const auto count = static_cast<int64_t>(sorted.size());
  for (int64_t j = 0; j < count; ++j)
    if (j == 0 || sorted[static_cast<size_t>(j)].first != sorted[static_cast<size_t>(j - 1)].first) starts.push_back(j);
  const auto rows = static_cast<int64_t>(starts.size());
  starts.push_back(count);
  simd::parallel_ranges(rows, kGrain / std::max<int64_t>(1, dim), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(static_cast<size_t>(dim));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = starts[static_cast<size_t>(i)], stop = starts[static_cast<size_t>(i + 1)];
      const int64_t row = sorted[static_cast<size_t>(start)].first;
      Sum<T> sum(metric, const_data<T>(database) + row * database.stride(0), dim, memory.data());
      for (int64_t n = start; n < stop; ++n) {
        const int64_t pair = sorted[static_cast<size_t>(n)].second;
        sum.add(g[pair], const_data<Q>(queries) + pair / k * queries.stride(0));
      }
      sum.finish(to + row * dim);
    }
  });
}

void topk_gradients(Tensor grad, Tensor queries, Tensor database, Tensor places, int64_t metric, Optional grad_queries,
                    Optional grad_database) {
  const auto by = static_cast<Metric>(metric);
  with_type(database.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto both = [&](auto q) {
      using Q = decltype(q);
      if (grad_queries) grad_of_queries<Q, T>(by, grad, queries, database, places, *grad_queries);
      if (grad_database) grad_of_database<Q, T>(by, grad, queries, database, places, *grad_database);
    };
    if (queries.scalar_type() == ScalarType::Float)
      both(float{});
    else
      both(T{});
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "topk_gradients", topk_gradients);
}

}  // namespace
}  // namespace velm
