// Attention on a CUDA device: what the operators hand to the kernels. Neither torch nor CUDA.
#pragma once

#include "device/span.h"

namespace velm::cuda {

using device::Dtype;
using device::Span;
using device::Stream;

// Rows of a (batch, heads, rows, dim) tensor, or of a packed (rows, heads, dim) one; strides in elements, the last
// is 1.
struct RowSpan {
  Span data;
  int64_t batch = 0, head = 0, row = 0;
};

// What broadcasts to (batch, heads, queries, keys); the stride is 0 where it does.
struct MatrixSpan {
  Span data;
  Dtype dtype = Dtype::float32;
  int64_t stride[4] = {};
};

struct Attention {
  Dtype dtype;
  // `queries` and `keys` of a whole tensor; of packed sequences the longest are given besides.
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  int64_t longest_queries, longest_keys;
  RowSpan query, key, value;
  // Integers of 32 bits, and one byte per key.
  Span key_lengths, range_start, range_stop, cu_seqlens_q, cu_seqlens_k, key_mask;
  MatrixSpan mask, bias;
  // One integer of 64 bits; without it there is no dropout.
  Span seed;
  double scale, softcap, dropout_p;
  bool is_causal;
  // Of two that draw their dropout from one seed, which one.
  uint32_t direction;
};

}  // namespace velm::cuda
