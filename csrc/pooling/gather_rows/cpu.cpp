// Weighted sums of rows by index: what selects, merges and un-merges tokens.

#include <algorithm>
#include <optional>

#include "common/tensor.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace simd;

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// The entries of one row of the result: numbers of rows of x, and their weights or null.
struct Entries {
  const int32_t* index;
  const float* weight;
  int64_t count;
};

template <class T>
void sum_rows(const T* x, int64_t row_stride, int64_t rows, const Entries& entries, int64_t dim, T* out) {
  const auto in = [&](int64_t e) { return entries.index[e] >= 0 && entries.index[e] < rows; };
  const auto row = [&](int64_t e) { return x + entries.index[e] * row_stride; };
  if (entries.count == 1 && in(0) && !entries.weight) {
    std::copy_n(row(0), dim, out);
    return;
  }
  const auto sum_of = [&](const auto& read) VELM_INLINE_LAMBDA {
    Vec sum = zero();
    for (int64_t e = 0; e < entries.count; ++e) {
      if (!in(e)) continue;
      const Vec value = read(row(e));
      sum = entries.weight ? fma(value, Vec(entries.weight[e]), sum) : sum + value;
    }
    return sum;
  };
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes)
    store(out + c, sum_of([&](const T* p) VELM_INLINE_LAMBDA { return load(p + c); }));
  if (const int left = static_cast<int>(dim - c); left > 0)
    store_first(out + c, sum_of([&](const T* p) VELM_INLINE_LAMBDA { return load_first(p + c, left); }), left);
}

void gather_rows(Tensor x, Tensor index, std::optional<Tensor> offsets, std::optional<Tensor> weight, Tensor,
                 std::optional<Tensor>, std::optional<Tensor>, Tensor out) {
  in_large_pages(out);
  const int64_t batch = x.size(0), rows = x.size(1), dim = x.size(2), entries = index.size(1);
  const int64_t out_rows = out.size(1);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = const_data<T>(x);
    T* to = mutable_data<T>(out);
    const int32_t* indices = const_data<int32_t>(index);
    const int32_t* bounds = offsets ? const_data<int32_t>(*offsets) : nullptr;
    const float* weights = weight ? const_data<float>(*weight) : nullptr;
    const int64_t batch_stride = x.stride(0), row_stride = x.stride(1);
    parallel_ranges(batch * out_rows, kGrain / std::max<int64_t>(dim, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / out_rows, m = i % out_rows;
        int64_t first = m, last = m + 1;
        if (bounds) {
          const int32_t* of_row = bounds + b * (out_rows + 1) + m;
          first = std::clamp<int64_t>(of_row[0], 0, entries);
          last = std::clamp<int64_t>(of_row[1], first, entries);
        }
        const int64_t at = b * entries + first;
        sum_rows(from + b * batch_stride, row_stride, rows,
                 {indices + at, weights ? weights + at : nullptr, last - first}, dim, to + i * dim);
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "gather_rows_forward", gather_rows);
}

}  // namespace
}  // namespace velm
