// film on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// (offset + gamma) * x + beta for x (batch, regions, dim), last stride 1 or, with regions_contiguous, the one before
// it; gamma and beta (batch, dim). Out, grad and grad_x are contiguous in the order of x.
struct Film {
  bool regions_contiguous;
  float offset;
  // x is null in backward where gamma needs no gradient, gamma where x needs none.
  View x, gamma, beta;
  View out, grad;
  // Those that are wanted.
  View grad_x, grad_gamma, grad_beta;
  // (batch, region_blocks, 2, dim) floats, where regions are not contiguous.
  View parts;

  int64_t batch() const { return x.size[1]; }
  int64_t regions() const { return x.size[2]; }
  int64_t dim() const { return x.size[3]; }
};

void film_forward(const Film& problem, Stream stream);
void film_backward(const Film& problem, Stream stream);

}  // namespace velm::cuda
