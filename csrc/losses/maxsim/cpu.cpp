// The largest score of each token of a query in each of some documents, from scores that a product of torch has just
// made, and the gradients of what was chosen. See velm_kernels/losses/maxsim.

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "simd/layout.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace simd;

using Optional = std::optional<Tensor>;

// Numbers below which another thread costs more than it saves.
constexpr int64_t kGrain = 1 << 14;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Best {
  float value;
  int32_t place;
};

VELM_INLINE float value(const float* z) {
  return *z;
}
VELM_INLINE float value(const bf16* z) {
  return to_float(*z);
}

// Of numbers of which all count: the largest, of equal ones the first; the first NaN before all.
template <class T>
Best best_of(const T* z, int64_t count) {
  Vec highest(-kInfinity), sum = zero();
  // The number of the vector that it was found in.
  Vec vector_of = zero();
  int64_t j = 0;
  int32_t vector = 0;
  for (; j + kLanes <= count; j += kLanes, ++vector) {
    const Vec x = load(z + j);
    const VecMask above = x > highest;
    highest = select(above, x, highest);
    vector_of = select(above, Vec(static_cast<float>(vector)), vector_of);
    sum += x;
  }
  Best found{-kInfinity, 0};
  bool is_nan = std::isnan(sum_lanes(sum));
  if (vector > 0) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t place = static_cast<int32_t>(vector_of[lane]) * kLanes + lane;
      if (highest[lane] > found.value || (highest[lane] == found.value && place < found.place))
        found = {highest[lane], place};
    }
  }
  for (; j < count; ++j) {
    const float x = value(z + j);
    is_nan |= std::isnan(x);
    if (x > found.value) found = {x, static_cast<int32_t>(j)};
  }
  // A sum of infinities of both signs is NaN too.
  if (is_nan)
    for (j = 0; j < count; ++j)
      if (const float x = value(z + j); std::isnan(x)) return {x, static_cast<int32_t>(j)};
  return found;
}

// The same of those that count.
template <class T>
Best best_of(const T* z, const bool* counts, int64_t count) {
  Best found{-kInfinity, -1};
  for (int64_t j = 0; j < count; ++j) {
    if (!counts[j]) continue;
    const float x = value(z + j);
    if (std::isnan(x)) return {x, static_cast<int32_t>(j)};
    if (found.place < 0 || x > found.value) found = {x, static_cast<int32_t>(j)};
  }
  return found;
}

// Which tokens of a document count, and whether those from the first to the last one do.
struct Counted {
  int64_t begin, end;
  bool all;

  Counted(const bool* counts, int64_t length) : begin(0), end(length), all(true) {
    if (!counts) return;
    while (begin < end && !counts[begin]) ++begin;
    while (end > begin && !counts[end - 1]) --end;
    all = std::all_of(counts + begin, counts + end, [](bool one) { return one; });
  }
};

template <class T>
void best_of_all(const Tensor& z, const Optional& query_mask, const Optional& document_mask, int64_t length,
                 int64_t first, Tensor& best, Optional& places) {
  const int64_t rows = z.size(0), stride = z.stride(0), all = best.size(1), documents = z.size(1) / length;
  const T* scores = const_data<T>(z);
  const bool* counts = query_mask ? const_data<bool>(*query_mask) : nullptr;
  const bool* counts_in = document_mask ? const_data<bool>(*document_mask) : nullptr;
  std::vector<Counted> counted;
  for (int64_t d = 0; d < documents; ++d) counted.emplace_back(counts_in ? counts_in + d * length : nullptr, length);
  auto* values = mutable_data<float>(best);
  int32_t* at = places ? mutable_data<int32_t>(*places) : nullptr;
  parallel_ranges(rows, kGrain / z.size(1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t d = 0; d < documents; ++d) {
        const Counted& in = counted[static_cast<size_t>(d)];
        const T* of = scores + row * stride + d * length;
        Best found{0.0f, -1};
        if (in.begin < in.end && (!counts || counts[row])) {
          found = in.all ? best_of(of + in.begin, in.end - in.begin) : best_of(of, counts_in + d * length, length);
          if (in.all) found.place += static_cast<int32_t>(in.begin);
        }
        values[row * all + first + d] = found.value;
        if (at) at[row * all + first + d] = found.place;
      }
    }
  });
}

void maxsim_best(Tensor z, Optional query_mask, Optional document_mask, int64_t length, int64_t first, Tensor best,
                 Optional places) {
  if (z.scalar_type() == ScalarType::BFloat16)
    best_of_all<bf16>(z, query_mask, document_mask, length, first, best, places);
  else
    best_of_all<float>(z, query_mask, document_mask, length, first, best, places);
}

// to += factor * from
template <class T>
VELM_INLINE void add_row(float* to, const T* from, float factor, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(to + i, fma(Vec(factor), load(from + i), load(to + i)));
  if (i < dim) {
    const int n = static_cast<int>(dim - i);
    store_first(to + i, fma(Vec(factor), load_first(from + i, n), load_first(to + i, n)), n);
  }
}

void maxsim_gradients(Tensor grad, Tensor queries, Tensor documents, Tensor places, Optional grad_queries,
                      Optional grad_documents) {
  const int64_t count = queries.size(0), tokens = queries.size(1), dim = queries.size(2);
  const int64_t all = documents.size(0), length = documents.size(1);
  const auto* g = const_data<float>(grad);
  const auto* at = const_data<int32_t>(places);
  with_type(queries.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* q = const_data<T>(queries);
    const T* d = const_data<T>(documents);
    if (grad_queries) {
      T* to = mutable_data<T>(*grad_queries);
      parallel_ranges(count * tokens, kGrain / std::max<int64_t>(1, all * dim), [&](int64_t begin, int64_t end) {
        std::vector<float> sum(static_cast<size_t>(dim));
        for (int64_t row = begin; row < end; ++row) {
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (int64_t b = 0; b < all; ++b)
            if (const int32_t place = at[row * all + b]; place >= 0)
              add_row(sum.data(), d + (b * length + place) * dim, g[row / tokens * all + b], dim);
          convert(to + row * dim, sum.data(), dim);
        }
      });
    }
    if (grad_documents) {
      T* to = mutable_data<T>(*grad_documents);
      parallel_ranges(all, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> sums(static_cast<size_t>(length * dim));
        for (int64_t b = begin; b < end; ++b) {
          std::fill(sums.begin(), sums.end(), 0.0f);
          for (int64_t row = 0; row < count * tokens; ++row)
            if (const int32_t place = at[row * all + b]; place >= 0)
              add_row(sums.data() + place * dim, q + row * dim, g[row / tokens * all + b], dim);
          convert(to + b * length * dim, sums.data(), length * dim);
        }
      });
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "maxsim_best", maxsim_best);
  VELM_KERNEL(m, "maxsim_gradients", maxsim_gradients);
}

}  // namespace
}  // namespace velm
