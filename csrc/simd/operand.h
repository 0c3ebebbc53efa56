// The words that a matrix product reads its operands in: fp32 numbers, or pairs of bfloat16 that are two consecutive
// steps of the depth, for the instruction that multiplies such pairs and adds both products to an fp32 number.
#pragma once

#include "transpose.h"

#if defined(__AVX512BF16__) || defined(VELM_EMULATE_BF16_DOT)
#define VELM_BF16_DOT 1
#endif

namespace velm::simd {

VELM_INLINE Vec load_words(const float* p) {
  return load(p);
}
VELM_INLINE VecUint load_words(const uint32_t* p) {
  return VecUint(p, stdx::element_aligned);
}
VELM_INLINE Vec broadcast_word(const float* p) {
  return Vec(*p);
}
VELM_INLINE VecUint broadcast_word(const uint32_t* p) {
  return VecUint(*p);
}
VELM_INLINE void store_words(float* p, Vec x) {
  store(p, x);
}
VELM_INLINE void store_words(uint32_t* p, VecUint x) {
  x.copy_to(p, stdx::element_aligned);
}
VELM_INLINE void transpose(VecUint (&rows)[kLanes]) {
  Vec same[kLanes];
  unroll<kLanes>([&](auto i) VELM_INLINE_LAMBDA { same[i] = float_of(rows[i]); });
  transpose(same);
  unroll<kLanes>([&](auto i) VELM_INLINE_LAMBDA { rows[i] = bits_of(same[i]); });
}

// acc + a * b.
VELM_INLINE Vec dot_words(Vec acc, Vec a, Vec b) {
  return fma(a, b, acc);
}

struct Words32 {
  using Word = float;
  using Words = Vec;
  static constexpr int kDepth = 1;  // steps of depth in a word

  // The words of kLanes * kDepth elements that lie one after another, or of n of them and zeros.
  template <class T>
  static VELM_INLINE Words neighbours(const T* p) {
    return load(p);
  }
  template <class T>
  static VELM_INLINE Words neighbours(const T* p, int n) {
    return load_first(p, n);
  }
  // The words of kDepth steps that lie in as many vectors.
  static VELM_INLINE Words together(const Vec (&steps)[kDepth]) { return steps[0]; }
  static float element(Word word, int) { return word; }
};

#if defined(VELM_BF16_DOT)
// acc + high * high + low * low over the two bfloat16 of every lane, rounded after each addition; subnormal numbers
// count as zero.
VELM_INLINE Vec dot_words(Vec acc, VecUint a, VecUint b) {
#if defined(VELM_EMULATE_BF16_DOT)
  // One statement to the compiler, like the instruction in its place: as intrinsics it takes half as long again to
  // compile.
  static constexpr uint32_t kHigh = 0xffff0000u;
  __m512 sum = static_cast<__m512>(acc);
  __m512i of_a, of_b;
  asm("vpandd %[high]%{1to16%}, %[a], %[of_a]\n\t"
      "vpandd %[high]%{1to16%}, %[b], %[of_b]\n\t"
      "vfmadd231ps %[of_a], %[of_b], %[sum]\n\t"
      "vpslld $16, %[a], %[of_a]\n\t"
      "vpslld $16, %[b], %[of_b]\n\t"
      "vfmadd231ps %[of_a], %[of_b], %[sum]"
      : [sum] "+v"(sum), [of_a] "=&v"(of_a), [of_b] "=&v"(of_b)
      : [a] "v"(static_cast<__m512i>(a)), [b] "v"(static_cast<__m512i>(b)), [high] "m"(kHigh));
  return Vec(sum);
#else
  return Vec(_mm512_dpbf16_ps(static_cast<__m512>(acc), reinterpret_cast<__m512bh>(static_cast<__m512i>(a)),
                              reinterpret_cast<__m512bh>(static_cast<__m512i>(b))));
#endif
}

// Two vectors as bfloat16, one behind the other. Unlike store, the instruction takes subnormal numbers for zero, as
// the product does.
VELM_INLINE VecUint round_both(Vec first, Vec second) {
#if defined(VELM_EMULATE_BF16_DOT)
  alignas(64) bf16 halves[2 * kLanes];
  store(halves, first);
  store(halves + kLanes, second);
  return std::bit_cast<VecUint>(_mm512_load_si512(halves));
#else
  return std::bit_cast<VecUint>(_mm512_cvtne2ps_pbh(static_cast<__m512>(second), static_cast<__m512>(first)));
#endif
}

struct Pairs16 {
  using Word = uint32_t;
  using Words = VecUint;
  static constexpr int kDepth = 2;

  static VELM_INLINE Words neighbours(const bf16* p) { return std::bit_cast<VecUint>(_mm512_loadu_si512(p)); }
  static VELM_INLINE Words neighbours(const bf16* p, int n) {
    return std::bit_cast<VecUint>(
        _mm512_maskz_loadu_epi16(static_cast<__mmask32>(n >= 2 * kLanes ? ~0u : (1u << n) - 1u), p));
  }
  static VELM_INLINE Words neighbours(Vec first, Vec second) { return round_both(first, second); }
  template <class T>
  static VELM_INLINE Words neighbours(const T* p) {
    return round_both(load(p), load(p + kLanes));
  }
  template <class T>
  static VELM_INLINE Words neighbours(const T* p, int n) {
    if (n <= kLanes) return round_both(load_first(p, n), zero());
    return round_both(load(p), load_first(p + kLanes, n - kLanes));
  }
  static VELM_INLINE Words together(const Vec (&steps)[kDepth]) {
#if defined(VELM_EMULATE_BF16_DOT)
    return round_to_bf16_bits(steps[0]) | (round_to_bf16_bits(steps[1]) << 16);
#else
    const VecUint order([](auto i) { return static_cast<uint32_t>(i | (i + kLanes) << 16); });
    return std::bit_cast<VecUint>(
        _mm512_permutexvar_epi16(static_cast<__m512i>(order), static_cast<__m512i>(round_both(steps[0], steps[1]))));
#endif
  }
  static float element(Word word, int step) {
    return std::bit_cast<float>(step == 0 ? word << 16 : word & 0xffff0000u);
  }
};
#endif

namespace detail {
template <class Word>
struct FormatOf {
  using Type = Words32;
};
#if defined(VELM_BF16_DOT)
template <>
struct FormatOf<uint32_t> {
  using Type = Pairs16;
};
#endif
}  // namespace detail

// The format whose words are of this type.
template <class Word>
using FormatOf = typename detail::FormatOf<Word>::Type;

}  // namespace velm::simd
