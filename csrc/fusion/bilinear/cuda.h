// bilinear on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// x (rows, dx), y (rows, dy), grad (rows, out) and weight (out, dx, dy) with last stride 1; everything else is
// contiguous.
struct Bilinear {
  View x, y, weight, bias, grad;
  // Forward writes z; backward those gradients that are there.
  View z, grad_x, grad_y, grad_weight, grad_bias;
  // float32, as many as the functions below say.
  View partials;

  Dtype dtype() const { return x.dtype; }
  int64_t rows() const { return x.size[2]; }
  int64_t dx() const { return x.size[3]; }
  int64_t dy() const { return y.size[3]; }
  int64_t out() const { return weight.size[1]; }
};

// Floats of the sums that several blocks leave to be added up.
int64_t bilinear_forward_partials(const Bilinear& problem);
int64_t bilinear_backward_partials(const Bilinear& problem, bool wants_x, bool wants_y);

void bilinear_forward(const Bilinear& problem, Stream stream);
void bilinear_backward(const Bilinear& problem, Stream stream);
// A part of backward.
void bilinear_grad_weight(const Bilinear& problem, Stream stream);

}  // namespace velm::cuda
