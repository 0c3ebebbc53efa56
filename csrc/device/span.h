// What stands between a tensor and a kernel. Neither torch nor CUDA: included on both sides.
#pragma once

#include <cstddef>

namespace velm::device {

// Memory of the device from the first element of a tensor to its last, holes of its strides included.
struct Span {
  void* data = nullptr;
  std::size_t bytes = 0;

  explicit operator bool() const { return data != nullptr; }
};

// A cudaStream_t.
using Stream = void*;

}  // namespace velm::device
