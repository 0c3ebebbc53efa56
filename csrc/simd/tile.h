// The register-tiled matrix micro-kernel: C[r][v] += sum over k of A[r, k] * B[k, v], where A is
// read one scalar at a time and broadcast, B one vector at a time, and C stays in registers.
#pragma once

#include "vec.h"

namespace velm::simd {

// Rows that fit beside `vectors` columns of accumulators without spilling: the accumulators, one
// register a column of B and one for the broadcast. More than 8 accumulators are needed to keep
// two multiply-add units of four cycles' latency busy.
template <int V>
inline constexpr int kTileRows = kRegisters == 32 ? (V == 1   ? 12
                                                     : V == 2 ? 12
                                                     : V == 3 ? 8
                                                              : 6)
                                                  : (V == 1   ? 8
                                                     : V == 2 ? 6
                                                     : V == 3 ? 4
                                                              : 3);

template <int R, int V>
struct Tile {
  Vec c[R][V];

  VELM_INLINE void clear() {
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA { unroll<V>([&](auto v) VELM_INLINE_LAMBDA { c[r][v] = zero(); }); });
  }
  VELM_INLINE void load(const float* p, int64_t row_stride) {
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      unroll<V>([&](auto v) VELM_INLINE_LAMBDA { c[r][v] = simd::load(p + r * row_stride + v * kLanes); });
    });
  }
  VELM_INLINE void store(float* p, int64_t row_stride) const {
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      unroll<V>([&](auto v) VELM_INLINE_LAMBDA { simd::store(p + r * row_stride + v * kLanes, c[r][v]); });
    });
  }
  // Multiplies every column of lanes by its own factor.
  VELM_INLINE void scale(const Vec (&factor)[V]) {
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA { unroll<V>([&](auto v) VELM_INLINE_LAMBDA { c[r][v] *= factor[v]; }); });
  }

  // a_row and a_depth are strides of A in elements, b_depth that of B. Pass a literal 1 for the
  // stride that is 1, so that it becomes part of the address.
  VELM_INLINE void multiply_add(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                                int64_t b_depth) {
    int64_t k = 0;
    for (; k + 2 <= depth; k += 2) {
      step(a, a_row, b);
      step(a + a_depth, a_row, b + b_depth);
      a += 2 * a_depth;
      b += 2 * b_depth;
    }
    if (k < depth) step(a, a_row, b);
  }

  // The same on pairs of bfloat16: a word of A is a pair (k, k + 1) of one row, a lane of B the
  // pair (k, k + 1) of one column, `pairs` half the depth; strides are in words.
  VELM_INLINE void multiply_add_pairs(int64_t pairs, const uint32_t* a, int64_t a_row, int64_t a_depth,
                                      const uint32_t* b, int64_t b_depth);

 private:
  VELM_INLINE void step(const float* a, int64_t a_row, const float* b) {
    Vec columns[V];
    unroll<V>([&](auto v) VELM_INLINE_LAMBDA { columns[v] = simd::load(b + v * kLanes); });
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      const Vec x(a[r * a_row]);
      unroll<V>([&](auto v) VELM_INLINE_LAMBDA { c[r][v] = fma(x, columns[v], c[r][v]); });
    });
  }
};

#if defined(__AVX512BF16__) || defined(VELM_EMULATE_BF16_DOT)
#define VELM_BF16_DOT 1

// acc + low * low + high * high over the two bfloat16 of every lane.
VELM_INLINE Vec dot_pairs(Vec acc, VecUint a, VecUint b) {
#if defined(VELM_EMULATE_BF16_DOT)
  const VecUint high = 0xffff0000u;
  acc = fma(float_of(a & high), float_of(b & high), acc);
  return fma(float_of(a << 16), float_of(b << 16), acc);
#else
  return Vec(_mm512_dpbf16_ps(static_cast<__m512>(acc), reinterpret_cast<__m512bh>(static_cast<__m512i>(a)),
                              reinterpret_cast<__m512bh>(static_cast<__m512i>(b))));
#endif
}

// Words holding bfloat16(low) and bfloat16(high).
VELM_INLINE VecUint pack_pairs(Vec low, Vec high) {
  return round_to_bf16_bits(low) | (round_to_bf16_bits(high) << 16);
}

template <int R, int V>
VELM_INLINE void Tile<R, V>::multiply_add_pairs(int64_t pairs, const uint32_t* a, int64_t a_row, int64_t a_depth,
                                                const uint32_t* b, int64_t b_depth) {
  for (int64_t k = 0; k < pairs; ++k) {
    VecUint columns[V];
    unroll<V>([&](auto v) VELM_INLINE_LAMBDA { columns[v] = VecUint(b + v * kLanes, stdx::element_aligned); });
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      const VecUint x(a[r * a_row]);
      unroll<V>([&](auto v) VELM_INLINE_LAMBDA { c[r][v] = dot_pairs(c[r][v], x, columns[v]); });
    });
    a += a_depth;
    b += b_depth;
  }
}
#endif

}  // namespace velm::simd
