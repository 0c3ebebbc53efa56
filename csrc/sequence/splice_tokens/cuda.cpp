// splice_tokens as torch operators on CUDA kernels.

#include "common/needed.h"
#include "device/tensor.h"
#include "sequence/cuda_rows.h"

namespace velm::cuda {
namespace {

using namespace device;

void splice_tokens_forward(Tensor token_ids, Tensor weight, Tensor features, Tensor index, Tensor, Tensor out) {
  const Current current(out);
  PlacedRows p{};
  p.base = view_of(weight);
  p.ids = view_of(token_ids);
  p.features = view_of(features);
  p.count = features.size(0);
  p.index = view_of(index);
  p.out = view_of(out);
  place_rows(p, current.stream());
}

// In place of ids and index: sorted keys, and the tokens in their order (velm_kernels/sequence/splice_tokens/cuda.py).
// The gradient of the weight is zeros when it comes.
void splice_tokens_backward(Tensor grad, std::optional<Tensor> keys, Tensor order, std::optional<Tensor> place, int64_t,
                            std::optional<Tensor> grad_weight, std::optional<Tensor> grad_features) {
  const Current current(grad);
  if (grad_weight) {
    SummedRows p{};
    p.grad = view_of(grad);
    p.keys = view_of(needed(keys, "keys"));
    p.order = view_of(order);
    p.out = view_of(*grad_weight);
    const Tensor open = torch::stable::new_empty(grad, {p.stretches() * 2 * p.dim()}, ScalarType::Float);
    p.open = view_of(open);
    sum_rows(p, current.stream());
  }
  if (grad_features)
    take_rows(view_of(grad), view_of(needed(place, "place")), view_of(*grad_features), current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "splice_tokens_forward", splice_tokens_forward);
  VELM_KERNEL(m, "splice_tokens_backward", splice_tokens_backward);
}

}  // namespace
}  // namespace velm::cuda
