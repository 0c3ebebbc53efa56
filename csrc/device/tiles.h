// Tiles in shared memory: rows of kDim elements, in chunks of 16 bytes that are exchanged within a row such that
// neither matrix loads, nor the accesses of single lanes, nor copies meet in a bank.
#pragma once

#include <initializer_list>

#include "device/async.h"
#include "device/block.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/predicated.h"

namespace velm::device {

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

// Tiles that come in turn through kSlots slots: copy(slot, ...) begins to copy the next of them, if there is one, and
// is called kSlots - 1 tiles ahead of their use. All threads of a block take part.
template <int kSlots>
class Ring {
 public:
  template <class F, class... Arguments>
  DEVICE_INLINE void fill(const F& copy, Arguments... arguments) {
    copy(filled_, arguments...);
    // An empty group where there is nothing left, so that the waits count the same.
    cp_async_commit();
    filled_ = after(filled_);
  }
  // The slot of the next tile, which is there now. That of the previous one, which no warp reads any more, is filled.
  template <class F, class... Arguments>
  DEVICE_INLINE int next(const F& copy, Arguments... arguments) {
    cp_async_wait<kSlots - 2>();
    __syncthreads();
    fill(copy, arguments...);
    const int slot = used_;
    used_ = after(used_);
    return slot;
  }

 private:
  DEVICE_INLINE static int after(int slot) { return slot + 1 == kSlots ? 0 : slot + 1; }
  int filled_ = 0, used_ = 0;
};

// The widest copy in bytes, of 16, 4 and the size of an element, that divides where all rows begin.
inline int copy_width(const View& rows, std::initializer_list<int64_t> strides, Dtype dtype) {
  const auto bytes = static_cast<int64_t>(bytes_of(dtype));
  for (const int width : {16, 4}) {
    bool divides = reinterpret_cast<uintptr_t>(rows.data) % static_cast<unsigned>(width) == 0;
    for (const int64_t stride : strides) divides = divides && stride * bytes % width == 0;
    if (divides) return width;
  }
  return static_cast<int>(bytes);
}

inline int copy_width(const View& rows) {
  return copy_width(rows, {rows.stride[0], rows.stride[1], rows.stride[2]}, rows.dtype);
}

// Begins to copy the rows of a tile, zeros where `pointer_to(row)` is null. `width` is that of a copy in bytes: 16, or
// where rows do not begin at multiples of it, 4 or an element. All kBy threads of a block take part; what they copied
// is there after a wait and a barrier.
template <class T, int kDim, int kCount, int kBy = kThreads, class F>
DEVICE_INLINE void copy_rows(const Shared<T>& tile, int dim, int width, const F& pointer_to) {
  constexpr int kSize = static_cast<int>(sizeof(T)), kWord = 4 / kSize;
  const int thread = static_cast<int>(threadIdx.x);
  // Behind the rows' ends zeros follow up to here.
  const int filled = (dim + kGranule<T> - 1) / kGranule<T> * kGranule<T>;
  // Copies that are not of 16 bytes are few, and not worth much code.
  if (width == 4) {
#pragma unroll 1
    for (int i = thread * kWord; i < kCount * kDim; i += kBy * kWord) {
      const int row = i / kDim, column = i % kDim;
      if (column >= filled) continue;
      const Global<const T> from = pointer_to(row);
      cp_async<4>(tile + (row * kDim + (column ^ (swap_of(row) * kChunk<T>))), from ? from + column : from,
                  from ? min(max(dim - column, 0), kWord) * kSize : 0);
    }
    return;
  }
  constexpr int kChunks = kDim / kChunk<T>, kPass = kBy / kChunks;
  static_assert(kCount % kPass == 0);
  const int column = thread % kChunks * kChunk<T>;
  if (column >= filled) return;
  if constexpr (kSize == 2) {
    if (width == 2) {
#pragma unroll 1
      for (int i = 0; i < kCount; i += kPass) {
        const int row = i + thread / kChunks;
        const ReadOnly<T> from = pointer_to(row);
        Vector<T, kChunk<T>> chunk;
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k)
          chunk[k] = load_if(from && column + k < dim, from + (column + k), from_float<T>(0.0f));
        store(tile + (row * kDim + (column ^ (swap_of(row) * kChunk<T>))), chunk);
      }
      return;
    }
  }
#pragma unroll 2
  for (int i = 0; i < kCount; i += kPass) {
    const int row = i + thread / kChunks;
    const Global<const T> from = pointer_to(row);
    cp_async<16>(tile + (row * kDim + (column ^ (swap_of(row) * kChunk<T>))), from ? from + column : from,
                 from ? min(max(dim - column, 0), kChunk<T>) * kSize : 0);
  }
}

// The same of `rows` rows that lie one behind the other.
template <class T, int kDim, int kCount, int kBy = kThreads>
DEVICE_INLINE void copy_tile(const Shared<T>& tile, const Global<const T>& from, int64_t stride, int rows, int dim,
                             int width) {
  copy_rows<T, kDim, kCount, kBy>(tile, dim, width,
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
  if (width == 16 && dim % kChunk<T> == 0) {
    for (int i = lane; i < 16 * kChunks; i += 32) {
      const int row = i / kChunks, column = i % kChunks * kChunk<T>;
      const auto chunk = load<kChunk<T>>(stage + (row * kDim + (column ^ (swap_of(row) * kChunk<T>))));
      const Global<T> to = pointer_to(row);
      if (column < dim && to) store(to + column, chunk);
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < 16 * kDim; i += 32) {
    const int row = i / kDim, column = i % kDim;
    const T x = stage[row * kDim + (column ^ (swap_of(row) * kChunk<T>))];
    const Global<T> to = pointer_to(row);
    if (column < dim && to) to[column] = x;
  }
}

// The same in float32, without a stage.
template <int kDim, class F>
DEVICE_INLINE void store_float_rows(const float (&values)[kDim / 8][4], int dim, const F& pointer_to) {
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
        store_if(column < dim, to + column, values[j][2 * half + i]);
      }
  }
}

}  // namespace velm::device
