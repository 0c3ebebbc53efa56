// From the tensors of attention operators to what their kernels take.
#pragma once

#include <algorithm>

#include "attention/cuda_forward.h"
#include "device/tensor.h"

namespace velm::cuda {

using device::Tensor;
using device::view_of;

// (batch, heads, rows, dim), of which (rows, heads, dim) of packed rows is one batch entry.
inline View rows_of(const Tensor& t) {
  View rows = view_of(t);
  if (t.dim() == 3) {
    std::swap(rows.size[1], rows.size[2]);
    std::swap(rows.stride[1], rows.stride[2]);
  }
  return rows;
}
inline View rows_of(const std::optional<Tensor>& t) {
  return t ? rows_of(*t) : View{};
}

// (batch, heads, rows, 1) of one number per row, (batch, heads, rows), or (heads, rows) of packed rows.
inline View numbers_of(const std::optional<Tensor>& t) {
  if (!t) return {};
  View numbers = view_of(*t);
  std::rotate(numbers.size, numbers.size + 1, numbers.size + 4);
  std::rotate(numbers.stride, numbers.stride + 1, numbers.stride + 4);
  return numbers;
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
    p.partials = view_of(*partials);
  }
  attention_forward(p, stream);
}

}  // namespace velm::cuda
