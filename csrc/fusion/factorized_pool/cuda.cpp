// factorized_pool as torch operators on CUDA kernels.

#include "fusion/factorized_pool/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

FactorizedPool problem_of(const Tensor& a, const Tensor& b, const std::optional<Tensor>& seed, int64_t factor,
                          bool inner, bool power_norm, bool l2_norm, double dropout_p) {
  FactorizedPool p{};
  p.factor = factor;
  p.inner = inner;
  p.power_norm = power_norm;
  p.l2_norm = l2_norm;
  p.a = view_of(a);
  p.b = view_of(b);
  p.seed = view_of(seed);
  p.dropout_p = dropout_p;
  return p;
}

void factorized_pool_forward(Tensor a, Tensor b, std::optional<Tensor> seed, int64_t factor, bool inner,
                             bool power_norm, bool l2_norm, double dropout_p, Tensor out) {
  const Current current(a);
  FactorizedPool p = problem_of(a, b, seed, factor, inner, power_norm, l2_norm, dropout_p);
  p.out = view_of(out);
  cuda::factorized_pool_forward(p, current.stream());
}

void factorized_pool_backward(Tensor grad, Tensor a, Tensor b, std::optional<Tensor> seed, int64_t factor, bool inner,
                              bool power_norm, bool l2_norm, double dropout_p, std::optional<Tensor> grad_a,
                              std::optional<Tensor> grad_b) {
  const Current current(a);
  FactorizedPool p = problem_of(a, b, seed, factor, inner, power_norm, l2_norm, dropout_p);
  p.grad = view_of(grad);
  p.grad_a = view_of(grad_a);
  p.grad_b = view_of(grad_b);
  cuda::factorized_pool_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "factorized_pool_forward", factorized_pool_forward);
  VELM_KERNEL(m, "factorized_pool_backward", factorized_pool_backward);
}

}  // namespace
}  // namespace velm::cuda
