// film as torch operators on CUDA kernels.

#include "fusion/film/cuda.h"

#include "common/needed.h"
#include "device/tensor.h"
#include "fusion/regions.h"

namespace velm::cuda {
namespace {

using namespace device;

Film film_of(const View& x, bool regions_contiguous, double gamma_offset) {
  Film p{};
  p.regions_contiguous = regions_contiguous;
  p.offset = static_cast<float>(gamma_offset);
  p.x = x;
  return p;
}

void film_forward_op(Tensor x, Tensor gamma, Tensor beta, bool regions_contiguous, double gamma_offset, Tensor out) {
  const Current current(x);
  Film p = film_of(view_of(x), regions_contiguous, gamma_offset);
  p.gamma = view_of(gamma);
  p.beta = view_of(beta);
  p.out = view_of(out);
  film_forward(p, current.stream());
}

void film_backward_op(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> gamma, bool regions_contiguous,
                      double gamma_offset, std::optional<Tensor> grad_x, std::optional<Tensor> grad_gamma,
                      std::optional<Tensor> grad_beta) {
  const Current current(grad);
  Film p = film_of(grad_gamma ? view_of(needed(x, "x")) : absent(view_of(grad)), regions_contiguous, gamma_offset);
  p.grad = view_of(grad);
  if (grad_x) p.gamma = view_of(needed(gamma, "gamma"));
  p.grad_x = view_of(grad_x);
  p.grad_gamma = view_of(grad_gamma);
  p.grad_beta = view_of(grad_beta);
  const bool has_parts = (grad_gamma || grad_beta) && !regions_contiguous;
  Tensor parts = torch::stable::new_empty(grad, {has_parts ? p.batch() * region_blocks(p.regions()) * 2 * p.dim() : 0},
                                          ScalarType::Float);
  p.parts = view_of(parts);
  film_backward(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "film_forward", film_forward_op);
  VELM_KERNEL(m, "film_backward", film_backward_op);
}

}  // namespace
}  // namespace velm::cuda
