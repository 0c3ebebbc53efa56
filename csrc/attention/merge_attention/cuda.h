// Merge of attention over shards of the keys on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// A lane of a warp holds the logsumexp of one shard.
constexpr int kMostShards = 32;

// Rows of `dim` elements of a (batch, heads, queries, dim) tensor; the last stride is 1.
struct StridedRows {
  View data;
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0;
};

struct Shard {
  StridedRows out, grad_out;
  // (batch, heads, queries) floats.
  View logsumexp, grad_logsumexp;
};

struct Merge {
  int64_t batch, heads, queries, dim;
  Dtype dtype;
  int shards;
  Shard shard[kMostShards];
  // The merged result; in backward the gradient of `out`, which may be null for `grad_logsumexp`.
  StridedRows out;
  View logsumexp, grad_logsumexp;
  bool wants_outs, wants_logsumexps;
};

void merge_attention_forward(const Merge& problem, Stream stream);
void merge_attention_backward(const Merge& problem, Stream stream);

}  // namespace velm::cuda
