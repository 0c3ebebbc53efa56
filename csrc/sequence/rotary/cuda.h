// rotary and normed_rotary on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

enum RotaryLayout : int64_t { kHalves, kPairs, kQuarters };

// cos and sin (batch, tokens, rotated), of one dtype, last stride 1; rotated may be 0.
struct RotaryTables {
  View cos, sin;
  int64_t layout;

  int64_t rotated() const { return cos.size[3]; }
};

// Queries, or keys: (batch, heads, tokens, head_dim), last strides 1. Nothing is done where out is null.
struct RotarySide {
  View x, out;
};

// out = x * cos + R(x) * sin; `back` by the transposed rotation.
void rotary(const RotaryTables& tables, bool back, const RotarySide& query, const RotarySide& key, Stream stream);

struct RotaryGradients {
  // What comes in, and what was rotated: (batch, heads, tokens, head_dim).
  View grad_query, grad_key, query, key;
  // (batch, tokens, rotated), contiguous, where wanted.
  View grad_cos, grad_sin;
};

// The gradients of cos and sin: sums over the heads of both, one after the other.
void rotary_table_gradients(const RotaryTables& tables, const RotaryGradients& problem, Stream stream);

// The same behind an RMS norm. Nothing is done where weight is null.
struct NormedSide {
  View x, out;
  // (head_dim,), or (heads * head_dim,) for one norm over all heads of a token; contiguous, any floating dtype.
  View weight;

  bool is_over_heads() const { return weight.size[3] != x.size[3]; }
};

void normed_rotary(const RotaryTables& tables, float eps, const NormedSide& query, const NormedSide& key,
                   Stream stream);

struct NormedGradients {
  View x, weight, grad;
  // Those that are wanted.
  View grad_x, grad_weight;
  // Float (normed_rotary_partials(..), elements of the weight) where grad_weight is wanted.
  View partials;

  bool is_over_heads() const { return weight.size[3] != x.size[3]; }
  explicit operator bool() const { return weight && (grad_x || grad_weight); }
};

// Blocks that leave sums for the gradient of the weight.
int64_t normed_rotary_partials(const RotaryTables& tables, const NormedGradients& side);
// Query and key one after the other: what the kernel knows of one side is most of what it has registers for.
void normed_rotary_backward(const RotaryTables& tables, float eps, const NormedGradients& side, Stream stream);

}  // namespace velm::cuda
