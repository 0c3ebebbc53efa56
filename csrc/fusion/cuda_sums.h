// Sums of a few rows on a CUDA device: what several blocks of a kernel leave, and gradients of biases.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// to = bias + the sum over so many parts of partials (parts, elements) in float32, in their order; bias repeats. `to`
// may be null.
void sum_parts(const View& partials, const View& bias, const View& to, int64_t parts, Stream stream);

// to (dim,) = the sum of rows (rows, dim), last stride 1.
void sum_rows(const View& rows, const View& to, Stream stream);

}  // namespace velm::cuda
