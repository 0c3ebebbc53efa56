// The forward pass of attention on a CUDA device.
#pragma once

#include "attention/cuda_problem.h"

namespace velm::cuda {

struct AttentionForward : Attention {
  RowSpan out;
  // Floats (batch, heads, queries), or (heads, queries) of packed sequences.
  Span logsumexp;
};

void attention_forward(const AttentionForward& problem, Stream stream);

}  // namespace velm::cuda
