// The backward pass of bidirectional attention on a CUDA device. Each direction by itself is attention with a key mask
// (cuda_forward.h, cuda_backward.h); here is what both share.
#pragma once

#include "attention/cuda_backward.h"

namespace velm::cuda {

// The gradient of the queries of a side, which are queries in one direction and keys in the other: `as_queries` is the
// problem of the first, `as_keys` of the second, both with delta. It goes to as_queries.grad_query. `partials` has as
// many floats as bidirectional_grad_query_partials says: not 0 where the keys are split (cuda_splits.h), or the
// directions.
void bidirectional_grad_query(const AttentionBackward& as_queries, const AttentionBackward& as_keys,
                              const View& partials, Stream stream);
int64_t bidirectional_grad_query_partials(const AttentionBackward& as_queries, const AttentionBackward& as_keys);

}  // namespace velm::cuda
