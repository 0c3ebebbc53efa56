// factorized_pool on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// a and b: (batch, regions, factor * dim) of one type with last stride 1; grad, out and the gradients are contiguous.
struct FactorizedPool {
  int64_t factor;
  bool inner, power_norm, l2_norm;
  View a, b;
  // One int64, or nothing for no dropout.
  View seed;
  double dropout_p;
  // Forward writes out; backward reads grad and writes those of grad_a and grad_b that are there.
  View out, grad, grad_a, grad_b;

  int64_t rows() const { return a.size[1] * a.size[2]; }
  int64_t dim() const { return a.size[3] / factor; }
};

void factorized_pool_forward(const FactorizedPool& problem, Stream stream);
void factorized_pool_backward(const FactorizedPool& problem, Stream stream);

}  // namespace velm::cuda
