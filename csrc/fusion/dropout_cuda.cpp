// dropout_residual as a torch operator on a CUDA kernel.

#include "fusion/dropout_cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

Tensor run(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double dropout_p) {
  const Current current(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  DropoutResidual p{};
  p.rows = x.size(0);
  p.dim = x.size(1);
  p.dtype = dtype_of(x);
  p.x = span_of(x);
  p.x_stride = x.stride(0);
  p.residual = span_of(residual);
  p.residual_stride = residual ? residual->stride(0) : 0;
  p.out = span_of(out);
  p.seed = span_of(seed);
  p.dropout_p = dropout_p;
  dropout_residual(p, current.stream());
  return out;
}

Tensor dropout_residual_forward(Tensor x, std::optional<Tensor> residual, Tensor seed, double dropout_p) {
  return run(x, residual, seed, dropout_p);
}
Tensor dropout_residual_backward(Tensor grad, Tensor seed, double dropout_p) {
  return run(grad, std::nullopt, seed, dropout_p);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("dropout_residual_forward", TORCH_BOX(&dropout_residual_forward));
  m.impl("dropout_residual_backward", TORCH_BOX(&dropout_residual_backward));
}

}  // namespace
}  // namespace velm::cuda
