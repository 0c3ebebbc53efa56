// Attention on a CUDA device: what the operators hand to the kernels. Neither torch nor CUDA.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

struct Attention {
  // (batch, heads, rows, dim), the last stride is 1; all rows of packed sequences are one batch entry.
  View query, key, value;
  // Batch entries or packed sequences, and the most rows that one of them has.
  int64_t batch, longest_queries, longest_keys;
  // Integers of 32 bits, and one byte per key.
  View key_lengths, range_start, range_stop, cu_seqlens_q, cu_seqlens_k, key_mask;
  // They broadcast to (batch, heads, queries, keys).
  View mask, bias;
  // One integer of 64 bits; without it there is no dropout.
  View seed;
  double scale, softcap, dropout_p;
  bool is_causal;
  // Of two that draw their dropout from one seed, which one.
  uint32_t direction;

  Dtype dtype() const { return query.dtype; }
  int64_t heads() const { return query.size[1]; }
  int64_t kv_heads() const { return key.size[1]; }
  int64_t queries() const { return query.size[2]; }
  int64_t keys() const { return key.size[2]; }
  int64_t head_dim() const { return query.size[3]; }
  int64_t value_dim() const { return value.size[3]; }
};

}  // namespace velm::cuda
