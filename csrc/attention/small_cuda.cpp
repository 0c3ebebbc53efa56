// gated_residual and merge_attention as torch operators on CUDA kernels.

#include <tuple>
#include <vector>

#include "attention/gated_residual_cuda.h"
#include "attention/merge_cuda.h"
#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int64_t kGradX = 1, kGradGate = 2;
constexpr int64_t kGradOuts = 1, kGradLogsumexps = 2;

GatedResidual problem_of(int64_t rows, int64_t dim, const Tensor& x, const Tensor& gate,
                         const std::optional<Tensor>& row_mask) {
  GatedResidual p{};
  p.rows = rows;
  p.dim = dim;
  p.gate = span_of(gate);
  p.gate_dtype = dtype_of(gate);
  // With one column either way is right; the kernels add the rows of a block together in one of them.
  p.gate_is_row = gate.numel() == dim;
  p.row_mask = span_of(row_mask);
  p.x = span_of(x);
  p.x_dtype = dtype_of(x);
  p.x_stride = x.dim() == 2 ? x.stride(0) : 0;
  return p;
}

Tensor gated_residual_forward_op(Tensor residual, Tensor x, Tensor gate, std::optional<Tensor> row_mask) {
  const Current current(x);
  const bool same = residual.scalar_type() == x.scalar_type();
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)}, same ? x.scalar_type() : ScalarType::Float);
  GatedResidual p = problem_of(x.size(0), x.size(1), x, gate, row_mask);
  p.residual = span_of(residual);
  p.residual_dtype = dtype_of(residual);
  p.residual_stride = residual.stride(0);
  p.out = span_of(out);
  p.out_dtype = dtype_of(out);
  gated_residual_forward(p, current.stream());
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward_op(Tensor grad, Tensor x, Tensor gate,
                                                      std::optional<Tensor> row_mask, int64_t grad_mask) {
  const Current current(grad);
  const int64_t rows = grad.size(0), dim = grad.size(1);
  Tensor grad_x = grad_mask & kGradX ? torch::stable::new_empty(x, {rows, dim}) : nothing(x);
  Tensor grad_gate = grad_mask & kGradGate ? torch::stable::new_empty(gate, {gate.numel()}) : nothing(gate);
  GatedResidual p = problem_of(rows, dim, x, gate, row_mask);
  p.grad = span_of(grad);
  p.grad_dtype = dtype_of(grad);
  p.grad_x = span_of(grad_x);
  p.grad_gate = span_of(grad_gate);
  std::optional<Tensor> partials;
  if (p.grad_gate) {
    partials = torch::stable::new_empty(grad, {gated_residual_partials(p)}, ScalarType::Float);
    p.partials = span_of(*partials);
  }
  gated_residual_backward(p, current.stream());
  return {grad_x, grad_gate};
}

StridedRows rows_of(const Tensor& t) {
  return {span_of(t), t.stride(0), t.stride(1), t.stride(2)};
}

// Uninitialised (batch, heads, rows, dim), in memory (batch, rows, heads, dim).
Tensor empty_heads_last(const Tensor& like) {
  const int64_t batch = like.size(0), heads = like.size(1), rows = like.size(2), dim = like.size(3);
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, rows, heads, dim}), 1, 2);
}

Merge problem_of(const Tensor& out, const std::vector<Tensor>& outs, const std::vector<Tensor>& logsumexps) {
  if (logsumexps.size() > kMostShards) throw std::runtime_error("velm: merge_attention: at most 32 shards");
  Merge p{};
  p.batch = out.size(0);
  p.heads = out.size(1);
  p.queries = out.size(2);
  p.dim = out.size(3);
  p.dtype = dtype_of(out);
  p.shards = static_cast<int>(logsumexps.size());
  p.out = rows_of(out);
  for (size_t s = 0; s < logsumexps.size(); ++s) {
    if (!outs.empty()) p.shard[s].out = rows_of(outs[s]);
    p.shard[s].logsumexp = span_of(logsumexps[s]);
  }
  return p;
}

std::tuple<Tensor, Tensor> merge_attention_forward_op(std::vector<Tensor> outs, std::vector<Tensor> logsumexps) {
  const Current current(outs[0]);
  Tensor out = empty_heads_last(outs[0]);
  Tensor logsumexp = torch::stable::new_empty(logsumexps[0], {out.size(0), out.size(1), out.size(2)});
  Merge p = problem_of(out, outs, logsumexps);
  p.logsumexp = span_of(logsumexp);
  merge_attention_forward(p, current.stream());
  return {out, logsumexp};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> merge_attention_backward_op(Tensor grad_out,
                                                                                 std::optional<Tensor> grad_logsumexp,
                                                                                 std::vector<Tensor> outs,
                                                                                 std::vector<Tensor> logsumexps,
                                                                                 Tensor logsumexp, int64_t grad_mask) {
  const Current current(grad_out);
  Merge p = problem_of(grad_out, outs, logsumexps);
  p.logsumexp = span_of(logsumexp);
  p.grad_logsumexp = span_of(grad_logsumexp);
  p.wants_outs = grad_mask & kGradOuts;
  p.wants_logsumexps = grad_mask & kGradLogsumexps;
  std::vector<Tensor> grad_outs, grad_lses;
  for (size_t s = 0; s < logsumexps.size(); ++s) {
    if (p.wants_outs) {
      grad_outs.push_back(empty_heads_last(grad_out));
      p.shard[s].grad_out = rows_of(grad_outs.back());
    }
    if (p.wants_logsumexps) {
      grad_lses.push_back(
          torch::stable::new_empty(logsumexps[s], {logsumexp.size(0), logsumexp.size(1), logsumexp.size(2)}));
      p.shard[s].grad_logsumexp = span_of(grad_lses.back());
    }
  }
  merge_attention_backward(p, current.stream());
  return {grad_outs, grad_lses};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("gated_residual_forward", TORCH_BOX(&gated_residual_forward_op));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward_op));
  m.impl("merge_attention_forward", TORCH_BOX(&merge_attention_forward_op));
  m.impl("merge_attention_backward", TORCH_BOX(&merge_attention_backward_op));
}

}  // namespace
}  // namespace velm::cuda
