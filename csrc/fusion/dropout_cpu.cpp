// residual + dropout(x) and its gradient, one pass each; the random numbers are drawn again in backward.

#include <algorithm>
#include <type_traits>

#include "attention/cpu_philox.h"
#include "attention/small_ops.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace simd;

// Columns that share a block of counters: element c of a row takes word (c % 64) / 16 of counter (c / 64) * 16 + c %
// 16, so that a vector of one word covers neighbouring columns whatever its width, up to 16.
constexpr int64_t kBlock = 64, kCounters = 16;
static_assert(kCounters % kLanes == 0);

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 8192;

struct Draw {
  uint64_t seed;
  uint32_t threshold;
  float scale;

  Draw(const Tensor& seed_tensor, double p)
      : seed(static_cast<uint64_t>(*const_data<int64_t>(seed_tensor))),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}
};

template <class T>
VELM_INLINE Vec load_some(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_first(p, static_cast<int>(left));
}
template <class T>
VELM_INLINE void store_some(T* p, Vec x, int64_t left) {
  if (left >= kLanes)
    store(p, x);
  else
    store_first(p, x, static_cast<int>(left));
}

// out = dropout(x) [+ residual] for one row.
template <class T>
void drop_row(const Draw& draw, int64_t row, int64_t dim, const T* x, const T* residual, T* out) {
  for (int64_t block = 0; block < dim; block += kBlock) {
    for (int64_t half = 0; half < kCounters; half += kLanes) {
      if (block + half >= dim) break;
      const auto first = static_cast<uint32_t>(block / kBlock * kCounters + half);
      VecUint words[4] = {
          stdx::static_simd_cast<VecUint>(lane_index()) + first,
          VecUint(static_cast<uint32_t>(row)),
          VecUint(static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32)),
          VecUint(0u),
      };
      attention::philox(words, draw.seed);
      unroll<4>([&](auto k) VELM_INLINE_LAMBDA {
        const int64_t c = block + k * kCounters + half, left = dim - c;
        if (left <= 0) return;
        const VecMask keep = attention::at_least(words[k], draw.threshold);
        Vec y = select(keep, load_some(x + c, left) * draw.scale, zero());
        if (residual) y += load_some(residual + c, left);
        store_some(out + c, y, left);
      });
    }
  }
}

Tensor run(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double p) {
  const int64_t rows = x.size(0), dim = x.size(1);
  Tensor out = torch::stable::new_empty(x, {rows, dim});
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
  return out;
}

Tensor dropout_residual_forward(Tensor x, std::optional<Tensor> residual, Tensor seed, double dropout_p) {
  return run(x, residual, seed, dropout_p);
}

Tensor dropout_residual_backward(Tensor grad, Tensor seed, double dropout_p) {
  return run(grad, std::nullopt, seed, dropout_p);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("dropout_residual_forward", TORCH_BOX(&dropout_residual_forward));
  m.impl("dropout_residual_backward", TORCH_BOX(&dropout_residual_backward));
}

}  // namespace
}  // namespace velm
