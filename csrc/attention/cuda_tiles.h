// Tiles in shared memory: rows of kDim elements, in chunks of 16 bytes that are exchanged within a row such that
// neither matrix loads, nor the accesses of single lanes, nor copies meet in a bank.
#pragma once

#include "attention/cuda_arguments.h"
#include "device/async.h"

namespace velm::cuda {

template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
// What is not a whole number of these many columns is filled with zeros: two steps of a matrix product.
template <class T>
constexpr int kGranule = 4 * kChunk<T>;

// Chunk c of a row is at c ^ swap_of(row). Eight neighbouring rows have eight different numbers, so that the same chunk
// of them fills all banks; and of rows 0 to 3, 4 to 7, the even and the odd ones, no two differ in the last bit alone,
// so that the same holds of two neighbouring chunks of four rows.
DEVICE_INLINE int swap_of(int row) {
  return (row & 7) ^ ((row & 1) << 2);
}

// Begins to copy the rows of a tile, zeros where `pointer_to(row)` is null. `width` is that of a copy in bytes: 16, or
// where rows do not begin at multiples of it, 4 or an element. All threads of a block take part; what they copied is
// there after a wait and a barrier.
template <class T, int kDim, int kCount, class F>
DEVICE_INLINE void copy_rows(const Shared<T>& tile, int dim, int width, const F& pointer_to) {
  constexpr int kSize = static_cast<int>(sizeof(T)), kWord = 4 / kSize;
  const int thread = static_cast<int>(threadIdx.x);
  // Behind the rows' ends zeros follow up to here.
  const int filled = (dim + kGranule<T> - 1) / kGranule<T> * kGranule<T>;
  if (width == 4) {
#pragma unroll 4
    for (int i = thread * kWord; i < kCount * kDim; i += kThreads * kWord) {
      const int row = i / kDim, column = i % kDim;
      if (column >= filled) continue;
      const Global<const T> from = pointer_to(row);
      cp_async<4>(tile + (row * kDim + (column ^ (swap_of(row) * kChunk<T>))), from ? from + column : from,
                  from ? min(max(dim - column, 0), kWord) * kSize : 0);
    }
    return;
  }
  constexpr int kChunks = kDim / kChunk<T>, kPass = kThreads / kChunks;
  static_assert(kCount % kPass == 0);
  const int column = thread % kChunks * kChunk<T>;
  if (column >= filled) return;
#pragma unroll 2
  for (int i = 0; i < kCount; i += kPass) {
    const int row = i + thread / kChunks;
    const Global<const T> from = pointer_to(row);
    const int count = from ? min(max(dim - column, 0), kChunk<T>) : 0;
    const auto to = tile + (row * kDim + (column ^ (swap_of(row) * kChunk<T>)));
    if (width == 16) {
      cp_async<16>(to, from ? from + column : from, count * kSize);
    } else if constexpr (kSize == 2) {
      Vector<T, kChunk<T>> chunk;
#pragma unroll
      for (int k = 0; k < kChunk<T>; ++k) chunk[k] = k < count ? T(from[column + k]) : from_float<T>(0.0f);
      store(to, chunk);
    }
  }
}

// The same of `rows` rows that lie one behind the other.
template <class T, int kDim, int kCount>
DEVICE_INLINE void copy_tile(const Shared<T>& tile, const Global<const T>& from, int64_t stride, int rows, int dim,
                             int width) {
  copy_rows<T, kDim, kCount>(tile, dim, width,
                             [&](int row) { return row < rows ? from + row * stride : Global<const T>(nullptr); });
}

// Brings 16 rows of results, as matrix instructions hold them, to where `pointer_to(row)` says, by way of 16 rows of a
// tile that nobody else uses. Null pointers are left out. All lanes of a warp take part.
template <class T, int kDim, class F>
DEVICE_INLINE void store_rows(const Shared<T>& stage, const float (&values)[kDim / 8][4], int dim, int width,
                              const F& pointer_to) {
  constexpr int kChunks = kDim / kChunk<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group + 8 * half;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const int column = 8 * j + 2 * member;
      Vector<T, 2> pair;
      pair[0] = from_float<T>(values[j][2 * half]);
      pair[1] = from_float<T>(values[j][2 * half + 1]);
      store(stage + (row * kDim + (column ^ (swap_of(row) * kChunk<T>))), pair);
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * kChunk<T>;
    const auto chunk = load<kChunk<T>>(stage + (row * kDim + (column ^ (swap_of(row) * kChunk<T>))));
    const Global<T> to = pointer_to(row);
    if (column >= dim || !to) continue;
    if (width == 16 && column + kChunk<T> <= dim) {
      store(to + column, chunk);
    } else {
#pragma unroll
      for (int k = 0; k < kChunk<T>; ++k)
        if (column + k < dim) to[column + k] = chunk[k];
    }
  }
}

// The same in float32, without a stage.
template <int kDim, class F>
DEVICE_INLINE void store_wide_rows(const float (&values)[kDim / 8][4], int dim, const F& pointer_to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Global<float> to = pointer_to(group + 8 * half);
    if (!to) continue;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * j + 2 * member + i;
        if (column < dim) to[column] = values[j][2 * half + i];
      }
  }
}

}  // namespace velm::cuda
