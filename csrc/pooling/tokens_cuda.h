// Tokens that are selected or merged, on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/span.h"

namespace velm::cuda {

using device::Dtype;
using device::Span;
using device::Stream;

// Row m of out is the sum of weight[e] x[index[e]] over offsets[m] <= e < offsets[m + 1], or of e = m alone.
struct GatherRows {
  int64_t batch, rows, dim, entries, out_rows;
  Dtype dtype;
  // (batch, rows, dim) with last stride 1.
  Span x;
  int64_t batch_stride, row_stride;
  // int32 (batch, entries); int32 (batch, out_rows + 1) or null; float (batch, entries) or null.
  Span index, offsets, weight;
  // (batch, out_rows, dim), contiguous.
  Span out;
};

// Rows (batch, rows, dim) with last stride 1.
struct MatchedRows {
  Span data;
  int64_t rows, batch_stride, row_stride;
  // One over their norms, float (batch, rows): written by the first of the kernels.
  Span inverse_norms;
};

// For each row of a, the largest cosine of its angle to a row of b, and the first row of b that has it.
struct MatchRows {
  int64_t batch, dim;
  Dtype dtype;
  MatchedRows a, b;
  // float and int32 (batch, rows of a).
  Span similarity, best;
};

void gather_rows(const GatherRows& problem, Stream stream);
void match_rows(const MatchRows& problem, Stream stream);

}  // namespace velm::cuda
