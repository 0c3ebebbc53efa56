// The forward pass of attention on a CUDA device.
#pragma once

#include "attention/cuda_problem.h"

namespace velm::cuda {

struct AttentionForward : Attention {
  RowSpan out;
  // Floats (batch, heads, queries), or (heads, queries) of packed sequences.
  Span logsumexp;
  // As many floats as attention_forward_partials says.
  Span partials;
};

// Not 0 where the keys of a block of queries are split among several: where there would be less than 256 blocks (one
// for each 64 queries of a head, or, of less, of all heads that share a key head), in as many parts as make up this
// number, but at most 32, and of at least 256 keys and 8 for each query. Nothing but shapes decides, so that all
// devices give the same bits. Each part takes an even share of the tiles that the ranges of its queries leave.
int64_t attention_forward_partials(const AttentionForward& problem);

void attention_forward(const AttentionForward& problem, Stream stream);

}  // namespace velm::cuda
