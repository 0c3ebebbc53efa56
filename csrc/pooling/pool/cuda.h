// Pooling over tokens on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

enum PoolMode : int { kPoolMean, kPoolSum, kPoolMax, kPoolLogSumExp, kPoolGem };

struct Pool {
  int64_t segments, tokens, dim;
  PoolMode mode;
  float p;
  Dtype dtype;
  // Bounds of packed segments, or lengths and one byte per token, each perhaps null.
  View bounds, lengths, mask;
  // Null in backward where it is not read.
  View x;
  int64_t segment_stride, token_stride, dim_stride;
  bool tokens_contiguous;
  // (segments, dim): what backward needs of the result, int32 for the largest, else float.
  View stats;

  // forward
  View out;

  // backward; grad_x is contiguous, its last two dimensions in the order of x
  View grad, grad_x;
  // int32, one per segment.
  View counts;
};

void pool_forward(const Pool& problem, Stream stream);
void pool_backward(const Pool& problem, Stream stream);

}  // namespace velm::cuda
