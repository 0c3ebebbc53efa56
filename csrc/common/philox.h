// Philox4x32-10 of J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011), one counter per lane.
#pragma once

#include "simd/vec.h"

namespace velm::simd {

// High and low words of a 32 x 32 bit product.
VELM_INLINE void multiply_high_low(uint32_t constant, VecUint x, VecUint& high, VecUint& low) {
#if defined(__AVX512F__)
  const __m512i a = static_cast<__m512i>(x), c = _mm512_set1_epi32(static_cast<int>(constant));
  const __m512i even = _mm512_mul_epu32(a, c), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), c);
  high = VecUint(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
  low = VecUint(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
#else
  low = x * constant;
  // By halves: no product of two 16 bit numbers and a carry overflows 32 bits.
  const VecUint x0 = x & 0xffffu, x1 = x >> 16;
  const uint32_t c0 = constant & 0xffff, c1 = constant >> 16;
  const VecUint middle = x1 * c0 + ((x0 * c0) >> 16);
  high = x1 * c1 + (middle >> 16) + ((x0 * c1 + (middle & 0xffffu)) >> 16);
#endif
}

// Replaces the counter by four random words.
VELM_INLINE void philox(VecUint (&c)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    VecUint high0, low0, high1, low1;
    multiply_high_low(0xD2511F53u, c[0], high0, low0);
    multiply_high_low(0xCD9E8D57u, c[2], high1, low1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Lanes with word >= threshold, as a mask of floats.
VELM_INLINE VecMask at_least(VecUint word, uint32_t threshold) {
  return mask_of(word >= threshold);
}

}  // namespace velm::simd
