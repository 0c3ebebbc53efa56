// Selecting and merging tokens as torch operators on CUDA kernels.

#include "pooling/tokens_cuda.h"

#include <tuple>

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;

Tensor gather_rows_op(Tensor x, Tensor index, std::optional<Tensor> offsets, std::optional<Tensor> weight, Tensor,
                      std::optional<Tensor>, std::optional<Tensor>) {
  const Current current(x);
  GatherRows p{};
  p.batch = x.size(0);
  p.rows = x.size(1);
  p.dim = x.size(2);
  p.entries = index.size(1);
  p.out_rows = offsets ? offsets->size(1) - 1 : p.entries;
  p.dtype = dtype_of(x);
  p.x = span_of(x);
  p.batch_stride = x.stride(0);
  p.row_stride = x.stride(1);
  p.index = span_of(index);
  p.offsets = span_of(offsets);
  p.weight = span_of(weight);
  Tensor out = torch::stable::new_empty(x, {p.batch, p.out_rows, p.dim});
  p.out = span_of(out);
  gather_rows(p, current.stream());
  return out;
}

std::tuple<Tensor, Tensor> match_rows_op(Tensor a, Tensor b) {
  const Current current(a);
  const auto rows_of = [&](const Tensor& t, const Tensor& inverse_norms) {
    return MatchedRows{span_of(t), t.size(1), t.stride(0), t.stride(1), span_of(inverse_norms)};
  };
  const auto new_row = [&](const Tensor& t, ScalarType type) {
    return torch::stable::new_empty(t, {t.size(0), t.size(1)}, type);
  };
  Tensor norms_a = new_row(a, ScalarType::Float), norms_b = new_row(b, ScalarType::Float);
  Tensor similarity = new_row(a, ScalarType::Float), best = new_row(a, ScalarType::Int);
  MatchRows p{};
  p.batch = a.size(0);
  p.dim = a.size(2);
  p.dtype = dtype_of(a);
  p.a = rows_of(a, norms_a);
  p.b = rows_of(b, norms_b);
  p.similarity = span_of(similarity);
  p.best = span_of(best);
  match_rows(p, current.stream());
  return {similarity, best};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows_op));
  m.impl("match_rows", TORCH_BOX(&match_rows_op));
}

}  // namespace
}  // namespace velm::cuda
