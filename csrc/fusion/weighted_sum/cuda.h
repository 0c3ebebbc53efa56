// weighted_sum on a CUDA device: what the operator hands to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

constexpr int kMostFeatures = 60;
// Columns that the sums of products of one block are over.
constexpr int64_t kProductColumns = 128;

struct WeightedFeature {
  View from, grad;
  int64_t batch_stride, region_stride;
  // One region of several, with region stride 0.
  bool is_broadcast;
};

// The sum of weights[batch, i] * feature[i] (batch, regions, dim), last stride 1; the rest is contiguous.
struct WeightedSum {
  int64_t batch, regions, dim;
  int count;
  Dtype dtype;
  View weights;
  WeightedFeature feature[kMostFeatures];
  View out;
  // Backward: grad_weights may be null, and then features are.
  View grad, grad_weights;
  // Floats: (batch, region_blocks, columns / kProductColumns, count); where a feature is broadcast (batch,
  // region_blocks, dim) and their sum (batch, dim).
  View products, parts, sums;
};

void weighted_sum_forward(const WeightedSum& problem, Stream stream);
void weighted_sum_backward(const WeightedSum& problem, Stream stream);

}  // namespace velm::cuda
