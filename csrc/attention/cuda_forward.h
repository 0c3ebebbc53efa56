// The forward pass of attention on a CUDA device.
#pragma once

#include "attention/cuda_problem.h"

namespace velm::cuda {

struct AttentionForward : Attention {
  View out;
  // Floats (batch, heads, queries), or (heads, queries) of packed sequences.
  View logsumexp;
  // As many floats, or none: what the logsumexp, as a float, is short of (cuda_backward.h).
  View shift;
  // As many floats as attention_forward_partials says.
  View partials;
};

// Not 0 where there are few blocks of queries (each of 64 queries of a head, or, of less, of all heads that share a key
// head) and many keys, so that the keys are split (cuda_splits.h). Each part takes an even share of the tiles that the
// ranges of its queries leave.
int64_t attention_forward_partials(const AttentionForward& problem);

void attention_forward(const AttentionForward& problem, Stream stream);

}  // namespace velm::cuda
