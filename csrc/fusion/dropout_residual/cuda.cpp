// dropout_residual as a torch operator on a CUDA kernel.

#include "fusion/dropout_residual/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

void run(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double dropout_p,
         const Tensor& out) {
  const Current current(x);
  dropout_residual({view_of(x), view_of(residual), view_of(out), view_of(seed), dropout_p}, current.stream());
}

void dropout_residual_forward(Tensor x, std::optional<Tensor> residual, Tensor seed, double dropout_p, Tensor out) {
  run(x, residual, seed, dropout_p, out);
}
void dropout_residual_backward(Tensor grad, Tensor seed, double dropout_p, Tensor grad_x) {
  run(grad, std::nullopt, seed, dropout_p, grad_x);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "dropout_residual_forward", dropout_residual_forward);
  VELM_KERNEL(m, "dropout_residual_backward", dropout_residual_backward);
}

}  // namespace
}  // namespace velm::cuda
