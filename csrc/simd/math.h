// exp, exp2, log and tanh on whole vectors, to about two units in the last place.
// The coefficients are minimax fits of the functions named beside them.
#pragma once

#include <limits>

#include "vec.h"

namespace velm::simd {

template <class... C>
VELM_INLINE Vec polynomial(Vec x, float highest, C... lower) {
  Vec r(highest);
  ((r = fma(r, x, Vec(lower))), ...);
  return r;
}

// min(x, high); keeps NaN, unlike std::min on vectors.
VELM_INLINE Vec least_keep_nan(Vec x, float high) {
#if defined(__AVX512F__)
  return Vec(_mm512_min_ps(_mm512_set1_ps(high), static_cast<__m512>(x)));
#elif defined(__AVX2__)
  return Vec(_mm256_min_ps(_mm256_set1_ps(high), static_cast<__m256>(x)));
#else
  return Vec(_mm_min_ps(_mm_set1_ps(high), static_cast<__m128>(x)));
#endif
}

namespace detail {

// x rounded to an integer, for |x| < 2^22.
VELM_INLINE Vec round_nearest(Vec x) {
#if defined(__AVX512F__)
  return Vec(_mm512_roundscale_ps(static_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return Vec(_mm256_round_ps(static_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return stdx::static_simd_cast<Vec>(VecInt(_mm_cvtps_epi32(static_cast<__m128>(x))));
#endif
}

// x * 2^n for an integral n with |n| <= 252; rounds once into the subnormal range.
VELM_INLINE Vec scale_by_power(Vec x, Vec n) {
#if defined(__AVX512F__)
  return Vec(_mm512_scalef_ps(static_cast<__m512>(x), static_cast<__m512>(n)));
#else
  // Two factors, because 2^n alone may lie outside the normal range.
  const VecInt whole = stdx::static_simd_cast<VecInt>(n);
  const VecInt half = whole >> 1;
  const Vec first = std::bit_cast<Vec>((half + 127) << 23);
  const Vec second = std::bit_cast<Vec>((whole - half + 127) << 23);
  return x * first * second;
#endif
}

// Keeps NaN, unlike std::clamp on vectors.
VELM_INLINE Vec clamp_keep_nan(Vec x, float low, float high) {
#if defined(__AVX512F__)
  return least_keep_nan(Vec(_mm512_max_ps(_mm512_set1_ps(low), static_cast<__m512>(x))), high);
#elif defined(__AVX2__)
  return least_keep_nan(Vec(_mm256_max_ps(_mm256_set1_ps(low), static_cast<__m256>(x))), high);
#else
  return least_keep_nan(Vec(_mm_max_ps(_mm_set1_ps(low), static_cast<__m128>(x))), high);
#endif
}

}  // namespace detail

// What is taken off scores before their exponentials: their largest. Where nothing was seen yet, 0; where a score is
// infinite, the largest finite number, beside which it alone has a weight, infinity, and no weight is NaN that was
// none.
VELM_INLINE Vec base_of(Vec highest) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kLargest = std::numeric_limits<float>::max();
  const Vec base = select(highest == Vec(-kInfinity), zero(), highest);
  return select(highest == Vec(kInfinity), Vec(kLargest), base);
}
inline float base_of(float highest) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kLargest = std::numeric_limits<float>::max();
  return highest == -kInfinity ? 0.0f : highest == kInfinity ? kLargest : highest;
}

// 2^x for |x| <= 200; NaN stays NaN.
VELM_INLINE Vec exp2_in_range(Vec x) {
  const Vec n = detail::round_nearest(x);
  const Vec r = x - n;
  // 2^r - 1 over r, |r| <= 1/2
  const Vec p = polynomial(r, 1.547589636e-04f, 1.340028364e-03f, 9.618005715e-03f, 5.550327897e-02f, 2.402265072e-01f,
                           6.931471825e-01f);
  return detail::scale_by_power(fma(p, r, Vec(1.0f)), n);
}

// 2^x. exp2(-inf) = 0, exp2(inf) = inf, NaN stays NaN.
VELM_INLINE Vec exp2(Vec x) {
  return exp2_in_range(detail::clamp_keep_nan(x, -200.0f, 200.0f));
}

// e^x. exp(-inf) = 0, exp(inf) = inf, NaN stays NaN.
VELM_INLINE Vec exp(Vec x) {
  const Vec clamped = detail::clamp_keep_nan(x, -138.0f, 138.0f);
  const Vec n = detail::round_nearest(clamped * 1.442695040888963f);
  // ln 2 in two parts, the first with trailing zeros so that n * high is exact
  Vec r = fma(n, Vec(-0.693359375f), clamped);
  r = fma(n, Vec(2.12194440e-4f), r);
  // (e^r - 1 - r) / r^2, |r| <= ln(2) / 2
  const Vec p = polynomial(r, 1.395052182e-03f, 8.368908428e-03f, 4.166620597e-02f, 1.666651815e-01f, 5.000000000e-01f);
  return detail::scale_by_power(fma(p, r * r, r) + 1.0f, n);
}

// Natural logarithm. log(0) = -inf, log(x < 0) = NaN, log(inf) = inf.
VELM_INLINE Vec log(Vec x) {
  const VecMask subnormal = x < Vec(0x1p-126f);
  const Vec scaled = select(subnormal, x * 0x1p24f, x);
  const VecInt u = std::bit_cast<VecInt>(scaled);
  // Exponent chosen so that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const VecInt e = (u - 0x3f3504f3) >> 23;
  const Vec m = std::bit_cast<Vec>(u - (e << 23));
  const Vec n = stdx::static_simd_cast<Vec>(e) - select(subnormal, Vec(24.0f), zero());
  const Vec f = m - 1.0f;
  const Vec f2 = f * f;
  // (log(1 + f) - f + f^2 / 2) / f^3
  const Vec p = polynomial(f, 6.746601313e-02f, -1.167564094e-01f, 1.188817471e-01f, -1.240559146e-01f,
                           1.421955079e-01f, -1.666799635e-01f, 2.000211924e-01f, -2.500000894e-01f, 3.333331347e-01f);
  Vec small = fma(n, Vec(-2.12194440e-4f), f2 * f * p);
  small = fma(f2, Vec(-0.5f), small);
  Vec r = fma(n, Vec(0.693359375f), f + small);
  const float inf = std::numeric_limits<float>::infinity();
  r = select(x == Vec(inf), Vec(inf), r);
  r = select(x == zero(), Vec(-inf), r);
  return select(!(x >= zero()), Vec(std::numeric_limits<float>::quiet_NaN()), r);
}

VELM_INLINE Vec tanh(Vec x) {
  const Vec a = stdx::abs(x);
  const Vec z = x * x;
  // (tanh(x) / x - 1) / x^2 as a polynomial in x^2, x^2 <= 0.4
  const Vec p =
      polynomial(z, -5.648307502e-03f, 2.058981732e-02f, -5.372512341e-02f, 1.333127469e-01f, -3.333327472e-01f);
  const Vec near = fma(p * z, x, x);
  const Vec far = stdx::copysign(1.0f - 2.0f / (exp(a + a) + 1.0f), x);
  // NaN compares false and takes the near branch, which keeps it.
  return select(a > Vec(0.625f), far, near);
}

}  // namespace velm::simd
