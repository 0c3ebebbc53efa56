// Products of small matrices that sit in cache, made of register tiles.
#pragma once

#include <algorithm>

#include "tile.h"

namespace velm::simd {

// What becomes of the values already in C, and whether lanes have a factor: for these values, or for the product.
enum class Start { zero, add, scale, zero_scale_product };

// Steps of depth that are summed before they join the sum of the earlier ones, in a product that begins at zero. One
// sum over all of a long row rounds each of its terms to the last place of what is by then the largest, and a score of
// 30 that is off by its last place makes a weight that is off by 30 of its own.
inline constexpr int64_t kDepthBlock = 32;

// Words of depth that are summed together. Of 16 bits, whose own rounding is far more, all.
template <class Word>
constexpr int64_t depth_block(int64_t depth) {
  return FormatOf<Word>::kDepth == 1 ? kDepthBlock : depth;
}

namespace detail {

template <int R, int V, bool RowUnit, Start S, class Word>
VELM_INLINE void product_rows(int64_t& done, int64_t rows, float* c, int64_t ldc, const Word* a, int64_t a_stride,
                              int64_t depth, const Word* b, int64_t ldb, const Vec (&factor)[V]) {
  for (; rows - done >= R; done += R) {
    Tile<R, V> tile;
    float* to = c + done * ldc;
    // What is added to C has no more steps than a block of keys, and C would be rounded once more for every part of it.
    constexpr bool kParts = simd::FormatOf<Word>::kDepth == 1 && (S == Start::zero || S == Start::zero_scale_product);
    int64_t k = 0;
    do {
      const int64_t steps = kParts ? std::min(kDepthBlock, depth - k) : depth;
      tile.clear();
      if constexpr (RowUnit) {
        tile.multiply_add(steps, a + done + k * a_stride, 1, a_stride, b + k * ldb, ldb);
      } else {
        tile.multiply_add(steps, a + done * a_stride + k, a_stride, 1, b + k * ldb, ldb);
      }
      if (kParts && k > 0) tile.add(to, ldc);
      k += steps;
      // A product is summed on its own and then added: one running sum over all of them would lose bits.
      if constexpr (S == Start::add) tile.add(to, ldc);
      if constexpr (S == Start::scale) tile.add_scaled(to, ldc, factor);
      if constexpr (S == Start::zero_scale_product) {
        if (k == depth) tile.scale(factor);
      }
      tile.store(to, ldc);
    } while (k < depth);
  }
  if constexpr (R > 1) {
    constexpr int kNext = R > 8 ? 8 : R > 4 ? 4 : R > 2 ? 2 : 1;
    product_rows<kNext, V, RowUnit, S>(done, rows, c, ldc, a, a_stride, depth, b, ldb, factor);
  }
}

}  // namespace detail

// C[rows][V vectors] = (nothing | C | C * factor of its lane) + A * B with B[depth][V vectors], or A * B * factor.
// RowUnit says which stride of A is 1: A[r, k] = a[r + k * a_stride] or a[r * a_stride + k]. Depth and strides of A and
// B are in words.
template <int V, bool RowUnit, Start S, class Word>
inline void product(float* c, int64_t ldc, int64_t rows, const Word* a, int64_t a_stride, int64_t depth, const Word* b,
                    int64_t ldb, const float* factor = nullptr) {
  constexpr bool kFactor = S == Start::scale || S == Start::zero_scale_product;
  Vec f[V];
  unroll<V>([&](auto v) VELM_INLINE_LAMBDA { f[v] = kFactor ? load(factor + v * kLanes) : Vec(1.0f); });
  int64_t done = 0;
  detail::product_rows<kTileRows<V>, V, RowUnit, S>(done, rows, c, ldc, a, a_stride, depth, b, ldb, f);
}

// The same for any number of columns, a multiple of kLanes, with one factor for every two vectors of them.
template <bool RowUnit, Start S, class Word>
inline void product_columns(float* c, int64_t ldc, int64_t rows, int64_t columns, const Word* a, int64_t a_stride,
                            int64_t depth, const Word* b, int64_t ldb, const float* factor = nullptr) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    product<2, RowUnit, S>(c + j, ldc, rows, a, a_stride, depth, b + j, ldb, factor);
  if (j < columns) product<1, RowUnit, S>(c + j, ldc, rows, a, a_stride, depth, b + j, ldb, factor);
}

// C = C + A * B, or C * factor of its lane + A * B, with only those terms A[r, k] * B[k][i] for which uses(r, k, i):
// the slow way where what is not used may be infinite or NaN. In the order of `product`, so that what nothing of that
// kind reaches has the same bits. k counts elements, depth and strides of A and B words; one row of A's words is a_row,
// one step of its depth a_depth apart.
template <class Word, class Uses>
void product_of_some(float* c, int64_t ldc, int64_t rows, int64_t columns, const Word* a, int64_t a_row,
                     int64_t a_depth, int64_t depth, const Word* b, int64_t ldb, const float* factor,
                     const Uses& uses) {
  using Format = FormatOf<Word>;
  const auto add_product = [](float x, float y, float sum) {
#if defined(__FMA__)
    return __builtin_fmaf(x, y, sum);
#else
    return x * y + sum;
#endif
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) {
      float sum = 0.0f;
      for (int64_t word = 0; word < depth; ++word) {
        // The higher of a pair is first.
        for (int step = Format::kDepth - 1; step >= 0; --step) {
          if (uses(r, word * Format::kDepth + step, i))
            sum = add_product(Format::element(a[r * a_row + word * a_depth], step),
                              Format::element(b[word * ldb + i], step), sum);
        }
      }
      float& to = c[r * ldc + i];
      to = factor ? add_product(to, factor[i], sum) : sum + to;
    }
  }
}

}  // namespace velm::simd
