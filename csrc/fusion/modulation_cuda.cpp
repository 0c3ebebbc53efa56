// film and weighted_sum as torch operators on CUDA kernels.

#include <algorithm>
#include <tuple>
#include <vector>

#include "device/tensor.h"
#include "fusion/modulation_cuda.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int64_t kGradX = 1, kGradGamma = 2, kGradBeta = 4;

Tensor empty_rows(const Tensor& like, bool regions_contiguous) {
  const int64_t batch = like.size(0), regions = like.size(1), dim = like.size(2);
  if (!regions_contiguous) return torch::stable::new_empty(like, {batch, regions, dim});
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, dim, regions}), 1, 2);
}

Film film_of(const Tensor& like, bool regions_contiguous, double gamma_offset) {
  Film p{};
  p.batch = like.size(0);
  p.regions = like.size(1);
  p.dim = like.size(2);
  p.dtype = dtype_of(like);
  p.regions_contiguous = regions_contiguous;
  p.offset = static_cast<float>(gamma_offset);
  return p;
}

void set_x(Film& p, const Tensor& x) {
  p.x = span_of(x);
  p.x_batch_stride = x.stride(0);
  p.x_stride = x.stride(p.regions_contiguous ? 2 : 1);
}

void set_gamma(Film& p, const Tensor& gamma) {
  p.gamma = span_of(gamma);
  p.gamma_stride = gamma.stride(0);
}

Tensor film_forward_op(Tensor x, Tensor gamma, Tensor beta, bool regions_contiguous, double gamma_offset) {
  const Current current(x);
  Film p = film_of(x, regions_contiguous, gamma_offset);
  set_x(p, x);
  set_gamma(p, gamma);
  p.beta = span_of(beta);
  p.beta_stride = beta.stride(0);
  Tensor out = empty_rows(x, regions_contiguous);
  p.out = span_of(out);
  film_forward(p, current.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> film_backward_op(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> gamma,
                                                    bool regions_contiguous, double gamma_offset, int64_t grad_mask) {
  const Current current(grad);
  Film p = film_of(grad, regions_contiguous, gamma_offset);
  p.grad = span_of(grad);
  const bool wants_gamma = grad_mask & kGradGamma, wants_beta = grad_mask & kGradBeta;
  if (wants_gamma) set_x(p, *x);
  if (grad_mask & kGradX) set_gamma(p, *gamma);
  Tensor grad_x = grad_mask & kGradX ? empty_rows(grad, regions_contiguous) : nothing(grad);
  Tensor grad_gamma = wants_gamma ? torch::stable::new_empty(grad, {p.batch, p.dim}) : nothing(grad);
  Tensor grad_beta = wants_beta ? torch::stable::new_empty(grad, {p.batch, p.dim}) : nothing(grad);
  p.grad_x = span_of(grad_x);
  p.grad_gamma = span_of(grad_gamma);
  p.grad_beta = span_of(grad_beta);
  const bool has_parts = (wants_gamma || wants_beta) && !regions_contiguous;
  Tensor parts = torch::stable::new_empty(grad, {has_parts ? p.batch * modulated_blocks(p.regions) * 2 * p.dim : 0},
                                          ScalarType::Float);
  p.parts = span_of(parts);
  film_backward(p, current.stream());
  return {grad_x, grad_gamma, grad_beta};
}

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
  const int64_t blocks = p.batch * modulated_blocks(p.regions);
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
  m.impl("film_forward", TORCH_BOX(&film_forward_op));
  m.impl("film_backward", TORCH_BOX(&film_backward_op));
  m.impl("weighted_sum_forward", TORCH_BOX(&weighted_sum_forward_op));
  m.impl("weighted_sum_backward", TORCH_BOX(&weighted_sum_backward_op));
}

}  // namespace
}  // namespace velm::cuda
