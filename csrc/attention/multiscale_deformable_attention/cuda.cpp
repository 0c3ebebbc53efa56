// multiscale_deformable_attention as torch operators on CUDA kernels.

#include "attention/multiscale_deformable_attention/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

View flat_view_of(const Tensor& t) {
  return view_of(torch::stable::flatten(t, 0, -1));
}
View flat_view_of(const std::optional<Tensor>& t) {
  return t ? flat_view_of(*t) : View{};
}

Deformable deformable_of(const Tensor& value, const Tensor& shapes, const Tensor& locations, const Tensor& weights) {
  Deformable p{};
  p.batch = value.size(0);
  p.tokens = value.size(1);
  p.heads = value.size(2);
  p.d = value.size(3);
  p.queries = locations.size(1);
  p.levels = locations.size(3);
  p.points = locations.size(4);
  p.value = view_of(value);
  p.shapes = flat_view_of(shapes);
  p.locations = flat_view_of(locations);
  p.weights = flat_view_of(weights);
  return p;
}

// (batch, queries, heads * d) by heads.
View heads_of(const Tensor& rows, const Deformable& p) {
  return view_of(torch::stable::view(rows, {p.batch, p.queries, p.heads, p.d}));
}

void deformable_forward_op(Tensor value, Tensor shapes, Tensor locations, Tensor weights, Tensor out) {
  const Current current(value);
  Deformable p = deformable_of(value, shapes, locations, weights);
  p.out = heads_of(out, p);
  deformable_forward(p, current.stream());
}

void deformable_backward_op(Tensor grad, Tensor value, Tensor shapes, Tensor locations, Tensor weights,
                            std::optional<Tensor> grad_value, std::optional<Tensor> grad_locations,
                            std::optional<Tensor> grad_weights) {
  const Current current(grad);
  Deformable p = deformable_of(value, shapes, locations, weights);
  p.grad = heads_of(grad, p);
  p.grad_locations = flat_view_of(grad_locations);
  p.grad_weights = flat_view_of(grad_weights);
  if (grad_locations || grad_weights) deformable_samples_backward(p, current.stream());
  if (!grad_value) return;
  if (p.of_level() >= int64_t{1} << 31)
    throw std::runtime_error("velm: sampling_locations: expected fewer than 2^31 queries * points");
  Tensor counts = torch::stable::new_zeros(value, {p.batch * p.heads * p.cells() * p.chunks()}, ScalarType::Int);
  Tensor placed = torch::stable::new_empty(value, {p.batch * p.heads * p.levels * p.of_level() * 4}, ScalarType::Float);
  p.grad_value = view_of(grad_value);
  p.counts = view_of(counts);
  p.placed = view_of(placed);
  deformable_value_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "multiscale_deformable_attention_forward", deformable_forward_op);
  VELM_KERNEL(m, "multiscale_deformable_attention_backward", deformable_backward_op);
}

}  // namespace
}  // namespace velm::cuda
