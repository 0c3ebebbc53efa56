// gated_residual as torch operators on CUDA kernels.

#include "attention/gated_residual/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

GatedResidual problem_of(int64_t rows, int64_t dim, const Tensor& gate, const std::optional<Tensor>& row_mask) {
  GatedResidual p{};
  p.rows = rows;
  p.dim = dim;
  p.gate = view_of(gate);
  p.gate_dtype = dtype_of(gate);
  // With one column either way is right; the kernels add the rows of a block together in one of them.
  p.gate_is_row = gate.numel() == dim;
  p.row_mask = view_of(row_mask);
  return p;
}

void set_x(GatedResidual& p, const Tensor& x) {
  p.x = view_of(x);
  p.x_stride = x.stride(0);
}

void gated_residual_forward_op(Tensor residual, Tensor x, Tensor gate, std::optional<Tensor> row_mask, Tensor out) {
  const Current current(x);
  GatedResidual p = problem_of(x.size(0), x.size(1), gate, row_mask);
  set_x(p, x);
  p.x_dtype = dtype_of(x);
  p.residual = view_of(residual);
  p.residual_dtype = dtype_of(residual);
  p.residual_stride = residual.stride(0);
  p.out = view_of(out);
  p.out_dtype = dtype_of(out);
  gated_residual_forward(p, current.stream());
}

void gated_residual_backward_op(Tensor grad, std::optional<Tensor> x, Tensor gate, std::optional<Tensor> row_mask,
                                ScalarType x_dtype, std::optional<Tensor> grad_x, std::optional<Tensor> grad_gate) {
  const Current current(grad);
  GatedResidual p = problem_of(grad.size(0), grad.size(1), gate, row_mask);
  if (x) set_x(p, *x);
  p.x_dtype = dtype_of(x_dtype);
  p.grad = view_of(grad);
  p.grad_dtype = dtype_of(grad);
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
  m.impl("gated_residual_forward", TORCH_BOX(&gated_residual_forward_op));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward_op));
}

}  // namespace
}  // namespace velm::cuda
