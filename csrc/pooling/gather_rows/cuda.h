// gather_rows on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// Row m of out is the sum of weight[e] x[index[e]] over offsets[m] <= e < offsets[m + 1], or of e = m alone.
struct GatherRows {
  // (batch, rows, dim) with last stride 1.
  View x;
  // int32 (batch, entries); int32 (batch, out_rows + 1) or null; float (batch, entries) or null.
  View index, offsets, weight;
  // (batch, out_rows, dim), contiguous.
  View out;
};

void gather_rows(const GatherRows& problem, Stream stream);

}  // namespace velm::cuda
