// bilinear on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// x (rows, dx), y (rows, dy) and grad (rows, out) with their row strides, weight (out, dx, dy) with the strides of the
// first two; the last stride is 1, and everything else is contiguous.
struct Bilinear {
  int64_t rows, dx, dy, out;
  Dtype dtype;
  View x, y, weight, bias, grad;
  int64_t x_stride, y_stride, grad_stride, out_stride, row_stride;
  // Forward writes z; backward those gradients that are there.
  View z, grad_x, grad_y, grad_weight, grad_bias;
  // float32, as many as the functions below say.
  View partials;
};

// Floats of the sums that several blocks leave to be added up.
int64_t bilinear_forward_partials(const Bilinear& problem);
int64_t bilinear_backward_partials(const Bilinear& problem, bool wants_x, bool wants_y);

void bilinear_forward(const Bilinear& problem, Stream stream);
void bilinear_backward(const Bilinear& problem, Stream stream);
// A part of backward.
void bilinear_grad_weight(const Bilinear& problem, Stream stream);

}  // namespace velm::cuda
