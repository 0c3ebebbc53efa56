// residual + dropout(x) and its gradient, one pass each; the random numbers are drawn again in backward.

#include <algorithm>

#include "common/dropout.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace fusion;

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 8192;

// out = dropout(x) [+ residual] for one row.
template <class T>
void drop_row(const Draw& draw, int64_t row, int64_t dim, const T* x, const T* residual, T* out) {
  for_kept(draw, row, dim, [&](int64_t c, int64_t left, VecMask keep) VELM_INLINE_LAMBDA {
    Vec y = select(keep, load_some(x + c, left) * draw.scale, zero());
    if (residual) y += load_some(residual + c, left);
    store_some(out + c, y, left);
  });
}

void run(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double p, const Tensor& out) {
  const int64_t rows = x.size(0), dim = x.size(1);
  const Draw draw(seed, p);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = const_data<T>(x);
    const T* add = residual ? const_data<T>(*residual) : nullptr;
    T* to = mutable_data<T>(out);
    const int64_t from_stride = x.stride(0), add_stride = residual ? residual->stride(0) : 0;
    parallel_ranges(rows, kGrain / std::max<int64_t>(dim, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        drop_row(draw, i, dim, from + i * from_stride, add ? add + i * add_stride : nullptr, to + i * dim);
    });
  });
}

void dropout_residual_forward(Tensor x, std::optional<Tensor> residual, Tensor seed, double dropout_p, Tensor out) {
  run(x, residual, seed, dropout_p, out);
}

void dropout_residual_backward(Tensor grad, Tensor seed, double dropout_p, Tensor grad_x) {
  run(grad, std::nullopt, seed, dropout_p, grad_x);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "dropout_residual_forward", dropout_residual_forward);
  VELM_KERNEL(m, "dropout_residual_backward", dropout_residual_backward);
}

}  // namespace
}  // namespace velm
