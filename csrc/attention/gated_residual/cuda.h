// residual + tanh(gate) * x on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// Rows of `dim` elements; `out` and the gradients are contiguous.
struct GatedResidual {
  int64_t rows, dim;
  View gate;
  Dtype gate_dtype;
  // One number per column, or one for all.
  bool gate_is_row;
  // One byte per row, or null.
  View row_mask;

  View x;
  Dtype x_dtype;
  int64_t x_stride;

  // forward
  View residual, out;
  Dtype residual_dtype, out_dtype;
  int64_t residual_stride;

  // backward; a null gradient is not wanted
  View grad, grad_x, grad_gate;
  Dtype grad_dtype;
  // Floats, as many as gated_residual_partials says.
  View partials;
};

void gated_residual_forward(const GatedResidual& problem, Stream stream);
int64_t gated_residual_partials(const GatedResidual& problem);
void gated_residual_backward(const GatedResidual& problem, Stream stream);

}  // namespace velm::cuda
