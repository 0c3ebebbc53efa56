// What elementwise work over (batch, regions, dim) shares on the CPU: vectors of a row, sums over regions.
#pragma once

#include <algorithm>

#include "common/tensor.h"
#include "simd/lines.h"
#include "simd/parallel.h"
#include "simd/scratch.h"
#include "simd/vec.h"

namespace velm {
namespace {

using namespace simd;

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 8192;
// Regions whose sums are added in float32, one after the other; sums over more are sums of these, in float64.
constexpr int64_t kRegions = 32;
// Elements of a row that are summed lane by lane before they go into float64; pixels are converted so many at a time.
constexpr int64_t kRun = 512;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
// Items of so many elements that a thread takes at least.
int64_t grain(int64_t elements) {
  return kGrain / std::max<int64_t>(elements, 1);
}

// Calls f(column, load, store) for the vectors of a row; the last one may be part of one, its other lanes zero.
template <class F>
VELM_INLINE void for_vectors(int64_t n, const F& f) {
  const auto whole = [](const float* p) VELM_INLINE_LAMBDA { return load(p); };
  const auto write = [](float* p, Vec x) VELM_INLINE_LAMBDA { store(p, x); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, whole, write);
  const int left = static_cast<int>(n - i);
  if (left)
    f(
        i, [left](const float* p) VELM_INLINE_LAMBDA { return load_first(p, left); },
        [left](float* p, Vec x) VELM_INLINE_LAMBDA { store_first(p, x, left); });
}

[[maybe_unused]] double sum_of_products(const float* a, const float* b, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    Vec sum = zero();
    for_vectors(std::min(kRun, n - start), [&](int64_t c, auto read, auto) VELM_INLINE_LAMBDA {
      sum = fma(read(a + start + c), read(b + start + c), sum);
    });
    total += sum_lanes(sum);
  }
  return total;
}

[[maybe_unused]] double sum_of(const float* a, int64_t n) {
  Vec sum = zero();
  for_vectors(n, [&](int64_t c, auto read, auto) VELM_INLINE_LAMBDA { sum += read(a + c); });
  return sum_lanes(sum);
}

[[maybe_unused]] void multiply(const float* a, float factor, int64_t n, float* to) {
  for_vectors(n, [&](int64_t c, auto read, auto write) VELM_INLINE_LAMBDA { write(to + c, read(a + c) * factor); });
}

// total += a, or a itself where there is none yet.
void accumulate(bool is_first, const float* a, int64_t n, float* total) {
  if (is_first) return static_cast<void>(std::copy(a, a + n, total));
  for_vectors(
      n, [&](int64_t c, auto read, auto write) VELM_INLINE_LAMBDA { write(total + c, read(total + c) + read(a + c)); });
}

// Where results of a row go: to their place if that is float32, else into `memory`, from where finish() takes them.
struct Result {
  ScalarType type;
  void* place;
  float* values;

  Result(ScalarType type, void* place, float* memory)
      : type(type), place(place), values(type == ScalarType::Float ? static_cast<float*>(place) : memory) {}
  void finish(int64_t n) const {
    if (values != place) from_floats(type, place, values, n);
  }
};

// to[o, i] = the sum over k of parts[o, k, i], in order; parts[o, k] are `stride` apart.
void add_parts(const float* parts, int64_t outer, int64_t count, int64_t inner, int64_t stride, const Lines& to) {
  constexpr int64_t kBlock = 64;
  const int64_t blocks = divide_up(inner, kBlock);
  parallel_ranges(outer * blocks, grain(kBlock * count), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t o = item / blocks, first = item % blocks * kBlock, width = std::min(kBlock, inner - first);
      double sums[kBlock] = {};
      for (int64_t k = 0; k < count; ++k) {
        const float* part = parts + (o * count + k) * stride + first;
        for (int64_t i = 0; i < width; ++i) sums[i] += part[i];
      }
      float rounded[kBlock];
      for (int64_t i = 0; i < width; ++i) rounded[i] = static_cast<float>(sums[i]);
      from_floats(to.type, to.at(o, first), rounded, width);
    }
  });
}

}  // namespace
}  // namespace velm
