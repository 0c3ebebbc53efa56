// match_rows on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

struct MatchedRows {
  // (batch, rows, dim) with last stride 1.
  View rows;
  // One over their norms, float (batch, rows): written by the first of the kernels.
  View inverse_norms;
};

// For each row of a, the largest cosine of its angle to a row of b, and the first row of b that has it.
struct MatchRows {
  MatchedRows a, b;
  // float and int32 (batch, rows of a).
  View similarity, best;
};

void match_rows(const MatchRows& problem, Stream stream);

}  // namespace velm::cuda
