// weighted_sum as torch operators on CUDA kernels.

#include "fusion/weighted_sum/cuda.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "device/tensor.h"
#include "fusion/regions.h"

namespace velm::cuda {
namespace {

using namespace device;

void set_feature(WeightedFeature& feature, const Tensor& t, int64_t regions) {
  feature.from = span_of(t);
  feature.batch_stride = t.stride(0);
  feature.region_stride = t.size(1) == regions ? t.stride(1) : 0;
}

void check_count(int64_t count) {
  if (count > kMostFeatures) throw std::runtime_error("velm: weighted_sum: at most 60 features");
}

Tensor weighted_sum_forward_op(std::vector<Tensor> features, Tensor weights) {
  check_count(static_cast<int64_t>(features.size()));
  const Current current(weights);
  WeightedSum p{};
  p.batch = features[0].size(0);
  p.dim = features[0].size(2);
  for (const Tensor& value : features) p.regions = std::max(p.regions, value.size(1));
  p.count = static_cast<int>(features.size());
  p.dtype = dtype_of(features[0]);
  p.weights = span_of(weights);
  for (int i = 0; i < p.count; ++i) set_feature(p.feature[i], features[static_cast<size_t>(i)], p.regions);
  Tensor out = torch::stable::new_empty(features[0], {p.batch, p.regions, p.dim});
  p.out = span_of(out);
  weighted_sum_forward(p, current.stream());
  return out;
}

std::tuple<std::vector<Tensor>, Tensor> weighted_sum_backward_op(Tensor grad, std::vector<Tensor> features,
                                                                 Tensor weights, int64_t broadcast, int64_t grad_mask) {
  check_count(weights.size(1));
  const Current current(grad);
  WeightedSum p{};
  p.batch = grad.size(0);
  p.regions = grad.size(1);
  p.dim = grad.size(2);
  p.count = static_cast<int>(weights.size(1));
  p.dtype = dtype_of(grad);
  p.weights = span_of(weights);
  p.grad = span_of(grad);
  const bool wants_weights = grad_mask & 1;
  Tensor grad_weights = wants_weights ? torch::stable::new_empty(weights, {p.batch, p.count}) : nothing(weights);
  p.grad_weights = span_of(grad_weights);
  std::vector<Tensor> grads;
  bool needs_sums = false;
  for (int i = 0; i < p.count; ++i) {
    WeightedFeature& feature = p.feature[i];
    const bool wanted = grad_mask >> (i + 1) & 1;
    feature.is_broadcast = broadcast >> i & 1;
    grads.push_back(wanted ? torch::stable::new_empty(grad, {p.batch, feature.is_broadcast ? 1 : p.regions, p.dim})
                           : nothing(grad));
    feature.grad = span_of(grads.back());
    if (wants_weights) set_feature(feature, features[static_cast<size_t>(i)], p.regions);
    needs_sums = needs_sums || (feature.is_broadcast && (wants_weights || wanted));
  }
  const int64_t blocks = p.batch * region_blocks(p.regions);
  const auto floats = [&](bool wanted, int64_t count) {
    return torch::stable::new_empty(grad, {wanted ? count : 0}, ScalarType::Float);
  };
  Tensor products = floats(wants_weights, blocks * ((p.dim + kProductColumns - 1) / kProductColumns) * p.count);
  Tensor parts = floats(needs_sums, blocks * p.dim), sums = floats(needs_sums, p.batch * p.dim);
  p.products = span_of(products);
  p.parts = span_of(parts);
  p.sums = span_of(sums);
  weighted_sum_backward(p, current.stream());
  return {grads, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("weighted_sum_forward", TORCH_BOX(&weighted_sum_forward_op));
  m.impl("weighted_sum_backward", TORCH_BOX(&weighted_sum_backward_op));
}

}  // namespace
}  // namespace velm::cuda
