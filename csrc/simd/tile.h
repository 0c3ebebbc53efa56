// The register-tiled matrix micro-kernel: C[r][v] += sum over k of A[r, k] * B[k, v], where A is
// read one word at a time and broadcast, B one vector at a time, and C stays in registers.
#pragma once

#include "operand.h"

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
  VELM_INLINE void add(const float* p, int64_t row_stride) {
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      unroll<V>([&](auto v) VELM_INLINE_LAMBDA { c[r][v] += simd::load(p + r * row_stride + v * kLanes); });
    });
  }
  // Adds values of which every column of lanes is multiplied by its own factor.
  VELM_INLINE void add_scaled(const float* p, int64_t row_stride, const Vec (&factor)[V]) {
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
        c[r][v] = fma(simd::load(p + r * row_stride + v * kLanes), factor[v], c[r][v]);
      });
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

  // depth, a_row, a_depth and b_depth count words: a_row and a_depth are strides of A, b_depth that of B. Pass a
  // literal 1 for the stride that is 1, so that it becomes part of the address.
  template <class Word>
  VELM_INLINE void multiply_add(int64_t depth, const Word* a, int64_t a_row, int64_t a_depth, const Word* b,
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

 private:
  template <class Word>
  VELM_INLINE void step(const Word* a, int64_t a_row, const Word* b) {
    typename FormatOf<Word>::Words columns[V];
    unroll<V>([&](auto v) VELM_INLINE_LAMBDA { columns[v] = load_words(b + v * kLanes); });
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      const auto x = broadcast_word(a + r * a_row);
      unroll<V>([&](auto v) VELM_INLINE_LAMBDA { c[r][v] = dot_words(c[r][v], x, columns[v]); });
    });
  }
};

}  // namespace velm::simd
