// add_at_tokens as torch operators on CUDA kernels.

#include "device/tensor.h"
#include "sequence/cuda_rows.h"

namespace velm::cuda {
namespace {

using namespace device;

// With hidden itself as out, rows without a feature are not touched.
void add_at_tokens_forward(Tensor hidden, Tensor features, Tensor index, Tensor place, Tensor out) {
  const Current current(out);
  if (out.const_data_ptr() == hidden.const_data_ptr())
    return add_rows_in_place(view_of(out), view_of(features), view_of(place), current.stream());
  PlacedRows p{};
  p.base = view_of(hidden);
  p.features = view_of(features);
  p.count = features.size(0);
  p.index = view_of(index);
  p.out = view_of(out);
  add_rows(p, current.stream());
}

void add_at_tokens_backward(Tensor grad, Tensor, Tensor place, Tensor grad_features) {
  const Current current(grad);
  take_rows(view_of(grad), view_of(place), view_of(grad_features), current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "add_at_tokens_forward", add_at_tokens_forward);
  VELM_KERNEL(m, "add_at_tokens_backward", add_at_tokens_backward);
}

}  // namespace
}  // namespace velm::cuda
