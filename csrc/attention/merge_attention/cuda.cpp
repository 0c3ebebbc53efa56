// merge_attention as torch operators on CUDA kernels.

#include "attention/merge_attention/cuda.h"

#include <vector>

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

Merge problem_of(const Tensor& out, const std::vector<Tensor>& outs, const std::vector<Tensor>& logsumexps) {
  if (logsumexps.size() > kMostShards) throw std::runtime_error("velm: merge_attention: at most 32 shards");
  Merge p{};
  p.shards = static_cast<int>(logsumexps.size());
  p.out = view_of(out);
  for (size_t s = 0; s < logsumexps.size(); ++s) {
    if (!outs.empty()) p.shard[s].out = view_of(outs[s]);
    p.shard[s].logsumexp = view_of(logsumexps[s]);
  }
  return p;
}

void merge_attention_forward_op(std::vector<Tensor> outs, std::vector<Tensor> logsumexps, Tensor out,
                                Tensor logsumexp) {
  const Current current(out);
  Merge p = problem_of(out, outs, logsumexps);
  p.logsumexp = view_of(logsumexp);
  merge_attention_forward(p, current.stream());
}

void merge_attention_backward_op(Tensor grad_out, std::optional<Tensor> grad_logsumexp, std::vector<Tensor> outs,
                                 std::vector<Tensor> logsumexps, Tensor logsumexp,
                                 std::vector<std::optional<Tensor>> grad_outs,
                                 std::vector<std::optional<Tensor>> grad_logsumexps) {
  const Current current(grad_out);
  Merge p = problem_of(grad_out, outs, logsumexps);
  p.logsumexp = view_of(logsumexp);
  p.grad_logsumexp = view_of(grad_logsumexp);
  const size_t shards = logsumexps.size();
  const Tensor *some_out = nullptr, *some_lse = nullptr;
  for (size_t s = 0; s < shards; ++s) {
    if (grad_outs[s]) some_out = &*grad_outs[s];
    if (grad_logsumexps[s]) some_lse = &*grad_logsumexps[s];
  }
  // The kernel writes for all shards or none: what is not wanted goes where nobody reads it. Of `out` one thread writes
  // an element for all shards, of the logsumexps one for each.
  std::optional<Tensor> unread_out;
  std::vector<Tensor> unread_lses;
  for (size_t s = 0; s < shards; ++s) {
    if (some_out && !grad_outs[s] && !unread_out) unread_out = torch::stable::empty_like(*some_out);
    if (some_out) p.shard[s].grad_out = view_of(grad_outs[s] ? *grad_outs[s] : *unread_out);
    if (!some_lse) continue;
    if (!grad_logsumexps[s]) unread_lses.push_back(torch::stable::empty_like(*some_lse));
    p.shard[s].grad_logsumexp = view_of(grad_logsumexps[s] ? *grad_logsumexps[s] : unread_lses.back());
  }
  merge_attention_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "merge_attention_forward", merge_attention_forward_op);
  VELM_KERNEL(m, "merge_attention_backward", merge_attention_backward_op);
}

}  // namespace
}  // namespace velm::cuda
