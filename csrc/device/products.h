// Products of tiles in shared memory by one warp: 16 rows of results, as matrix instructions lay them out. Of tile j of
// 8 columns, a lane holds [0] and [1] in row lane / 4, [2] and [3] in row lane / 4 + 8, columns 2 * (lane % 4) and the
// next.
//
// float32 takes three products of tf32, which has 11 bits: a float is the sum of two of them and a rest of 2^-22 of it,
// and the product of the two small ones is left out. Tensor cores cut off what they add to an accumulator instead of
// rounding it (csrc/device_on_host/tensor_core.h says how), always towards zero: over 4096 products in one accumulator
// that costs 4e-5 of the result, where float32 has 1e-7. So the sum of every step is added to the accumulator by
// ordinary instructions, four for three products (H. Ootomo and R. Yokota, "Recovering single precision accuracy from
// Tensor Cores while surpassing the FP32 theoretical peak performance", IJHPCA 2022). 16-bit products accumulate where
// they are computed: what is cut off is far below the rounding of their operands and results.
#pragma once

#include "device/matrix.h"
#include "device/tiles.h"

namespace velm::device {

// A fragment of floats as two of tf32.
template <int kCount>
struct Split {
  uint32_t high[kCount], low[kCount];

  DEVICE_INLINE void set(int i, float x) {
    high[i] = to_tf32(x);
    low[i] = to_tf32(x - __uint_as_float(high[i]));
  }
};

DEVICE_INLINE void multiply_split(float (&d)[4], const Split<4>& a, const Split<2>& b) {
  float sum[4] = {};
  mma_m16n8k8_tf32(sum, a.low, b.high);
  mma_m16n8k8_tf32(sum, a.high, b.low);
  // Of an infinity the small parts make NaN, which is not what the whole makes.
#pragma unroll
  for (float& x : sum) x = fabsf(x) < kInfinity ? x : 0.0f;
  mma_m16n8k8_tf32(sum, a.high, b.high);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

template <class T>
DEVICE_INLINE uint32_t pack(float low, float high) {
  union {
    Vector<T, 2> pair;
    uint32_t word;
  } u;
  u.pair[0] = from_float<T>(low);
  u.pair[1] = from_float<T>(high);
  return u.word;
}

// d += a b^T, a the 16 rows of a tile from `first_row` on, b a whole tile, both with `dim` columns.
template <class T, int kDim, int kTiles>
DEVICE_INLINE void multiply_transposed(float (&d)[kTiles][4], const Shared<T>& a, int first_row, const Shared<T>& b,
                                       int dim) {
  static_assert(kTiles % 2 == 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row_a = first_row + lane % 16, row_b = lane % 8 + lane / 16 * 8;
  const int column_a = lane / 16, column_b = lane / 8 % 2;
  const auto pa = pointer_cast<__half>(a + row_a * kDim), pb = pointer_cast<__half>(b + row_b * kDim);
  constexpr int kHalves = static_cast<int>(sizeof(T)) / 2;
  const int steps = (dim + kGranule<T> - 1) / kGranule<T> * 2;
  for (int step = 0; step < steps; step += 2) {
#pragma unroll
    for (int k = step; k < step + 2; ++k) {
      uint32_t fa[4];
      ldmatrix<4>(fa, pa + ((2 * k + column_a) ^ swap_of(row_a)) * 8);
      [[maybe_unused]] Split<4> sa;
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sa.set(i, __uint_as_float(fa[i]));
      }
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t fb[4];
        ldmatrix<4>(fb, pb + (j * 8 * kDim * kHalves + ((2 * k + column_b) ^ swap_of(row_b)) * 8));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (sizeof(T) == 4) {
            Split<2> sb;
            sb.set(0, __uint_as_float(fb[2 * i]));
            sb.set(1, __uint_as_float(fb[2 * i + 1]));
            multiply_split(d[j + i], sa, sb);
          } else {
            const uint32_t one[2] = {fb[2 * i], fb[2 * i + 1]};
            mma_m16n8k16<T>(d[j + i], fa, one);
          }
        }
      }
    }
  }
}

// d += a b, a in registers as the products above leave it, b a whole tile of `dim` columns. kGuarded: the rows of b
// whose bit of `seen` is not set (2 j + i for row 8 j + 2 * (lane % 4) + i) count as zeros, NaN included.
template <class T, int kDim, int kTiles, bool kGuarded>
DEVICE_INLINE void multiply(float (&d)[kDim / 8][4], const float (&a)[kTiles][4], const Shared<T>& b, int dim,
                            unsigned seen) {
  static_assert(kTiles % 2 == 0 && kTiles <= 16);
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  constexpr int kGranuleTiles = kGranule<T> / 8;
  if constexpr (sizeof(T) == 4) {
    // The columns of a may be taken in any order: 2 * member as column member, the next as column member + 4.
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      Split<4> sa;
      sa.set(0, a[k][0]);
      sa.set(1, a[k][2]);
      sa.set(2, a[k][1]);
      sa.set(3, a[k][3]);
      const int row = 8 * k + 2 * member;
#pragma unroll
      for (int granule = 0; granule < kDim / kGranule<T>; ++granule) {
        if (granule * kGranule<T> >= dim) break;
#pragma unroll
        for (int j = granule * kGranuleTiles; j < (granule + 1) * kGranuleTiles; ++j) {
          // Apart what chunks are exchanged within and what is the same for all lanes: few addresses, many offsets.
          const int column = j % 4 * 8 + group, rest = j / 4 * 32;
          Split<2> sb;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float x = b[(row + i) * kDim + (column ^ (swap_of(row + i) * kChunk<T>)) + rest];
            sb.set(i, !kGuarded || (seen >> (2 * k + i) & 1) ? x : 0.0f);
          }
          multiply_split(d[j], sa, sb);
        }
      }
    }
  } else {
    uint32_t fa[kTiles / 2][4];
    [[maybe_unused]] uint32_t keep[kTiles];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      fa[k / 2][k % 2 * 2] = pack<T>(a[k][0], a[k][1]);
      fa[k / 2][k % 2 * 2 + 1] = pack<T>(a[k][2], a[k][3]);
      if constexpr (kGuarded)
        keep[k] = (seen >> (2 * k) & 1 ? 0xffffu : 0u) | (seen >> (2 * k + 1) & 1 ? 0xffff0000u : 0u);
    }
    const int row = lane % 16;
    const Shared<T> pb = b + row * kDim;
#pragma unroll
    for (int granule = 0; granule < kDim / kGranule<T>; ++granule) {
      if (granule * kGranule<T> >= dim) break;
#pragma unroll
      for (int j = granule * kGranuleTiles; j < (granule + 1) * kGranuleTiles; j += 2)
#pragma unroll
        for (int k = 0; k < kTiles; k += 2) {
          uint32_t fb[4];
          ldmatrix_transposed<4>(
              fb, pb + (8 * k * kDim + ((j % 8 + lane / 16) ^ swap_of(row)) * kChunk<T> + j / 8 * 8 * kChunk<T>));
          if constexpr (kGuarded) {
            fb[0] &= keep[k];
            fb[1] &= keep[k + 1];
            fb[2] &= keep[k];
            fb[3] &= keep[k + 1];
          }
          const uint32_t first[2] = {fb[0], fb[1]}, second[2] = {fb[2], fb[3]};
          mma_m16n8k16<T>(d[j], fa[k / 2], first);
          mma_m16n8k16<T>(d[j + 1], fa[k / 2], second);
        }
    }
  }
}

}  // namespace velm::device
