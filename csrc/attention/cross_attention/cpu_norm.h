// RMS norm over head_dim: weight * x / sqrt(mean(x^2) + eps), by B. Zhang and R. Sennrich (2019).
#pragma once

#include "attention/cross_attention/cpu_problem.h"

namespace velm::attention {

// The normalised x as products of queries and keys read it: in bf16 where they multiply that, else in fp32.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, bool varlen);

// Gradients of x (to `grad_x`, unless null) and of the weight (if wanted) from the fp32 gradient of the normalised x.
void rms_norm_backward(const Tensor& x, const Tensor& weight, double eps, bool varlen, const Tensor& grad,
                       const Rows& grad_x, const Tensor* grad_weight);

}  // namespace velm::attention
