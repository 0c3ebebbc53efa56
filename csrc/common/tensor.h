// What the operators of every family share on the CPU: results, rows of 4-D tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "common/kernel.h"
#include "simd/dtype.h"
#include "simd/pages.h"

namespace velm {

using simd::ScalarType;
using simd::with_type;
using torch::stable::Tensor;

template <class T>
inline const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
inline T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor nothing(const Tensor& like) {
  return torch::stable::new_empty(like, {0});
}

// A result that is about to be written, in large pages where it is large.
inline Tensor in_large_pages(Tensor fresh) {
  simd::prefer_huge_pages(fresh.mutable_data_ptr(), static_cast<std::size_t>(fresh.numel()) * fresh.element_size());
  return fresh;
}

inline void in_large_pages(const std::optional<Tensor>& fresh) {
  if (fresh) in_large_pages(*fresh);
}

// Uninitialised (batch, heads, rows, dim), in memory (batch, rows, heads, dim): what a module turns into
// (batch, rows, heads * dim) without a copy.
inline Tensor empty_heads_last(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t dim) {
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, rows, heads, dim}), 1, 2);
}

// Where the rows of a (batch, heads, rows, dim) tensor with last stride 1 lie.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& t)
      : data(const_cast<T*>(static_cast<const T*>(t.const_data_ptr()))),
        batch_stride(t.stride(0)),
        head_stride(t.stride(1)),
        row_stride(t.stride(2)) {}
  T* at(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

}  // namespace velm
