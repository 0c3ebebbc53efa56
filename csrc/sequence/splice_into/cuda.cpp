// splice_into as torch operators on CUDA kernels.

#include "common/needed.h"
#include "device/tensor.h"
#include "sequence/cuda_rows.h"

namespace velm::cuda {
namespace {

using namespace device;

void splice_into_forward(Tensor embeddings, Tensor features, Tensor index, Tensor, Tensor out) {
  const Current current(out);
  PlacedRows p{};
  p.base = view_of(embeddings);
  p.features = view_of(features);
  p.count = features.size(0);
  p.index = view_of(index);
  p.out = view_of(out);
  place_rows(p, current.stream());
}

void splice_into_backward(Tensor grad, Tensor index, std::optional<Tensor> place, std::optional<Tensor> grad_embeddings,
                          std::optional<Tensor> grad_features) {
  const Current current(grad);
  if (grad_embeddings) {
    // Zeros at the tokens of every feature, whatever number it has.
    PlacedRows p{};
    p.base = view_of(grad);
    p.count = INT32_MAX;
    p.index = view_of(index);
    p.out = view_of(*grad_embeddings);
    place_rows(p, current.stream());
  }
  if (grad_features)
    take_rows(view_of(grad), view_of(needed(place, "place")), view_of(*grad_features), current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "splice_into_forward", splice_into_forward);
  VELM_KERNEL(m, "splice_into_backward", splice_into_backward);
}

}  // namespace
}  // namespace velm::cuda
