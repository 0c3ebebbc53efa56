// match_rows as a torch operator on CUDA kernels.

#include "pooling/match_rows/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

void match_rows_op(Tensor a, Tensor b, Tensor similarity, Tensor best) {
  const Current current(a);
  const auto norms_of = [&](const Tensor& t) {
    return torch::stable::new_empty(t, {t.size(0), t.size(1)}, ScalarType::Float);
  };
  Tensor norms_a = norms_of(a), norms_b = norms_of(b);
  match_rows({{view_of(a), view_of(norms_a)}, {view_of(b), view_of(norms_b)}, view_of(similarity), view_of(best)},
             current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "match_rows_forward", match_rows_op);
}

}  // namespace
}  // namespace velm::cuda
