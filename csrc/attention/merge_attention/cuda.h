// Merge of attention over shards of the keys on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// A lane of a warp holds the logsumexp of one shard.
constexpr int kMostShards = 32;

// (batch, heads, queries, dim) with last stride 1, and floats (batch, heads, queries). Of the gradients each kind is
// there for all shards or for none.
struct Shard {
  View out, grad_out;
  View logsumexp, grad_logsumexp;
};

struct Merge {
  int shards;
  Shard shard[kMostShards];
  // The merged result; in backward the gradient of `out`.
  View out;
  View logsumexp, grad_logsumexp;

  Dtype dtype() const { return out.dtype; }
  int64_t batch() const { return out.size[0]; }
  int64_t heads() const { return out.size[1]; }
  int64_t queries() const { return out.size[2]; }
  int64_t dim() const { return out.size[3]; }
};

void merge_attention_forward(const Merge& problem, Stream stream);
void merge_attention_backward(const Merge& problem, Stream stream);

}  // namespace velm::cuda
