// The RMS norm of query and key over head_dim on a CUDA device.
#pragma once

#include "attention/cuda_problem.h"

namespace velm::cuda {

// Of (batch, heads, rows, dim).
struct RmsNorm {
  View x, y;
  View weight;
  double eps;
};

// y = weight * x / sqrt(mean(x^2) + eps), rounded to the type of x.
void rms_norm(const RmsNorm& problem, Stream stream);

struct RmsNormBackward {
  View x;
  View weight;
  double eps;
  // Floats.
  View grad_y;
  // Null gradients are not wanted.
  View grad_x;
  View grad_weight;
  // Floats, as many as rms_norm_partials says.
  View partials;
};

int64_t rms_norm_partials(const RmsNormBackward& problem);
void rms_norm_backward(const RmsNormBackward& problem, Stream stream);

}  // namespace velm::cuda
