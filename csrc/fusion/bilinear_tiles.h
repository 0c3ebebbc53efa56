// What the kernels of bilinear share.
#pragma once

#include "attention/cuda_products.h"
#include "fusion/bilinear_cuda.h"

namespace velm::cuda {

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

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The widest copies, in bytes, of rows with these strides.
inline int width_of(const Span& span, Dtype dtype, int64_t stride, int64_t other = 0) {
  return copy_width(RowSpan{span, other, 0, stride}, dtype);
}

}  // namespace velm::cuda
