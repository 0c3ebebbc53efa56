// Pooling over tokens as torch operators on CUDA kernels.

#include "pooling/pool/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

Pool problem_of(int64_t segments, int64_t tokens, int64_t dim, const std::optional<Tensor>& lengths,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens, bool tokens_contiguous,
                int64_t mode, double power) {
  Pool p{};
  p.segments = segments;
  p.tokens = tokens;
  p.dim = dim;
  p.mode = static_cast<PoolMode>(mode);
  p.p = static_cast<float>(power);
  p.bounds = view_of(cu_seqlens);
  p.lengths = view_of(lengths);
  p.mask = view_of(mask);
  p.tokens_contiguous = tokens_contiguous;
  return p;
}

void set_x(Pool& p, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  p.x = view_of(x);
  p.segment_stride = last == 2 ? x.stride(0) : 0;
  p.token_stride = x.stride(last - 1);
  p.dim_stride = x.stride(last);
}

void pool_forward_op(Tensor x, std::optional<Tensor> lengths, std::optional<Tensor> mask,
                     std::optional<Tensor> cu_seqlens, bool tokens_contiguous, int64_t mode, double power, Tensor out,
                     std::optional<Tensor> stats) {
  const Current current(x);
  Pool p = problem_of(out.size(0), x.size(x.dim() - 2), out.size(1), lengths, mask, cu_seqlens, tokens_contiguous, mode,
                      power);
  p.dtype = dtype_of(x);
  set_x(p, x);
  p.out = view_of(out);
  p.stats = view_of(stats);
  pool_forward(p, current.stream());
}

void pool_backward_op(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> lengths, std::optional<Tensor> mask,
                      std::optional<Tensor> cu_seqlens, Tensor stats, int64_t tokens, bool tokens_contiguous,
                      int64_t mode, double power, Tensor grad_x) {
  const Current current(grad);
  const int64_t segments = grad.size(0), dim = grad.size(1);
  Tensor counts = torch::stable::new_empty(grad, {segments}, ScalarType::Int);
  Pool p = problem_of(segments, tokens, dim, lengths, mask, cu_seqlens, tokens_contiguous, mode, power);
  p.dtype = dtype_of(grad);
  if (x) set_x(p, *x);
  p.stats = view_of(stats);
  p.grad = view_of(grad);
  p.grad_x = view_of(grad_x);
  p.counts = view_of(counts);
  pool_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("pool_forward", TORCH_BOX(&pool_forward_op));
  m.impl("pool_backward", TORCH_BOX(&pool_backward_op));
}

}  // namespace
}  // namespace velm::cuda
