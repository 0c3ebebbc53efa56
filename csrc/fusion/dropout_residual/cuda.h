// residual + dropout(x) on a CUDA device: what the operator hands to the kernel.
#pragma once

#include "device/span.h"

namespace velm::cuda {

using device::Dtype;
using device::Span;
using device::Stream;

// Rows of `dim` elements of one type; `out` is contiguous. Without residual also the gradient of x.
struct DropoutResidual {
  int64_t rows, dim;
  Dtype dtype;
  Span x, residual, out;
  int64_t x_stride, residual_stride;
  // One int64.
  Span seed;
  double dropout_p;
};

void dropout_residual(const DropoutResidual& problem, Stream stream);

}  // namespace velm::cuda
