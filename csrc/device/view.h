// A tensor between its operator and a kernel. Neither torch nor CUDA: included on both sides.
#pragma once

#include "device/span.h"

namespace velm::device {

// A tensor on its way to kernels. Sizes and strides, in elements, are those of its last dimensions; what it has fewer
// of comes first, with size 1. The stride of what has size 1 is 0. Null where there is no tensor or no element.
struct View : Span {
  Dtype dtype = Dtype::float32;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {};
};

}  // namespace velm::device
