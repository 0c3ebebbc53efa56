// From a tensor to what kernels are handed of it.
#pragma once

#include "device/tensor.h"
#include "device/view.h"

namespace velm::device {

// Of at most four dimensions. Where elements are no floating-point numbers their type is not asked for.
inline View view_of(const Tensor& t) {
  View view{span_of(t)};
  if (t.scalar_type() != ScalarType::Bool) view.dtype = dtype_of(t);
  const int64_t dims = t.dim(), first = 4 - dims;
  if (first < 0) throw std::runtime_error("velm: expected at most four dimensions");
  for (int64_t i = 0; i < dims; ++i) {
    view.size[first + i] = t.size(i);
    view.stride[first + i] = t.size(i) == 1 ? 0 : t.stride(i);
  }
  return view;
}
inline View view_of(const std::optional<Tensor>& t) {
  return t ? view_of(*t) : View{};
}

}  // namespace velm::device
