// residual + dropout(x) on a CUDA device: what the operator hands to the kernel.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// Rows of `dim` elements of one type; `out` is contiguous. Without residual also the gradient of x.
struct DropoutResidual {
  int64_t rows, dim;
  Dtype dtype;
  View x, residual, out;
  int64_t x_stride, residual_stride;
  // One int64.
  View seed;
  double dropout_p;
};

void dropout_residual(const DropoutResidual& problem, Stream stream);

}  // namespace velm::cuda
