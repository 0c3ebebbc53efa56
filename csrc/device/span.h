// What stands between a tensor and a kernel. Neither torch nor CUDA: included on both sides.
#pragma once

#include <cstddef>
#include <cstdint>

namespace velm::device {

// Memory of the device from the first element of a tensor to its last, holes of its strides included.
struct Span {
  void* data = nullptr;
  std::size_t bytes = 0;

  explicit operator bool() const { return data != nullptr; }
};

enum class Dtype : uint8_t { float32, float16, bfloat16 };

inline std::size_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

// Whether rows `stride` elements apart, beginning at `span`, can be read `width` elements at a time.
inline bool is_aligned(const Span& span, Dtype dtype, int64_t stride, int width) {
  const std::size_t bytes = bytes_of(dtype) * static_cast<std::size_t>(width);
  return reinterpret_cast<uintptr_t>(span.data) % bytes == 0 && stride % width == 0;
}

// A cudaStream_t.
using Stream = void*;

}  // namespace velm::device
