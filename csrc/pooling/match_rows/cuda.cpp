// match_rows as a torch operator on CUDA kernels.

#include "pooling/match_rows/cuda.h"

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

void match_rows_op(Tensor a, Tensor b, Tensor similarity, Tensor best) {
  const Current current(a);
  const auto rows_of = [&](const Tensor& t, const Tensor& inverse_norms) {
    return MatchedRows{view_of(t), t.size(1), t.stride(0), t.stride(1), view_of(inverse_norms)};
  };
  const auto norms_of = [&](const Tensor& t) {
    return torch::stable::new_empty(t, {t.size(0), t.size(1)}, ScalarType::Float);
  };
  Tensor norms_a = norms_of(a), norms_b = norms_of(b);
  MatchRows p{};
  p.batch = a.size(0);
  p.dim = a.size(2);
  p.dtype = dtype_of(a);
  p.a = rows_of(a, norms_a);
  p.b = rows_of(b, norms_b);
  p.similarity = view_of(similarity);
  p.best = view_of(best);
  match_rows(p, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("match_rows_forward", TORCH_BOX(&match_rows_op));
}

}  // namespace
}  // namespace velm::cuda
