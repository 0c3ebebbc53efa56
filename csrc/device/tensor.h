// From the tensors of an operator to what kernels take. Compiled twice: for the CUDA library, and for the one that runs
// the same kernels on the host (VELM_DEVICE_ON_HOST).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "common/kernel.h"
#include "device/view.h"

#if defined(VELM_DEVICE_ON_HOST)
#define VELM_DISPATCH_KEY CPU
#else
#define VELM_DISPATCH_KEY CUDA
// Part of torch's stable interface, but its header shows it only to a build for CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace velm::device {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Bool:
      return Dtype::boolean;
    case ScalarType::Int:
      return Dtype::int32;
    case ScalarType::Long:
      return Dtype::int64;
    default:
      throw std::runtime_error("velm: expected float32, bfloat16 or float16, and integers of 32 or 64 bits");
  }
}

inline Dtype dtype_of(const Tensor& t) {
  return dtype_of(t.scalar_type());
}

// Of at most four dimensions.
inline View view_of(const Tensor& t) {
  View view;
  view.dtype = dtype_of(t);
  const int64_t dims = t.dim(), first = 4 - dims;
  if (first < 0) throw std::runtime_error("velm: expected at most four dimensions");
  // No stride of a tensor is negative, so that the last element lies at the end.
  int64_t last = 0;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t size = t.size(i), stride = size == 1 ? 0 : t.stride(i);
    view.size[first + i] = size;
    view.stride[first + i] = stride;
    last += (size - 1) * stride;
  }
  if (t.numel() == 0) return view;
  view.data = const_cast<void*>(t.const_data_ptr());
  view.bytes = bytes_of(view.dtype) * static_cast<std::size_t>(last + 1);
  return view;
}
inline View view_of(const std::optional<Tensor>& t) {
  return t ? view_of(*t) : View{};
}

inline Tensor nothing(const Tensor& like) {
  return torch::stable::new_empty(like, {0});
}

// The device of a tensor made current, and its stream.
class Current {
 public:
#if defined(VELM_DEVICE_ON_HOST)
  explicit Current(const Tensor&) {}
#else
  explicit Current(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#endif
  Stream stream() const { return stream_; }

 private:
#if !defined(VELM_DEVICE_ON_HOST)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

}  // namespace velm::device
