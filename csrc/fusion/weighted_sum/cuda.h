// weighted_sum on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

constexpr int kMostFeatures = 60;
// Columns that the sums of products of one block are over.
constexpr int64_t kProductColumns = 128;

struct WeightedFeature {
  // (batch, regions or 1, dim), last stride 1.
  View from, grad;
  // One region of several.
  bool is_broadcast;
};

// The sum of weights[batch, i] * feature[i]; all but the features is contiguous.
struct WeightedSum {
  int count;
  View weights;
  WeightedFeature feature[kMostFeatures];
  // (batch, regions, dim): the result, in backward its gradient.
  View out;
  // Backward: it may be null, and then features are.
  View grad_weights;
  // Floats: (batch, region_blocks, columns / kProductColumns, count); where a feature is broadcast (batch,
  // region_blocks, dim) and their sum (batch, dim).
  View products, parts, sums;

  int64_t batch() const { return out.size[1]; }
  int64_t regions() const { return out.size[2]; }
  int64_t dim() const { return out.size[3]; }
};

void weighted_sum_forward(const WeightedSum& problem, Stream stream);
void weighted_sum_backward(const WeightedSum& problem, Stream stream);

}  // namespace velm::cuda
