// low_rank_fusion on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

constexpr int kMostInputs = 4;

// x (rows, dim) with last stride 1, factor (rank, 1 + dim, out). A row serves as many neighbours of the result as are
// left for it.
struct LowRankInput {
  View x, factor;
  // float32 (rank, rows, out): projections that are there already, or else where they are to be left, if anywhere.
  View projections;
  bool is_projected;
};

struct LowRankFusion {
  int count;
  LowRankInput inputs[kMostInputs];
  // Without weight it is 1; without z (rows, out) nothing but the projections of one input is wanted.
  View weight, bias, z;
  // float32, as many as the function below says.
  View partials;

  Dtype dtype() const { return inputs[0].x.dtype; }
  int64_t rows() const { return z ? z.size[2] : inputs[0].x.size[2]; }
  int64_t rank() const { return inputs[0].factor.size[1]; }
  int64_t out() const { return inputs[0].factor.size[3]; }
};

// Floats of the sums that several blocks leave to be added up.
int64_t low_rank_partials(const LowRankFusion& problem);
void low_rank_fusion(const LowRankFusion& problem, Stream stream);

// Of some ranks: grad (rows, out), projections (ranks, rows of m, out) in float32, weight (ranks,). Rows of m are those
// of the result, or those of the inputs with one row for several of it, the same number for each of these.
struct LowRankGradients {
  int count;
  View grad, weight, projections[kMostInputs];
  // (low_rank_gradient_rows, ranks * out), those that are there.
  View to[kMostInputs];
  // float32 (ranks, low_rank_gradient_blocks): the sums of grad times all projections.
  View sums;

  Dtype dtype() const { return grad.dtype; }
  int64_t rows() const { return grad.size[2]; }
  int64_t out() const { return grad.size[3]; }
  int64_t ranks() const { return weight.size[3]; }
  int64_t input_rows(int m) const { return projections[m].size[2]; }
};

// Rows of m, each as often as there are sums for it to be added up.
int64_t low_rank_gradient_rows(const LowRankGradients& problem, int m);
// As `to` and everything else but sums are there.
int64_t low_rank_gradient_blocks(const LowRankGradients& problem);
void low_rank_gradients(const LowRankGradients& problem, Stream stream);

}  // namespace velm::cuda
