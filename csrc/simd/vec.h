// The native fp32 vector of the instruction set being compiled, with the loads and stores that
// std::experimental::simd lacks: partial ones, and converting ones for bfloat16 and float16.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <experimental/simd>
#include <utility>

#define VELM_INLINE inline __attribute__((always_inline))
#define VELM_INLINE_LAMBDA __attribute__((always_inline))

namespace velm::simd {

namespace stdx = std::experimental;

using Vec = stdx::native_simd<float>;
using VecInt = stdx::rebind_simd_t<int32_t, Vec>;
using VecUint = stdx::rebind_simd_t<uint32_t, Vec>;
using VecMask = Vec::mask_type;

inline constexpr int kLanes = static_cast<int>(Vec::size());
// Vector registers a kernel may keep accumulators in.
#if defined(__AVX512F__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Calls f(0), f(1), ... f(N-1) with compile-time indices, so that arrays of vectors indexed by
// them live in registers.
template <int N, class F>
VELM_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      VELM_INLINE_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

VELM_INLINE VecUint bits_of(Vec x) {
  return std::bit_cast<VecUint>(x);
}
VELM_INLINE Vec float_of(VecUint x) {
  return std::bit_cast<Vec>(x);
}

VELM_INLINE Vec zero() {
  return Vec(0.0f);
}
VELM_INLINE Vec select(VecMask m, Vec a, Vec b) {
  stdx::where(m, b) = a;
  return b;
}
VELM_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return Vec(_mm512_fmadd_ps(static_cast<__m512>(a), static_cast<__m512>(b), static_cast<__m512>(c)));
#elif defined(__FMA__)
  return Vec(_mm256_fmadd_ps(static_cast<__m256>(a), static_cast<__m256>(b), static_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
// max(a, b), b where a is NaN.
VELM_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return Vec(_mm512_max_ps(static_cast<__m512>(a), static_cast<__m512>(b)));
#elif defined(__AVX2__)
  return Vec(_mm256_max_ps(static_cast<__m256>(a), static_cast<__m256>(b)));
#else
  return Vec(_mm_max_ps(static_cast<__m128>(a), static_cast<__m128>(b)));
#endif
}
VELM_INLINE VecMask mask_of(VecUint::mask_type m) {
  VecUint ones = 0u;
  stdx::where(m, ones) = 0x3f800000u;
  return std::bit_cast<Vec>(ones) != zero();
}
// Lanes 0, 1, 2, ...
VELM_INLINE VecInt lane_index() {
  return VecInt([](auto i) { return static_cast<int32_t>(i); });
}
VELM_INLINE VecMask first_lanes(int n) {
  return VecMask(stdx::static_simd_cast<Vec>(lane_index()) < Vec(static_cast<float>(n)));
}

// scalar conversions

VELM_INLINE float to_float(float x) {
  return x;
}
VELM_INLINE float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

inline float to_float(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity, or NaN made quiet as the hardware does
    const uint32_t mantissa = (magnitude & 0x3ff) << 13;
    return std::bit_cast<float>(sign | 0x7f800000 | mantissa | (mantissa ? 0x400000u : 0u));
  }
  if (magnitude < 0x400) {  // a subnormal is an integer times 2^-24, exact in fp32
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

VELM_INLINE uint32_t round_to_bf16_bits(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 0x40;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

VELM_INLINE void store_scalar(float* p, float x) {
  *p = x;
}
VELM_INLINE void store_scalar(bf16* p, float x) {
  p->bits = static_cast<uint16_t>(round_to_bf16_bits(x));
}

inline void store_scalar(fp16* p, float x) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  uint32_t out;
  if (magnitude > 0x7f800000) {
    out = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x47800000) {
    out = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Adding 0.5 aligns the result's last bit with 2^-24, so the addition itself rounds to even.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    out = std::bit_cast<uint32_t>(shifted) - 0x3f000000;
  } else {
    out = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | out);
#endif
}

template <class T>
VELM_INLINE float round_trip(float x) {
  T t;
  store_scalar(&t, x);
  return to_float(t);
}

// full vectors

VELM_INLINE Vec load(const float* p) {
  return Vec(p, stdx::element_aligned);
}
VELM_INLINE void store(float* p, Vec x) {
  x.copy_to(p, stdx::element_aligned);
}

VELM_INLINE Vec load(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)));
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)));
#else
  const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return Vec(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h)));
#endif
}

// bfloat16 bits, rounded to nearest even, in the low half of every lane. Written out in integers
// because vcvtneps2bf16 flushes subnormal numbers to zero.
VELM_INLINE VecUint round_to_bf16_bits(Vec x) {
  const VecUint u = bits_of(x);
  VecUint r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  stdx::where((u & 0x7fffffffu) > 0x7f800000u, r) = (u >> 16) | 0x40u;
  return r;
}

VELM_INLINE void store(bf16* p, Vec x) {
  const VecUint r = round_to_bf16_bits(x);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(static_cast<__m512i>(r)));
#elif defined(__AVX2__)
  const __m256i v = static_cast<__m256i>(r);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  // SSE2 only packs with signed saturation; sign extended halves pass through it unchanged.
  const __m128i v = _mm_srai_epi32(_mm_slli_epi32(static_cast<__m128i>(r), 16), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(v, v));
#endif
}

VELM_INLINE Vec load(const fp16* p) {
#if defined(__AVX512F__)
  return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return Vec([&](auto i) { return to_float(p[static_cast<size_t>(i)]); });
#endif
}

VELM_INLINE void store(fp16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(static_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(static_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes; ++i) store_scalar(p + i, x[i]);
#endif
}

// the first n lanes, 0 <= n <= kLanes; memory past them is not touched

VELM_INLINE Vec load_first(const float* p, int n) {
#if defined(__AVX512F__)
  return Vec(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
#elif defined(__AVX2__)
  const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return Vec(_mm256_maskload_ps(p, m));
#else
  float t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
#endif
}

VELM_INLINE void store_first(float* p, Vec x, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), static_cast<__m512>(x));
#elif defined(__AVX2__)
  const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_maskstore_ps(p, m, static_cast<__m256>(x));
#else
  for (int i = 0; i < n; ++i) p[i] = x[i];
#endif
}

template <class T>
VELM_INLINE Vec load_first(const T* p, int n) {
  if (n >= kLanes) return load(p);
  T t[kLanes] = {};
  std::memcpy(t, p, sizeof(T) * static_cast<size_t>(n));
  return load(t);
}

template <class T>
VELM_INLINE void store_first(T* p, Vec x, int n) {
  if (n >= kLanes) return store(p, x);
  T t[kLanes];
  store(t, x);
  std::memcpy(p, t, sizeof(T) * static_cast<size_t>(n));
}

// Converts n contiguous elements.
template <class From, class To>
inline void convert(To* out, const From* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_first(out + i, load_first(in + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// sums over lanes, always in the same order

VELM_INLINE float sum_lanes(Vec x) {
#if defined(__AVX512F__)
  const __m512 v = static_cast<__m512>(x);
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
  const __m256 a = static_cast<__m256>(x);
#endif
#if defined(__AVX2__)
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
#else
  const __m128 b = static_cast<__m128>(x);
#endif
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

VELM_INLINE float max_lanes(Vec x) {
  return stdx::hmax(x);
}

}  // namespace velm::simd
