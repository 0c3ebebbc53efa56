// How tensor cores add: the arithmetic of mma.sync with sums in float.
//
// M. Fasi, N. Higham, M. Mikaitis and S. Pranesh, "Numerical behavior of NVIDIA tensor cores" (PeerJ Computer Science
// 7:e330, 2021) measured it, and X. Li et al., "FTTN: Feature-Targeted Testing for Numerical Properties" (CCGrid 2024)
// and F. Khattak and M. Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (arXiv 2512.07004) went on with later
// devices. Products are exact. They and the accumulator are shifted to the largest exponent among them, where bits
// beyond the last are cut off, are added without being normalised in between, and the sum is cut off to a float:
// nothing is rounded to nearest. An instruction does that for a few products at a time, one block of them after the
// other.
//
// Blocks and bits here are those of an A100 (sm_80): 8 products of 16 bits or 4 of tf32, one bit more than a float has.
// Later devices (sm_86, sm_89 alike; sm_90 and later with larger blocks and two bits) cut off less often and less.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace device_on_host {

constexpr int kExtraBits = 1, kBlock16 = 8, kBlockTf32 = 4;

// c + sum of a[k] b[k], k < count, by the definition.
inline float add_block(float c, const float* a, const float* b, int count) {
  double sum = c, products[16];
  int highest = c == 0.0f || !std::isfinite(c) ? INT32_MIN : std::ilogb(c);
  for (int k = 0; k < count; ++k) {
    products[k] = double{a[k]} * b[k];
    sum += products[k];
    // The product of two significands is less than 4: its exponent is not made the larger by that.
    if (products[k] != 0.0 && std::isfinite(products[k])) {
      const int exponent = std::ilogb(a[k]) + std::ilogb(b[k]);
      highest = exponent > highest ? exponent : highest;
    }
  }
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  if (highest == INT32_MIN) return 0.0f;
  const int last = highest - 23 - kExtraBits;
  auto units = static_cast<int64_t>(std::ldexp(double{c}, -last));
  for (int k = 0; k < count; ++k) units += static_cast<int64_t>(std::ldexp(products[k], -last));
  // Exact: fewer than 53 bits.
  const double result = std::ldexp(static_cast<double>(units), last);
  const float nearest = static_cast<float>(result);
  // Beyond the largest float there is infinity.
  return std::isfinite(nearest) && std::fabs(double{nearest}) > std::fabs(result) ? std::nextafterf(nearest, 0.0f)
                                                                                  : nearest;
}

// The same of four columns at a time, with integers of 32 bits where exponents are neither very large nor very small.
namespace columns {

constexpr int kWidth = 4;
using Floats = float __attribute__((vector_size(4 * kWidth)));
using Words = int32_t __attribute__((vector_size(4 * kWidth)));

constexpr int32_t power(int exponent) {
  return (exponent + 127) << 23;
}

// c += a b for `count` rows of b, which are `stride` apart.
inline void add_block(float* c, const float* a, const float* b, int stride, int count) {
  constexpr int32_t kExponent = 0x7f800000, kMagnitude = 0x7fffffff;
  constexpr int kLast = 23 + kExtraBits;
  Floats start, products[16], sum = {};
  std::memcpy(&start, c, sizeof(start));
  Words all = std::bit_cast<Words>(start) & kMagnitude;
  // Powers of two, of which the larger is the one with the larger bits.
  Words highest = all & kExponent;
  for (int k = 0; k < count; ++k) {
    Floats row;
    std::memcpy(&row, b + k * stride, sizeof(row));
    const float of_a = std::bit_cast<float>(std::bit_cast<int32_t>(a[k]) & kExponent);
    const auto exponent = std::bit_cast<Words>(std::bit_cast<Floats>(std::bit_cast<Words>(row) & kExponent) * of_a);
    highest = exponent > highest ? exponent : highest;
    products[k] = row * a[k];
    sum += products[k];
    all |= std::bit_cast<Words>(products[k]) & kMagnitude;
  }
  const auto size = std::bit_cast<Words>(sum) & kMagnitude;
  const Words is_odd = (highest > power(90)) | (size > power(90)) | ((highest < power(-60)) & (all != 0));
  if (is_odd[0] | is_odd[1] | is_odd[2] | is_odd[3]) {
    for (int i = 0; i < kWidth; ++i) {
      float of_column[16];
      for (int k = 0; k < count; ++k) of_column[k] = b[k * stride + i];
      c[i] = device_on_host::add_block(c[i], a, of_column, count);
    }
    return;
  }
  highest = highest < power(-60) ? Words{} + power(0) : highest;
  const auto to_units = std::bit_cast<Floats>(power(kLast) - (highest - power(0)));
  Words units = __builtin_convertvector(start * to_units, Words);
  for (int k = 0; k < count; ++k) units += __builtin_convertvector(products[k] * to_units, Words);
  Floats result = __builtin_convertvector(units, Floats);
  const Words back = __builtin_convertvector(result, Words);
  // -1 where rounding to nearest went away from zero, which is one unit in the last place too many.
  const Words is_more = (back < 0 ? -back : back) > (units < 0 ? -units : units);
  result = std::bit_cast<Floats>(std::bit_cast<Words>(result) + is_more);
  result *= std::bit_cast<Floats>(highest - (kLast << 23));
  std::memcpy(c, &result, sizeof(result));
}

}  // namespace columns

}  // namespace device_on_host
