// weighted_sum as torch operators on CUDA kernels.

#include "fusion/weighted_sum/cuda.h"

#include <vector>

#include "device/tensor.h"
#include "fusion/regions.h"

namespace velm::cuda {
namespace {

using namespace device;

void check_count(int64_t count) {
  if (count > kMostFeatures) throw std::runtime_error("velm: weighted_sum: at most 60 features");
}

void weighted_sum_forward_op(std::vector<Tensor> features, Tensor weights, Tensor out) {
  check_count(static_cast<int64_t>(features.size()));
  const Current current(weights);
  WeightedSum p{};
  p.count = static_cast<int>(features.size());
  p.weights = view_of(weights);
  for (int i = 0; i < p.count; ++i) p.feature[i].from = view_of(features[static_cast<size_t>(i)]);
  p.out = view_of(out);
  weighted_sum_forward(p, current.stream());
}

void weighted_sum_backward_op(Tensor grad, std::vector<Tensor> features, Tensor weights, std::vector<bool> broadcast,
                              std::vector<std::optional<Tensor>> grad_features, std::optional<Tensor> grad_weights) {
  check_count(weights.size(1));
  const Current current(grad);
  WeightedSum p{};
  p.count = static_cast<int>(weights.size(1));
  p.weights = view_of(weights);
  p.out = view_of(grad);
  p.grad_weights = view_of(grad_weights);
  bool needs_sums = false;
  for (int i = 0; i < p.count; ++i) {
    WeightedFeature& feature = p.feature[i];
    const auto at = static_cast<size_t>(i);
    feature.is_broadcast = broadcast[at];
    feature.grad = view_of(grad_features[at]);
    if (grad_weights) feature.from = view_of(features[at]);
    needs_sums = needs_sums || (feature.is_broadcast && (grad_weights || grad_features[at]));
  }
  const int64_t blocks = p.batch() * region_blocks(p.regions());
  const auto floats = [&](bool wanted, int64_t count) {
    return torch::stable::new_empty(grad, {wanted ? count : 0}, ScalarType::Float);
  };
  Tensor products =
      floats(grad_weights.has_value(), blocks * ((p.dim() + kProductColumns - 1) / kProductColumns) * p.count);
  Tensor parts = floats(needs_sums, blocks * p.dim()), sums = floats(needs_sums, p.batch() * p.dim());
  p.products = view_of(products);
  p.parts = view_of(parts);
  p.sums = view_of(sums);
  weighted_sum_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "weighted_sum_forward", weighted_sum_forward_op);
  VELM_KERNEL(m, "weighted_sum_backward", weighted_sum_backward_op);
}

}  // namespace
}  // namespace velm::cuda
