// The backward pass of attention on a CUDA device, and what else is computed from the weights once more: the attention
// that each key received.
#pragma once

#include "attention/cuda_problem.h"

namespace velm::cuda {

struct AttentionBackward : Attention {
  RowSpan out, grad_out;
  // Floats of rows, as the forward pass leaves them; `delta` is filled by attention_delta.
  Span logsumexp, delta;
  // Null for none; its last stride is in `row`.
  RowSpan grad_logsumexp;
  // Where a gradient goes on through a norm it is kept in float32. Null gradients are not wanted.
  RowSpan grad_query, grad_key, grad_value;
  bool wide_grad_query, wide_grad_key;
  // Contiguous, in the type of the bias; zeros before.
  MatrixSpan grad_bias;
  int64_t bias_size[4];
};

// delta = sum of grad_out * out - grad_logsumexp of each row; with p the weights and dp = grad_out . value the gradient
// of a score is p * (dp - delta) (Dao et al., 2022). 0 for a row that sees nothing.
void attention_delta(const AttentionBackward& problem, Stream stream);
// These need delta.
// Also the gradient of the bias, which here must broadcast nowhere.
void attention_grad_query(const AttentionBackward& problem, Stream stream);
void attention_grad_key(const AttentionBackward& problem, Stream stream);
void attention_grad_value(const AttentionBackward& problem, Stream stream);
// Of any bias; with as many floats as attention_bias_partials says.
void attention_grad_bias(const AttentionBackward& problem, const Span& partials, Stream stream);
int64_t attention_bias_partials(const AttentionBackward& problem);

// Floats (batch, heads, keys), or (heads, keys) of packed sequences.
void attention_key_mass(const Attention& problem, const Span& logsumexp, const Span& key_mass, Stream stream);

}  // namespace velm::cuda
