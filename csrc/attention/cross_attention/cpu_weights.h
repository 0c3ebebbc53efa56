// Weights, and gradients of scores, of a tile as operands of the products over its keys and over its queries.
//
// Tiles are fp32 with keys by rows and queries by lanes, [i][V vectors] for the keys from + i of a block. fp32 operands
// are the tile itself.
#pragma once

#include "attention/cross_attention/cpu_panel.h"

namespace velm::attention {

// Words of the depth of a product over the keys [from, to): of `from` on these words begin at from / kDepth.
template <class Format>
int64_t key_words(int64_t from, int64_t to) {
  return words_of<Format>(to) - from / Format::kDepth;
}

// For the right of a product over the keys, [word][V vectors]; zeros stand for the keys that a word holds beside
// [from, to).
template <class Format, int V>
const typename Format::Word* weights_over_keys(typename Format::Word* out, const float* tile, int64_t from,
                                               int64_t to) {
  if constexpr (Format::kDepth == 1) {
    return tile;
  } else {
    const int64_t n = to - from;
    typename Format::Word* word = out;
    for (int64_t j = -(from % Format::kDepth); j < n; j += Format::kDepth) {
      simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
        simd::Vec x[Format::kDepth];
        simd::unroll<Format::kDepth>([&](auto i) VELM_INLINE_LAMBDA {
          const bool there = j + i >= 0 && j + i < n;
          x[i] = there ? simd::load(tile + ((j + i) * V + v) * kLanes) : simd::zero();
        });
        simd::store_words(word, Format::together(x));
        word += kLanes;
      });
    }
    return out;
  }
}

// For the left of a product over the queries: n rows of V * kLanes / kDepth words. `out` has room for a vector more.
template <class Format, int V>
const typename Format::Word* weights_over_queries(typename Format::Word* out, const float* tile, int64_t n) {
  if constexpr (Format::kDepth == 1) {
    return tile;
  } else {
    static_assert(Format::kDepth == 2);
    for (int64_t i = 0; i < n; ++i) {
      const float* row = tile + i * V * kLanes;
      // Of one vector the upper half is overwritten by the row that follows.
      simd::store_words(out + i * V * kLanes / 2,
                        Format::neighbours(simd::load(row), V == 2 ? simd::load(row + kLanes) : simd::zero()));
    }
    return out;
  }
}

}  // namespace velm::attention
