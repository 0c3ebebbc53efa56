#pragma once

#include "attention/cross_attention/cpu_problem.h"

namespace velm::attention {

// What backward is given beside the problem, and where its results go; a null pointer is not wanted.
struct Gradients {
  Rows out, grad_out;
  const float* logsumexp = nullptr;
  const float* grad_logsumexp = nullptr;  // (batch, heads, queries) with these strides, or null
  int64_t grad_logsumexp_stride[3] = {};
  Rows grad_query, grad_key, grad_value, grad_rel_pos_height, grad_rel_pos_width;
  float* grad_bias = nullptr;  // fp32, contiguous with sizes bias_size, zero at the start
  int64_t bias_size[4] = {};
};

// `partials` copies of the bias gradient are wanted behind each other in grad_bias; backward adds them up into the
// first.
int64_t bias_partials(const Problem& p, const int64_t (&bias_size)[4]);
void backward(const Problem& p, const Gradients& g);

}  // namespace velm::attention
