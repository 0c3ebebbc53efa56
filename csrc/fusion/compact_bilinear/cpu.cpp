// Products of spectra. Those of torch round otherwise at the end of what a thread computes, so that their bits depend
// on the number of threads.

#include <algorithm>

#include "common/tensor.h"
#include "simd/parallel.h"

namespace velm {
namespace {

// Floats of a row that are worked on together: 16 KiB each of two factors and the product fit in the first cache.
constexpr int64_t kBlock = 4096;

// Of complex numbers, real and imaginary parts in turn. `out` may be a factor.
template <bool kAdds>
void multiply(const float* a, const float* b, float* out, int64_t floats) {
#pragma GCC ivdep
  for (int64_t i = 0; i < floats; i += 2) {
    const float real = a[i] * b[i] - a[i + 1] * b[i + 1], imaginary = a[i] * b[i + 1] + a[i + 1] * b[i];
    out[i] = kAdds ? out[i] + real : real;
    out[i + 1] = kAdds ? out[i + 1] + imaginary : imaginary;
  }
}

// (entries, rows, frequencies, 2), contiguous; a factor of one row goes with all rows of the other, and a product of
// one row is the sum over all, in order.
void multiply_spectra(Tensor a, Tensor b, Tensor out) {
  const int64_t entries = a.size(0), rows = std::max(a.size(1), b.size(1)), floats = 2 * a.size(2);
  const int64_t blocks = (floats + kBlock - 1) / kBlock;
  const auto row_of = [&](const Tensor& t, int64_t entry, int64_t row, int64_t first) {
    return (entry * t.size(1) + (t.size(1) == 1 ? 0 : row)) * floats + first;
  };
  const float *from_a = const_data<float>(a), *from_b = const_data<float>(b);
  float* to = mutable_data<float>(out);
  simd::parallel_ranges(
      entries * blocks, 1 + 32768 / (std::max<int64_t>(1, rows) * kBlock), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t entry = item / blocks, first = item % blocks * kBlock, count = std::min(kBlock, floats - first);
          for (int64_t row = 0; row < rows; ++row) {
            const float *x = from_a + row_of(a, entry, row, first), *y = from_b + row_of(b, entry, row, first);
            float* product = to + row_of(out, entry, row, first);
            row > 0 && out.size(1) == 1 ? multiply<true>(x, y, product, count) : multiply<false>(x, y, product, count);
          }
        }
      });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "multiply_spectra", multiply_spectra);
}

}  // namespace
}  // namespace velm
