// attention_pool's middle on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// Rows of a segment attend over its tokens. Everything but x is contiguous; what belongs to rows is (segments, rows,
// dim) or, logsumexp, (segments, rows).
struct AttentionPool {
  // Bounds of packed segments, or lengths and one byte per token, each perhaps null.
  View bounds, lengths, mask;
  // (segments, tokens, dim), of packed segments (tokens, dim); last stride 1.
  View x;
  // (segments, rows, dim), or (1, rows, dim), which all segments share.
  View queries;
  View out, logsumexp;
  // float32, (segments, rows, tokens) or, packed, (rows, tokens): scores, weights, and in backward their gradients.
  View weights, grad_weights;

  // backward; a null gradient is not wanted
  View grad, grad_x, grad_queries;
  // float32, (segments, rows, dim), where the queries are shared.
  View partials;

  int64_t segments() const { return bounds ? bounds.size[3] - 1 : x.size[1]; }
  int64_t tokens() const { return x.size[2]; }
  int64_t rows() const { return queries.size[2]; }
  int64_t dim() const { return x.size[3]; }
  bool is_shared() const { return queries.size[1] == 1; }
};

void attention_pool_forward(const AttentionPool& problem, Stream stream);
void attention_pool_backward(const AttentionPool& problem, Stream stream);

}  // namespace velm::cuda
