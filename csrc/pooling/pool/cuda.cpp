// Pooling over tokens as torch operators on CUDA kernels.

#include "pooling/pool/cuda.h"

#include "common/needed.h"
#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

Pool problem_of(const View& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask,
                const std::optional<Tensor>& cu_seqlens, bool tokens_contiguous, int64_t mode, double power) {
  Pool p{};
  p.mode = static_cast<PoolMode>(mode);
  p.p = static_cast<float>(power);
  p.bounds = view_of(cu_seqlens);
  p.lengths = view_of(lengths);
  p.mask = view_of(mask);
  p.x = x;
  p.tokens_contiguous = tokens_contiguous;
  return p;
}

void pool_forward_op(Tensor x, std::optional<Tensor> lengths, std::optional<Tensor> mask,
                     std::optional<Tensor> cu_seqlens, bool tokens_contiguous, int64_t mode, double power, Tensor out,
                     std::optional<Tensor> stats) {
  const Current current(x);
  Pool p = problem_of(view_of(x), lengths, mask, cu_seqlens, tokens_contiguous, mode, power);
  p.out = view_of(out);
  p.stats = view_of(stats);
  pool_forward(p, current.stream());
}

void pool_backward_op(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> lengths, std::optional<Tensor> mask,
                      std::optional<Tensor> cu_seqlens, Tensor stats, int64_t, bool tokens_contiguous, int64_t mode,
                      double power, Tensor grad_x) {
  const Current current(grad);
  const View to = view_of(grad_x);
  const bool reads_x = mode == kPoolLogSumExp || mode == kPoolGem;
  Pool p = problem_of(reads_x ? view_of(needed(x, "x")) : absent(to), lengths, mask, cu_seqlens, tokens_contiguous,
                      mode, power);
  Tensor counts = torch::stable::new_empty(grad, {p.segments()}, ScalarType::Int);
  p.stats = view_of(stats);
  p.grad = view_of(grad);
  p.grad_x = to;
  p.counts = view_of(counts);
  pool_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "pool_forward", pool_forward_op);
  VELM_KERNEL(m, "pool_backward", pool_backward_op);
}

}  // namespace
}  // namespace velm::cuda
