// factorized_pool on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// a and b: (batch, regions, factor * dim) of one type with last stride 1; grad, out and the gradients are contiguous.
struct FactorizedPool {
  int64_t batch, regions, dim, factor;
  Dtype dtype;
  bool inner, power_norm, l2_norm;
  View a, b;
  int64_t a_batch_stride, a_region_stride, b_batch_stride, b_region_stride;
  // One int64, or nothing for no dropout.
  View seed;
  double dropout_p;
  // Forward writes out; backward reads grad and writes those of grad_a and grad_b that are there.
  View out, grad, grad_a, grad_b;
};

void factorized_pool_forward(const FactorizedPool& problem, Stream stream);
void factorized_pool_backward(const FactorizedPool& problem, Stream stream);

}  // namespace velm::cuda
