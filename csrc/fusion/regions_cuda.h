// What elementwise kernels over (batch, regions, dim) share: which regions and columns a thread works at, and sums over
// the regions, which blocks leave in parts and which are added in order.
#pragma once

#include <type_traits>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/reduce.h"
#include "fusion/regions.h"

namespace velm::cuda {

namespace {

using namespace device;

// Loops over regions are unrolled, so that several loads are on their way at a time.
constexpr int kThreads = 128, kWarps = kThreads / 32;

inline unsigned divide_up(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

// What a thread works at: `Width` columns of the regions [first, last) of an entry.
struct Share {
  int64_t batch, first, last, column, part;

  DEVICE_INLINE Share(int64_t regions, unsigned blocks, unsigned column_blocks, int width) {
    part = blockIdx.x / column_blocks;
    batch = part / blocks;
    first = part % blocks * kRegions;
    last = first + kRegions < regions ? first + kRegions : regions;
    column = (int64_t{blockIdx.x % column_blocks} * kThreads + threadIdx.x) * width;
  }
};

template <int Width, class P>
DEVICE_INLINE void load_floats(const P& from, float (&to)[Width]) {
  const auto values = load<Width>(from);
#pragma unroll
  for (int k = 0; k < Width; ++k) to[k] = to_float(values[k]);
}
template <class T, int Width, class P>
DEVICE_INLINE void store_floats(const P& to, const float (&from)[Width]) {
  Vector<T, Width> values;
#pragma unroll
  for (int k = 0; k < Width; ++k) values[k] = from_float<T>(from[k]);
  store(to, values);
}

// to[o, i] = the sum over k of parts[o, k, i], in order; parts[o, k] are `stride` apart.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(ReadOnly<float> parts, Global<T> to, int64_t outer, int64_t count, int64_t inner, int64_t stride) {
  const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (number >= outer * inner) return;
  const int64_t o = number / inner, i = number % inner;
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k) sum += parts[(o * count + k) * stride + i];
  to[number] = from_float<T>(sum);
}

template <class T>
void add_parts(const View& parts, int64_t offset, const View& to, int64_t outer, int64_t count, int64_t inner,
               int64_t stride, Stream stream) {
  if (outer * inner == 0) return;
  auto from = global<const float>(parts);
  if (count) from = from + offset;
  launch<add_parts_kernel<T>>(divide_up(outer * inner, kThreads), kThreads, 0, stream, from, global<T>(to), outer,
                              count, inner, stride);
}

// Elements of an access of 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T, class F>
void with_width(bool fits, const F& run) {
  if (fits) return run(std::integral_constant<int, kVector<T>>{});
  run(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace velm::cuda
