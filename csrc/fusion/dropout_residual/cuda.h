// residual + dropout(x) on a CUDA device: what the operator hands to the kernel.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// (rows, dim) of one type with last stride 1; `out` is contiguous. Without residual also the gradient of x.
struct DropoutResidual {
  View x, residual, out;
  // One int64.
  View seed;
  double dropout_p;
};

void dropout_residual(const DropoutResidual& problem, Stream stream);

}  // namespace velm::cuda
