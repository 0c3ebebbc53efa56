// Count sketches on a CUDA device: what the operator hands to the kernel.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

struct CountSketch {
  // (rows, features), last stride 1.
  View x;
  // int32: the features in the order of their buckets, and where each of them begins, dim + 1.
  View order;
  // float32: (features,) and (rows, dim).
  View sign, out;
};

void count_sketch(const CountSketch& problem, Stream stream);

}  // namespace velm::cuda
