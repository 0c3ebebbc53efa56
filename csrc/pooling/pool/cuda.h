// Pooling over tokens on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

enum PoolMode : int { kPoolMean, kPoolSum, kPoolMax, kPoolLogSumExp, kPoolGem };

struct Pool {
  PoolMode mode;
  float p;
  // Bounds of packed segments, or lengths and one byte per token, each perhaps null.
  View bounds, lengths, mask;
  // (segments, tokens, dim), of packed segments (tokens, dim). Null in backward where it is not read.
  View x;
  // The stride that is 1 is that of tokens, or else the last.
  bool tokens_contiguous;
  // (segments, dim): what backward needs of the result, int32 for the largest, else float.
  View stats;

  // forward
  View out;

  // backward; grad_x is contiguous, its last two dimensions in the order of x
  View grad, grad_x;
  // int32, one per segment.
  View counts;

  int64_t segments() const { return bounds ? bounds.size[3] - 1 : x.size[1]; }
  int64_t tokens() const { return x.size[2]; }
  int64_t dim() const { return x.size[3]; }
};

void pool_forward(const Pool& problem, Stream stream);
void pool_backward(const Pool& problem, Stream stream);

}  // namespace velm::cuda
