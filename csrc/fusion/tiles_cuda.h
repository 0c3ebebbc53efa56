// What the kernels of bilinear, bilinear_attention and low_rank_fusion share.
#pragma once

#include "device/products.h"
#include "device/view.h"

namespace velm::cuda {

using namespace device;

// Rows and columns of the results of a block.
constexpr int kTile = 64;
// What is summed over at a time: 128 bytes of a row.
template <class T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));
// The same of a matrix instruction.
template <class T>
constexpr int kProduct = sizeof(T) == 4 ? 8 : 16;
// Blocks that a launch should have.
constexpr int64_t kBlocks = 256;

// Sums in float32 that others are to be added to, or results.
template <class T>
struct Sink {
  Global<float> partials;
  Global<T> results;

  DEVICE_INLINE explicit operator bool() const { return partials || results; }
  DEVICE_INLINE void put(int64_t at, float value) const {
    if (partials)
      partials[at] = value;
    else
      results[at] = from_float<T>(value);
  }
};

// Words of two 16-bit elements, or floats, multiplied element by element.
template <class T>
DEVICE_INLINE uint32_t multiply_words(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(__uint_as_float(a) * __uint_as_float(b));
  } else {
#if defined(__CUDACC__)
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    union {
      uint32_t word;
      Pair pair;
    } u{a}, v{b};
    u.pair = __hmul2(u.pair, v.pair);
    return u.word;
#else
    union {
      uint32_t word;
      T pair[2];
    } u{a}, v{b};
    for (int i = 0; i < 2; ++i) u.pair[i] = __hmul(u.pair[i], v.pair[i]);
    return u.word;
#endif
  }
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// What a lane has of one side of a matrix instruction: words of two 16-bit elements, or floats.
template <class T, int kCount>
struct Operand {
  uint32_t words[kCount];

  DEVICE_INLINE void set(int i, uint32_t word) { words[i] = word; }
};
template <int kCount>
struct Operand<float, kCount> : Split<kCount> {
  DEVICE_INLINE void set(int i, uint32_t word) { Split<kCount>::set(i, __uint_as_float(word)); }
};

// d += a b
template <class T>
DEVICE_INLINE void multiply_operands(float (&d)[4], const Operand<T, 4>& a, const Operand<T, 2>& b) {
  if constexpr (sizeof(T) == 4)
    multiply_split(d, a, b);
  else
    mma_m16n8k16<T>(d, a.words, b.words);
}

// What product k of 16 rows takes from a tile of kDepth columns.
template <class T>
DEVICE_INLINE void load_rows(Operand<T, 4>& a, const Shared<T>& tile, int first_row, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = first_row + lane % 16;
  uint32_t words[4];
  ldmatrix<4>(words, pointer_cast<__half>(tile + row * kDepth<T>) + ((2 * k + lane / 16) ^ swap_of(row)) * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) a.set(i, words[i]);
}

// What product k of 8 or 16 columns of the results (kWords 2 or 4) takes from a tile that has these columns side by
// side. In 16 bits of 16.
template <class T, int kWords>
DEVICE_INLINE void load_columns(uint32_t (&b)[kWords], const Shared<T>& tile, int column, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(kWords == 4);
    const int row = 16 * k + lane % 16;
    ldmatrix_transposed<4>(b, tile + (row * kTile + ((column / 8 + lane / 16) ^ swap_of(row)) * kChunk<T>));
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int row = 8 * k + lane % 4 + 4 * (i % 2);
      const float value = tile[row * kTile + ((column + i / 2 * 8 + lane / 4) ^ (swap_of(row) * kChunk<T>))];
      b[i] = __float_as_uint(value);
    }
  }
}

}  // namespace velm::cuda
