// bilinear as torch operators on CUDA kernels.

#include "fusion/bilinear/cuda.h"

#include <limits>

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

Bilinear problem_of(const Tensor& x, const Tensor& y, const Tensor& weight) {
  Bilinear p{};
  p.x = view_of(x);
  p.y = view_of(y);
  p.weight = view_of(weight);
  for (const int64_t size : {p.dx(), p.dy(), p.out()})
    if (size > std::numeric_limits<int32_t>::max() / 2) throw std::runtime_error("velm: more than 2^30 features");
  return p;
}

void bilinear_forward(Tensor x, Tensor y, Tensor weight, std::optional<Tensor> bias, Tensor out) {
  const Current current(x);
  Bilinear p = problem_of(x, y, weight);
  p.bias = view_of(bias);
  Tensor partials = torch::stable::new_empty(x, {bilinear_forward_partials(p)}, ScalarType::Float);
  p.z = view_of(out);
  p.partials = view_of(partials);
  cuda::bilinear_forward(p, current.stream());
}

void bilinear_backward(Tensor grad, Tensor x, Tensor y, Tensor weight, std::optional<Tensor> grad_x,
                       std::optional<Tensor> grad_y, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias) {
  const Current current(x);
  Bilinear p = problem_of(x, y, weight);
  p.grad = view_of(grad);
  const int64_t sums = bilinear_backward_partials(p, grad_x.has_value(), grad_y.has_value());
  Tensor partials = torch::stable::new_empty(x, {sums}, ScalarType::Float);
  p.grad_x = view_of(grad_x);
  p.grad_y = view_of(grad_y);
  p.grad_weight = view_of(grad_weight);
  p.grad_bias = view_of(grad_bias);
  p.partials = view_of(partials);
  cuda::bilinear_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "bilinear_forward", bilinear_forward);
  VELM_KERNEL(m, "bilinear_backward", bilinear_backward);
}

}  // namespace
}  // namespace velm::cuda
