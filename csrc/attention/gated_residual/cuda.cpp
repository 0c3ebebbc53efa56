// gated_residual as torch operators on CUDA kernels.

#include "attention/gated_residual/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

void gated_residual_forward_op(Tensor residual, Tensor x, Tensor gate, std::optional<Tensor> row_mask, Tensor out) {
  const Current current(x);
  GatedResidual p{};
  p.gate = view_of(gate);
  p.row_mask = view_of(row_mask);
  p.x = view_of(x);
  p.residual = view_of(residual);
  p.out = view_of(out);
  gated_residual_forward(p, current.stream());
}

void gated_residual_backward_op(Tensor grad, std::optional<Tensor> x, Tensor gate, std::optional<Tensor> row_mask,
                                ScalarType x_dtype, std::optional<Tensor> grad_x, std::optional<Tensor> grad_gate) {
  const Current current(grad);
  GatedResidual p{};
  p.gate = view_of(gate);
  p.row_mask = view_of(row_mask);
  p.x = x ? view_of(*x) : absent(view_of(grad), dtype_of(x_dtype));
  p.grad = view_of(grad);
  p.grad_x = view_of(grad_x);
  p.grad_gate = view_of(grad_gate);
  std::optional<Tensor> partials;
  if (p.grad_gate) {
    partials = torch::stable::new_empty(grad, {gated_residual_partials(p)}, ScalarType::Float);
    p.partials = view_of(*partials);
  }
  gated_residual_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "gated_residual_forward", gated_residual_forward_op);
  VELM_KERNEL(m, "gated_residual_backward", gated_residual_backward_op);
}

}  // namespace
}  // namespace velm::cuda
