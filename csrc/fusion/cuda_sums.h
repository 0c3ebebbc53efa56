// Sums of a few rows on a CUDA device: what several blocks of a kernel leave, and gradients of biases.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// to = bias + the sum over `parts` of partials (parts, elements) in float32, in their order; bias repeats with
// `period`.
void sum_parts(const View& partials, const View& bias, const View& to, Dtype dtype, int64_t parts, int64_t elements,
               int64_t period, Stream stream);

// to = the sum of `count` rows of so many elements, `stride` apart.
void sum_rows(const View& rows, const View& to, Dtype dtype, int64_t count, int64_t stride, int64_t elements,
              Stream stream);

}  // namespace velm::cuda
