// The element types of tensors as types of C++.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>

#include "simd/vec.h"

namespace velm::simd {

using torch::headeronly::ScalarType;

// Calls f with a value of the element type of `dtype`.
template <class F>
inline auto with_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      throw std::runtime_error("velm: expected float32, bfloat16 or float16");
  }
}

}  // namespace velm::simd
