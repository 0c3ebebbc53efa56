// attention_pool's middle on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// `rows` rows of a segment attend over its tokens. Everything but x is contiguous; what belongs to rows is (segments,
// rows, dim) or, logsumexp, (segments, rows).
struct AttentionPool {
  int64_t segments, tokens, rows, dim;
  Dtype dtype;
  // Bounds of packed segments, or lengths and one byte per token, each perhaps null.
  View bounds, lengths, mask;
  View x;
  int64_t segment_stride, token_stride;
  View queries;
  // One set of them for all segments.
  bool is_shared;
  View out, logsumexp;
  // float32, (segments, rows, tokens) or, packed, (rows, tokens): scores, weights, and in backward their gradients.
  View weights, grad_weights;

  // backward; a null gradient is not wanted
  View grad, grad_x, grad_queries;
  // float32, (segments, rows, dim), where the queries are shared.
  View partials;
};

void attention_pool_forward(const AttentionPool& problem, Stream stream);
void attention_pool_backward(const AttentionPool& problem, Stream stream);

}  // namespace velm::cuda
