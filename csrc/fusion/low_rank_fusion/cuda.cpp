// low_rank_fusion as torch operators on CUDA kernels. Of backward there are its kernels; what is a product of matrices
// is left to Python.

#include "fusion/low_rank_fusion/cuda.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;
using Optional = std::optional<Tensor>;

void check_sizes(std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    if (size > std::numeric_limits<int32_t>::max() / 2)
      throw std::runtime_error("velm: more than 2^30 rows or features");
}

LowRankInput input_of(const Tensor& x, const Tensor& factor, const Tensor& projections) {
  check_sizes({x.size(1)});
  return {view_of(x), view_of(factor), view_of(projections), false};
}

void project(const Tensor& x, const Tensor& factor, const Tensor& to, Stream stream) {
  if (to.numel() == 0) return;
  check_sizes({x.size(0), factor.size(0), factor.size(2)});
  LowRankFusion p{};
  p.count = 1;
  p.inputs[0] = input_of(x, factor, to);
  low_rank_fusion(p, stream);
}

// (rank, rows, out)
Tensor low_rank_projections(Tensor x, Tensor factor) {
  const Current current(x);
  Tensor to = torch::stable::new_empty(x, {factor.size(0), x.size(0), factor.size(2)}, ScalarType::Float);
  project(x, factor, to, current.stream());
  return to;
}

void low_rank_fusion_forward(Tensor x0, Tensor x1, Optional x2, Optional x3, Tensor factor0, Tensor factor1,
                             Optional factor2, Optional factor3, Tensor weight, Optional bias, int64_t rows, bool,
                             Tensor out, Optional kept) {
  const Current current(x0);
  const int64_t rank = factor0.size(0), out_dim = factor0.size(2);
  check_sizes({rows, rank, out_dim});
  LowRankFusion p{};
  std::vector<Tensor> xs{x0, x1}, factors{factor0, factor1}, projections;
  if (x2) xs.push_back(*x2), factors.push_back(*factor2);
  if (x3) xs.push_back(*x3), factors.push_back(*factor3);
  const auto numbers = [&](const Tensor& x) { return x.size(0) * rank * out_dim; };
  if (out.numel() == 0) return;
  int64_t offset = 0;
  for (size_t m = 0; m < xs.size(); ++m) {
    const bool shares = xs[m].size(0) < rows;
    projections.push_back(kept ? torch::stable::narrow(*kept, 0, offset, numbers(xs[m]))
                               : torch::stable::new_empty(x0, {shares ? numbers(xs[m]) : 0}, ScalarType::Float));
    offset += numbers(xs[m]);
    if (shares) project(xs[m], factors[m], projections[m], current.stream());
    p.inputs[p.count] = input_of(xs[m], factors[m], projections[m]);
    p.inputs[p.count++].is_projected = shares;
  }
  p.weight = view_of(weight);
  p.bias = view_of(bias);
  p.z = view_of(out);
  Tensor partials = torch::stable::new_empty(x0, {low_rank_partials(p)}, ScalarType::Float);
  p.partials = view_of(partials);
  low_rank_fusion(p, current.stream());
}

// Of some ranks: the gradients of their projections that `wanted` has a bit for, (rows of m, ranks * out) or as many
// times more rows as there are sums to be added for each of them, in the type of grad, and for each rank the parts of
// the sum of grad times all projections.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_gradients_op(Tensor grad, Tensor projections0,
                                                                         Tensor projections1, Optional projections2,
                                                                         Optional projections3, Tensor weight,
                                                                         int64_t wanted) {
  const Current current(grad);
  LowRankGradients p{};
  p.grad = view_of(grad);
  p.weight = view_of(weight);
  check_sizes({p.rows(), p.out(), p.ranks()});
  int64_t entries = p.rows();
  for (const Optional& projections : {Optional(projections0), Optional(projections1), projections2, projections3}) {
    if (!projections) continue;
    entries = std::min(entries, projections->size(1));
    p.projections[p.count++] = view_of(*projections);
  }
  const auto is_other = [&](const View& of) { return of.size[2] != entries && of.size[2] != p.rows(); };
  if (std::any_of(p.projections, p.projections + p.count, is_other) || (entries > 0 && p.rows() % entries != 0))
    throw std::runtime_error("velm: inputs whose rows serve different numbers of rows of the result");
  std::vector<Tensor> to;
  for (int m = 0; m < kMostInputs; ++m) {
    const bool wants = m < p.count && (wanted >> m & 1);
    to.push_back(torch::stable::new_empty(grad, {wants ? low_rank_gradient_rows(p, m) : 0, p.ranks() * p.out()}));
    p.to[m] = view_of(to.back());
  }
  Tensor sums = torch::stable::new_empty(grad, {p.ranks(), low_rank_gradient_blocks(p)}, ScalarType::Float);
  p.sums = view_of(sums);
  low_rank_gradients(p, current.stream());
  return {to[0], to[1], to[2], to[3], sums};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "low_rank_fusion_forward", low_rank_fusion_forward);
  VELM_KERNEL(m, "low_rank_projections", low_rank_projections);
  VELM_KERNEL(m, "low_rank_gradients", low_rank_gradients_op);
}

}  // namespace
}  // namespace velm::cuda
