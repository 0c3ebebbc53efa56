#include "attention/cross_attention/cpu_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "simd/operand.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm::attention {

namespace {

using simd::kLanes;
using simd::Vec;

struct Shape {
  int64_t batch, heads, rows, dim;
  Shape(const Tensor& x, bool varlen)
      : batch(varlen ? 1 : x.size(0)),
        heads(x.size(1)),
        rows(varlen ? x.size(0) : x.size(2)),
        dim(x.size(varlen ? 2 : 3)) {}
  int64_t count() const { return batch * heads * rows; }
  // Rows are numbered with heads last, as the results lie in memory.
  void position(int64_t at, int64_t& b, int64_t& h, int64_t& i) const {
    h = at % heads;
    i = at / heads % rows;
    b = at / heads / rows;
  }
};

template <class T>
float inverse_rms(const T* x, int64_t dim, float eps) {
  Vec sum = simd::zero();
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec v = simd::load_first(x + d, static_cast<int>(std::min<int64_t>(dim - d, kLanes)));
    sum = simd::fma(v, v, sum);
  }
  return 1.0f / std::sqrt(simd::sum_lanes(sum) / static_cast<float>(dim) + eps);
}

// The weight in fp32, padded with zeros to whole vectors.
std::vector<float> widen(const Tensor& weight) {
  std::vector<float> w(static_cast<size_t>((weight.size(0) + kLanes - 1) / kLanes * kLanes), 0.0f);
  with_type(dtype_of(weight), [&](auto tag) {
    using T = decltype(tag);
    simd::convert(w.data(), static_cast<const T*>(weight.const_data_ptr()), weight.size(0));
  });
  return w;
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, bool varlen) {
  const Shape shape(x, varlen);
  auto dtype = torch::headeronly::ScalarType::Float;
#if defined(VELM_BF16_DOT)
  if (dtype_of(x) == ScalarType::BFloat16) dtype = x.scalar_type();
#endif
  Tensor result = varlen ? torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, dtype)
                         : torch::stable::transpose(
                               torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)}, dtype), 1, 2);
  const std::vector<float> w = widen(weight);
  const Rows from = rows_of(x, varlen), to = rows_of(result, varlen);
  simd::parallel_ranges(shape.count(), 256, [&](int64_t begin, int64_t end) {
    with_type(from.dtype, [&](auto from_tag) {
      with_type(to.dtype, [&](auto to_tag) {
        for (int64_t at = begin; at < end; ++at) {
          int64_t b, h, i;
          shape.position(at, b, h, i);
          const auto* in = reinterpret_cast<const decltype(from_tag)*>(from.at(b, h, i));
          auto* out = reinterpret_cast<decltype(to_tag)*>(to.mutable_at(b, h, i));
          const float r = inverse_rms(in, shape.dim, static_cast<float>(eps));
          for (int64_t d = 0; d < shape.dim; d += kLanes) {
            const int width = static_cast<int>(std::min<int64_t>(shape.dim - d, kLanes));
            simd::store_first(out + d, simd::load_first(in + d, width) * r * simd::load(w.data() + d), width);
          }
        }
      });
    });
  });
  return result;
}

void rms_norm_backward(const Tensor& x, const Tensor& weight, double eps, bool varlen, const Tensor& grad,
                       const Rows& grad_x, const Tensor* grad_weight) {
  const Shape shape(x, varlen);
  const std::vector<float> w = widen(weight);
  const Rows from = rows_of(x, varlen), g = rows_of(grad, varlen);
  const int64_t padded = static_cast<int64_t>(w.size());
  // The weight gradient is summed over runs of rows that depend on sizes alone, then over the runs.
  const int64_t runs = std::clamp<int64_t>(shape.count() / 64, 1, 64);
  std::vector<float> partial(static_cast<size_t>(runs * padded), 0.0f);
  simd::parallel_items(runs, [&](int64_t run) {
    with_type(from.dtype, [&](auto tag) {
      using T = decltype(tag);
      float* dw = partial.data() + run * padded;
      for (int64_t at = run * shape.count() / runs; at < (run + 1) * shape.count() / runs; ++at) {
        int64_t b, h, i;
        shape.position(at, b, h, i);
        const T* in = reinterpret_cast<const T*>(from.at(b, h, i));
        const float* gradient = reinterpret_cast<const float*>(g.at(b, h, i));
        T* out = grad_x.data ? reinterpret_cast<T*>(grad_x.mutable_at(b, h, i)) : nullptr;
        // A row that took no part may hold NaN; its gradient is zero all the same.
        const bool unused = std::all_of(gradient, gradient + shape.dim, [](float y) { return y == 0.0f; });
        if (unused) {
          for (int64_t d = 0; out && d < shape.dim; ++d) simd::store_scalar(out + d, 0.0f);
          continue;
        }
        const float r = inverse_rms(in, shape.dim, static_cast<float>(eps));
        Vec dot = simd::zero();
        for (int64_t d = 0; d < shape.dim; d += kLanes) {
          const int width = static_cast<int>(std::min<int64_t>(shape.dim - d, kLanes));
          const Vec gx = simd::load_first(gradient + d, width) * simd::load_first(in + d, width);
          dot = simd::fma(gx, simd::load(w.data() + d), dot);
          simd::store(dw + d, simd::fma(gx, Vec(r), simd::load(dw + d)));
        }
        if (!out) continue;
        const float pull = simd::sum_lanes(dot) / static_cast<float>(shape.dim) * r * r;
        for (int64_t d = 0; d < shape.dim; d += kLanes) {
          const int width = static_cast<int>(std::min<int64_t>(shape.dim - d, kLanes));
          const Vec gw = simd::load_first(gradient + d, width) * simd::load(w.data() + d);
          simd::store_first(out + d, (gw - simd::load_first(in + d, width) * pull) * r, width);
        }
      }
    });
  });
  if (grad_weight == nullptr) return;
  for (int64_t run = 1; run < runs; ++run) {
    for (int64_t d = 0; d < padded; ++d) partial[d] += partial[run * padded + d];
  }
  with_type(dtype_of(*grad_weight), [&](auto tag) {
    using T = decltype(tag);
    simd::convert(static_cast<T*>(grad_weight->mutable_data_ptr()), partial.data(), shape.dim);
  });
}

}  // namespace velm::attention
