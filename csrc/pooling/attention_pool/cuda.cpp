// attention_pool's middle as torch operators on CUDA kernels.

#include "pooling/attention_pool/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

struct Call {
  AttentionPool p{};
  Tensor weights;

  Call(const Tensor& x, const Tensor& rows, const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask,
       const std::optional<Tensor>& cu_seqlens)
      : weights(x) {
    p.bounds = view_of(cu_seqlens);
    p.lengths = view_of(lengths);
    p.mask = view_of(mask);
    p.x = view_of(x);
    p.queries = view_of(rows);
    weights = new_weights(x);
    p.weights = view_of(weights);
  }
  Tensor new_weights(const Tensor& x) const {
    const int64_t rows = p.bounds ? p.rows() : p.segments() * p.rows();
    return torch::stable::new_empty(x, {rows, p.tokens()}, ScalarType::Float);
  }
};

void attention_pool_forward_op(Tensor x, Tensor rows, std::optional<Tensor> lengths, std::optional<Tensor> mask,
                               std::optional<Tensor> cu_seqlens, Tensor out, Tensor logsumexp) {
  const Current current(x);
  Call call(x, rows, lengths, mask, cu_seqlens);
  AttentionPool& p = call.p;
  p.out = view_of(out);
  p.logsumexp = view_of(logsumexp);
  attention_pool_forward(p, current.stream());
}

void attention_pool_backward_op(Tensor grad, Tensor x, Tensor rows, std::optional<Tensor> lengths,
                                std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, Tensor out,
                                Tensor logsumexp, std::optional<Tensor> grad_x, std::optional<Tensor> grad_rows) {
  const Current current(x);
  Call call(x, rows, lengths, mask, cu_seqlens);
  AttentionPool& p = call.p;
  Tensor grad_weights = call.new_weights(x);
  Tensor partials = torch::stable::new_empty(x, {p.is_shared() && grad_rows ? p.segments() * p.rows() * p.dim() : 0},
                                             ScalarType::Float);
  p.grad = view_of(grad);
  p.out = view_of(out);
  p.logsumexp = view_of(logsumexp);
  p.grad_weights = view_of(grad_weights);
  p.grad_x = view_of(grad_x);
  p.grad_queries = view_of(grad_rows);
  p.partials = view_of(partials);
  attention_pool_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "attention_pool_forward", attention_pool_forward_op);
  VELM_KERNEL(m, "attention_pool_backward", attention_pool_backward_op);
}

}  // namespace
}  // namespace velm::cuda
