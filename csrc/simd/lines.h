// Rows of tensors of any element type, as float32. Converting is a function of its own, so that what computes is
// compiled once and not for every type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "simd/dtype.h"

namespace velm::simd {

// Where a row lies if it is float32, else converted into `memory`.
[[gnu::noinline]] inline const float* as_floats(ScalarType type, const void* row, int64_t n, float* memory) {
  if (type == ScalarType::Float) return static_cast<const float*>(row);
  with_type(type, [&](auto t) { convert(memory, static_cast<const decltype(t)*>(row), n); });
  return memory;
}
[[gnu::noinline]] inline void from_floats(ScalarType type, void* row, const float* values, int64_t n) {
  with_type(type, [&](auto t) { convert(static_cast<decltype(t)*>(row), values, n); });
}

// Where the rows of a tensor lie, in bytes.
struct Lines {
  char* data = nullptr;
  int64_t outer = 0, inner = 0;
  ScalarType type = ScalarType::Float;

  Lines() = default;
  Lines(const torch::stable::Tensor& t, int64_t outer, int64_t inner)
      : data(const_cast<char*>(static_cast<const char*>(t.const_data_ptr()))),
        outer(outer * static_cast<int64_t>(t.element_size())),
        inner(inner * static_cast<int64_t>(t.element_size())),
        type(t.scalar_type()) {}
  char* at(int64_t i, int64_t j) const { return data + i * outer + j * inner; }
};

}  // namespace velm::simd
