// film and weighted_sum on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/span.h"

namespace velm::cuda {

using device::Dtype;
using device::Span;
using device::Stream;

// Regions that a block goes through. Sums over the regions of an entry are left by each block in `parts`, and added.
constexpr int64_t kModulatedRegions = 32;
inline int64_t modulated_blocks(int64_t regions) {
  return (regions + kModulatedRegions - 1) / kModulatedRegions;
}

// (offset + gamma) * x + beta for x (batch, regions, dim), last stride 1 or, with regions_contiguous, the one before
// it; gamma and beta (batch, dim). Out, grad and grad_x are contiguous in the order of x.
struct Film {
  int64_t batch, regions, dim;
  Dtype dtype;
  bool regions_contiguous;
  float offset;
  // x is null in backward where gamma needs no gradient, gamma where x needs none.
  Span x, gamma, beta;
  // The other stride of x is that of a region, with regions_contiguous that of a feature.
  int64_t x_batch_stride, x_stride, gamma_stride, beta_stride;
  Span out, grad;
  // Those that are wanted.
  Span grad_x, grad_gamma, grad_beta;
  // (batch, modulated_blocks, 2, dim) floats, where regions are not contiguous.
  Span parts;
};

void film_forward(const Film& problem, Stream stream);
void film_backward(const Film& problem, Stream stream);

constexpr int kMostFeatures = 60;
// Columns that the sums of products of one block are over.
constexpr int64_t kProductColumns = 128;

struct WeightedFeature {
  Span from, grad;
  int64_t batch_stride, region_stride;
  // One region of several, with region stride 0.
  bool is_broadcast;
};

// The sum of weights[batch, i] * feature[i] (batch, regions, dim), last stride 1; the rest is contiguous.
struct WeightedSum {
  int64_t batch, regions, dim;
  int count;
  Dtype dtype;
  Span weights;
  WeightedFeature feature[kMostFeatures];
  Span out;
  // Backward: grad_weights may be null, and then features are.
  Span grad, grad_weights;
  // Floats: (batch, modulated_blocks, columns / kProductColumns, count); where a feature is broadcast (batch,
  // modulated_blocks, dim) and their sum (batch, dim).
  Span products, parts, sums;
};

void weighted_sum_forward(const WeightedSum& problem, Stream stream);
void weighted_sum_backward(const WeightedSum& problem, Stream stream);

}  // namespace velm::cuda
