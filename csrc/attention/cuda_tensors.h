// From the tensors of attention operators to what their kernels take.
#pragma once

#include "attention/cuda_forward.h"
#include "device/tensor.h"

namespace velm::cuda {

using device::span_of;
using device::Tensor;

inline RowSpan rows_of(const Tensor& t) {
  if (t.dim() == 3) return {span_of(t), 0, t.stride(1), t.stride(0)};
  return {span_of(t), t.stride(0), t.stride(1), t.stride(2)};
}

// Uninitialised (batch, heads, rows, dim), in memory (batch, rows, heads, dim); (rows, heads, dim) of packed rows.
inline Tensor empty_heads_last(const Tensor& like, int64_t dim) {
  if (like.dim() == 3) return torch::stable::new_empty(like, {like.size(0), like.size(1), dim});
  return torch::stable::transpose(torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), dim}), 1,
                                  2);
}

// Floats for each row of a tensor that is shaped like `like`, of `heads` heads.
inline Tensor empty_of_rows(const Tensor& like, int64_t heads) {
  using device::ScalarType;
  if (like.dim() == 3) return torch::stable::new_empty(like, {heads, like.size(0)}, ScalarType::Float);
  return torch::stable::new_empty(like, {like.size(0), heads, like.size(2)}, ScalarType::Float);
}

// The forward pass with the memory that it needs besides.
inline void run_forward(AttentionForward p, const Tensor& like, Stream stream) {
  std::optional<Tensor> partials;
  if (const int64_t count = attention_forward_partials(p)) {
    partials = torch::stable::new_empty(like, {count}, device::ScalarType::Float);
    p.partials = span_of(*partials);
  }
  attention_forward(p, stream);
}

}  // namespace velm::cuda
