// A tensor between its operator and a kernel. Neither torch nor CUDA: included on both sides.
#pragma once

#include <cstddef>
#include <cstdint>

namespace velm::device {

// What kernels compute with, and what masks, indices and seeds are.
enum class Dtype : uint8_t { float32, float16, bfloat16, boolean, int32, int64 };

inline std::size_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::boolean:
      return 1;
    case Dtype::float16:
    case Dtype::bfloat16:
      return 2;
    case Dtype::float32:
    case Dtype::int32:
      return 4;
    case Dtype::int64:
      return 8;
  }
  return 0;
}

// A tensor on its way to kernels. Sizes and strides, in elements, are those of its last dimensions; what it has fewer
// of comes first, with size 1. The stride of what has size 1 is 0. Null where there is no tensor or no element.
struct View {
  void* data = nullptr;
  // From the first element to the last, holes of the strides included.
  std::size_t bytes = 0;
  Dtype dtype = Dtype::float32;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {};

  explicit operator bool() const { return data != nullptr; }
  // Elements that are there.
  int64_t numel() const { return data ? size[0] * size[1] * size[2] * size[3] : 0; }
};

// What is said of a tensor that is not there: the sizes and the type that it would have.
inline View absent(const View& like, Dtype dtype) {
  View view{nullptr, 0, dtype};
  for (int i = 0; i < 4; ++i) view.size[i] = like.size[i];
  return view;
}
inline View absent(const View& like) {
  return absent(like, like.dtype);
}

// Whether all rows, along the last dimension, begin where `width` elements can be read at a time.
inline bool is_aligned(const View& rows, int width) {
  const std::size_t bytes = bytes_of(rows.dtype) * static_cast<std::size_t>(width);
  return reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 && rows.stride[0] % width == 0 &&
         rows.stride[1] % width == 0 && rows.stride[2] % width == 0;
}

// A cudaStream_t.
using Stream = void*;

}  // namespace velm::device
