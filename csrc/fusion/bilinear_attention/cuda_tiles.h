// What the kernels of bilinear attention share.
#pragma once

#include "fusion/bilinear_attention/cuda.h"
#include "fusion/tiles_cuda.h"

namespace velm::cuda {

// Regions or words on the device.
template <class T>
struct SideRows {
  ReadOnly<T> x;
  ReadOnly<int32_t> lengths;
  ReadOnly<unsigned char> mask;
  int64_t batch_stride, row_stride;
  int rows, width;

  // Behind the last row that may count.
  DEVICE_INLINE int end(int64_t b) const { return lengths ? min(max(int{lengths[b]}, 0), rows) : rows; }
  DEVICE_INLINE bool counts(int64_t b, int row, int end) const {
    return row < end && (!mask || mask[b * rows + row] != 0);
  }
  DEVICE_INLINE int64_t at(int64_t b, int row) const { return b * batch_stride + row * row_stride; }
};

template <class T>
SideRows<T> side_of(const PairSide& side) {
  return {global<const T>(side.x),
          global<const int32_t>(side.lengths),
          global<const unsigned char>(side.mask),
          side.x.stride[1],
          side.x.stride[2],
          static_cast<int>(side.rows()),
          copy_width(side.x)};
}

}  // namespace velm::cuda
