// Products of small matrices that sit in cache, made of register tiles.
#pragma once

#include "tile.h"

namespace velm::simd {

// What becomes of the values already in C, and whether lanes have a factor: for these values, or for the product.
enum class Start { zero, add, scale, zero_scale_product };

namespace detail {

template <int R, int V, bool RowUnit, Start S, class Word>
VELM_INLINE void product_rows(int64_t& done, int64_t rows, float* c, int64_t ldc, const Word* a, int64_t a_stride,
                              int64_t depth, const Word* b, int64_t ldb, const Vec (&factor)[V]) {
  for (; rows - done >= R; done += R) {
    Tile<R, V> tile;
    float* to = c + done * ldc;
    tile.clear();
    if constexpr (RowUnit) {
      tile.multiply_add(depth, a + done, 1, a_stride, b, ldb);
    } else {
      tile.multiply_add(depth, a + done * a_stride, a_stride, 1, b, ldb);
    }
    // A product is summed on its own and then added: one running sum over all of them would lose bits.
    if constexpr (S == Start::add) tile.add(to, ldc);
    if constexpr (S == Start::scale) tile.add_scaled(to, ldc, factor);
    if constexpr (S == Start::zero_scale_product) tile.scale(factor);
    tile.store(to, ldc);
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
inline void product_wide(float* c, int64_t ldc, int64_t rows, int64_t columns, const Word* a, int64_t a_stride,
                         int64_t depth, const Word* b, int64_t ldb, const float* factor = nullptr) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    product<2, RowUnit, S>(c + j, ldc, rows, a, a_stride, depth, b + j, ldb, factor);
  if (j < columns) product<1, RowUnit, S>(c + j, ldc, rows, a, a_stride, depth, b + j, ldb, factor);
}

}  // namespace velm::simd
