// Sizes of packed matrices.
#pragma once

#include <cstdint>

namespace velm::simd {

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

// Row length of a packed fp32 matrix: whole vectors, and an odd number of cache lines, so that rows read side by side
// fall into different sets of the cache.
constexpr int64_t padded(int64_t columns) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(float));
  return (divide_up(columns, kLine) | 1) * kLine;
}

}  // namespace velm::simd
