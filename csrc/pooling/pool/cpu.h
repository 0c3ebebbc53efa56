// Pooling over tokens: modes, and powers.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "pooling/tokens_cpu.h"
#include "simd/math.h"

namespace velm::pooling {

enum Mode : int64_t { kMean, kSum, kMax, kLogSumExp, kGem };

constexpr float kGemEps = 1e-6f;
// x^p for x >= 0, to about |p| units in the last place: the whole and the fractional part of log2(x) apart, so that a
// large logarithm does not cost the digits of the power. Not inlined: it is long, and slow whatever is around it.
[[gnu::noinline]] inline Vec power(Vec x, float p) {
  using namespace simd;
  const VecInt bits = std::bit_cast<VecInt>(x);
  const VecInt exponent = (bits - 0x3f3504f3) >> 23;
  const Vec m = std::bit_cast<Vec>(bits - (exponent << 23));
  const Vec whole = stdx::static_simd_cast<Vec>(exponent);
  const Vec fraction = simd::log(m) * 1.442695040888963f;
  const Vec high = whole * p;
  const Vec low = fma(whole, Vec(p), -high);
  const Vec limited = detail::clamp_keep_nan(high, -2000.0f, 2000.0f);
  const Vec n = detail::round_nearest(limited);
  const Vec r = fma(fraction, Vec(p), (limited - n) + low);
  // Of |r| <= 1/2 + |p| / 2, the whole part again.
  const Vec more = detail::round_nearest(detail::clamp_keep_nan(r, -2000.0f, 2000.0f));
  const Vec result = detail::scale_by_power(exp2_in_range(detail::clamp_keep_nan(r - more, -1.0f, 1.0f)),
                                            detail::clamp_keep_nan(n + more, -250.0f, 250.0f));
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Vec at_zero = p > 0 ? zero() : Vec(kInfinity), at_infinity = p > 0 ? Vec(kInfinity) : zero();
  const Vec below_infinity = select(x > zero(), result, at_zero);
  return select(x < Vec(kInfinity), below_infinity, select(x == x, at_infinity, x));
}

// x^p for x >= 0; most pool with the third power.
VELM_INLINE Vec power_or_cube(Vec x, float p, float cube) {
  return p == cube ? x * x * x : power(x, p);
}

}  // namespace velm::pooling
