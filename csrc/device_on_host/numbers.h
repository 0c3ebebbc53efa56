// The 16-bit floating-point types of CUDA, with its names and the device's rounding: to nearest, ties to even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace device_on_host {

inline float half_to_float(uint16_t bits) {
  // The exponent is put right by a product, which also makes subnormal numbers normal; infinity and NaN come out with
  // too small an exponent and get theirs set.
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, rest = uint32_t{bits & 0x7fffu} << 13;
  const float scaled = std::bit_cast<float>(rest) * 0x1p112f;
  const uint32_t special = rest >= 0x0f800000u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

// Drops that many bits, rounding to nearest, ties to even.
inline uint64_t round_shift(uint64_t mantissa, int drop) {
  if (drop <= 0) return mantissa << -drop;
  if (drop > 63) return 0;
  const uint64_t kept = mantissa >> drop, lost = mantissa & ((uint64_t{1} << drop) - 1),
                 half = uint64_t{1} << (drop - 1);
  return kept + (lost > half || (lost == half && (kept & 1)));
}

// The nearest number with `mantissa_bits` (without the leading one) and exponents from `min_exponent`. From a double,
// which holds every float and every product of two 16-bit numbers exactly: one rounding.
inline uint16_t round_16(double value, int mantissa_bits, int min_exponent, uint16_t infinity) {
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 48 & 0x8000u);
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
  // CUDA's conversions give this one NaN.
  if (exponent == 1024) return bits << 12 ? 0x7fff : static_cast<uint16_t>(sign | infinity);
  if (exponent == -1023) return sign;
  const uint64_t mantissa = (bits & 0xfffffffffffffull) | 0x10000000000000ull;
  const int shift = 52 - mantissa_bits + (exponent < min_exponent ? min_exponent - exponent : 0);
  const uint64_t rounded = round_shift(mantissa, shift);
  // The leading one of a normal number counts as one step of the exponent, and so does a carry out of the mantissa.
  const uint64_t biased = exponent < min_exponent ? 0 : static_cast<uint64_t>(exponent - min_exponent);
  const uint64_t result = (biased << mantissa_bits) + rounded;
  return static_cast<uint16_t>(sign | (result >= infinity ? infinity : result));
}

inline uint16_t double_to_half(double x) {
  return round_16(x, 10, -14, 0x7c00);
}
inline uint16_t double_to_bfloat16(double x) {
  return round_16(x, 7, -126, 0x7f80);
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

// a + b with the last bit set where the sum is not exact: rounding that once more, to 16 bits, is as good as rounding
// the exact sum.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double other = sum - a, error = (a - (sum - other)) + (b - other);
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (error == 0 || bits & 1) return sum;
  // The exact sum lies between `sum` and a neighbour; the odd one of the two is taken.
  bits += (error > 0) == (sum > 0) ? 1 : -1;
  return std::bit_cast<double>(bits);
}

// Rounds as cvt.rna.tf32.f32: to 10 bits of mantissa, ties away from zero; the rest is left 0.
inline uint32_t float_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace device_on_host

struct __half {
  uint16_t bits;

  __half() = default;
  explicit __half(float x) : bits(device_on_host::double_to_half(x)) {}
  operator float() const { return device_on_host::half_to_float(bits); }
};

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : bits(device_on_host::float_to_bfloat16(x)) {}
  operator float() const { return device_on_host::bfloat16_to_float(bits); }
};

using half = __half;
using nv_bfloat16 = __nv_bfloat16;

namespace device_on_host {
inline __half half_of(double x) {
  __half h;
  h.bits = double_to_half(x);
  return h;
}
inline __nv_bfloat16 bfloat16_of(double x) {
  __nv_bfloat16 b;
  b.bits = double_to_bfloat16(x);
  return b;
}
}  // namespace device_on_host

inline __half __float2half(float x) {
  return __half(x);
}
inline __half __float2half_rn(float x) {
  return __half(x);
}
inline float __half2float(__half x) {
  return x;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  return __nv_bfloat16(x);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return __nv_bfloat16(x);
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return x;
}

inline unsigned short __half_as_ushort(__half x) {
  return x.bits;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) {
  return x.bits;
}
inline __half __ushort_as_half(unsigned short bits) {
  return std::bit_cast<__half>(bits);
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return std::bit_cast<__nv_bfloat16>(bits);
}

// Each operation rounds once. A double holds the sum of two halves and every product exactly; sums of bfloat16 and
// fused multiply-adds may need more bits.
inline __half __hadd(__half a, __half b) {
  return device_on_host::half_of(double{float(a)} + float(b));
}
inline __half __hsub(__half a, __half b) {
  return device_on_host::half_of(double{float(a)} - float(b));
}
inline __half __hmul(__half a, __half b) {
  return device_on_host::half_of(double{float(a)} * float(b));
}
inline __half __hfma(__half a, __half b, __half c) {
  return device_on_host::half_of(device_on_host::add_to_odd(double{float(a)} * float(b), float(c)));
}
inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) {
  return device_on_host::bfloat16_of(device_on_host::add_to_odd(float(a), float(b)));
}
inline __nv_bfloat16 __hsub(__nv_bfloat16 a, __nv_bfloat16 b) {
  return device_on_host::bfloat16_of(device_on_host::add_to_odd(float(a), -double{float(b)}));
}
inline __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) {
  return device_on_host::bfloat16_of(double{float(a)} * float(b));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return device_on_host::bfloat16_of(device_on_host::add_to_odd(double{float(a)} * float(b), float(c)));
}

struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {__half(x), __half(y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
