// residual + tanh(gate) * x on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// Of (rows, dim) with last stride 1; `out` and the gradients are contiguous.
struct GatedResidual {
  // One number per column, or one for all.
  View gate;
  // One byte per row, or null.
  View row_mask;
  // Null in backward where the gate needs no gradient.
  View x;

  // forward
  View residual, out;

  // backward; a null gradient is not wanted
  View grad, grad_x, grad_gate;
  // Floats, as many as gated_residual_partials says.
  View partials;

  int64_t rows() const { return x.size[2]; }
  int64_t dim() const { return x.size[3]; }
  // With one column either way is right; the kernels add the rows of a block together in one of them.
  bool gate_is_row() const { return gate.size[3] == dim(); }
};

void gated_residual_forward(const GatedResidual& problem, Stream stream);
int64_t gated_residual_partials(const GatedResidual& problem);
void gated_residual_backward(const GatedResidual& problem, Stream stream);

}  // namespace velm::cuda
