// Count sketches of the rows of two matrices: each row is cleared and added to where its features go, in a cache.

#include <algorithm>

#include "common/tensor.h"
#include "simd/lines.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm {
namespace {

using namespace simd;

void sketch(const Tensor& x, const Tensor& index, const Tensor& sign, int64_t dim, float* out) {
  const Lines from(x, x.stride(0), 1);
  const int64_t features = x.size(1);
  const auto* bucket = const_data<int32_t>(index);
  const auto* factor = const_data<float>(sign);
  parallel_ranges(x.size(0), 1 + 8192 / (dim + features), [&](int64_t begin, int64_t end) {
    Scratch memory;
    float* converted = memory.take(features);
    for (int64_t row = begin; row < end; ++row) {
      const float* values = as_floats(from.type, from.at(row, 0), features, converted);
      float* to = out + row * dim;
      std::fill_n(to, dim, 0.0f);
      for (int64_t i = 0; i < features; ++i) {
        // The operator looks at the values of indices before; what it did not see must still not be written to.
        const auto place = static_cast<uint32_t>(bucket[i]);
        if (place < static_cast<uint64_t>(dim)) to[place] += factor[i] * values[i];
      }
    }
  });
}

void count_sketches_forward(Tensor x, Tensor index_x, Tensor sign_x, Tensor y, Tensor index_y, Tensor sign_y,
                            int64_t dim, Tensor out) {
  auto* to = mutable_data<float>(out);
  sketch(x, index_x, sign_x, dim, to);
  sketch(y, index_y, sign_y, dim, to + x.size(0) * dim);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "count_sketches_forward", count_sketches_forward);
}

}  // namespace
}  // namespace velm
