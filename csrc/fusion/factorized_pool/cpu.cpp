// normalize(signed_sqrt(sum over the factor of dropout(a * b))) and its gradient, a row at a time in the cache.
//
// Backward computes the sums again: they are the same two reads of a and b that the gradients need.

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dropout.h"
#include "simd/math.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm {
namespace {

using namespace fusion;

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 8192;
// Least norm that is divided by.
constexpr float kEps = 1e-12f;

struct Options {
  int64_t factor;
  bool inner, power_norm, l2_norm;
};

template <class F>
VELM_INLINE void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int64_t, kLanes>{});
  if (i < n) f(i, n - i);
}

// z[o] = the sum of p[o * factor ...] (factor of them).
template <int Factor>
void sum_neighbours(const float* p, int64_t dim, int64_t factor, float* z) {
  const int64_t count = Factor ? Factor : factor;
  for (int64_t o = 0; o < dim; ++o) {
    float sum = p[o * count];
    for (int64_t f = 1; f < count; ++f) sum += p[o * count + f];
    z[o] = sum;
  }
}
template <int Factor>
void repeat_neighbours(const float* z, int64_t dim, int64_t factor, float* p) {
  const int64_t count = Factor ? Factor : factor;
  for (int64_t o = 0; o < dim; ++o)
    for (int64_t f = 0; f < count; ++f) p[o * count + f] = z[o];
}

// A row of a and of b, and scratch memory for what is made of them.
template <class T>
class Row {
 public:
  Row(const Options& options, const Draw* draw, int64_t features, Scratch& memory)
      : options_(options),
        draw_(draw),
        features_(features),
        dim_(features / options.factor),
        products_(memory.take(features)),
        kept_(draw ? memory.take(features) : nullptr),
        z_(memory.take(dim_)) {}

  void forward(int64_t row, const T* a, const T* b, T* out) {
    read(row, a, b);
    const float scale = options_.l2_norm ? 1.0f / std::max(norm(), kEps) : 1.0f;
    for_vectors(dim_, [&](int64_t o, auto left)
                          VELM_INLINE_LAMBDA { store_some(out + o, root(load_some(z_ + o, left)) * scale, left); });
  }

  void backward(int64_t row, const T* a, const T* b, const T* grad, T* grad_a, T* grad_b) {
    read(row, a, b);
    gradient_of_sums(grad);
    const float* d = z_;
    if (options_.factor > 1 && options_.inner) {
      options_.factor == 5 ? repeat_neighbours<5>(z_, dim_, 5, products_)
                           : repeat_neighbours<0>(z_, dim_, options_.factor, products_);
      d = products_;
    }
    const int64_t length = options_.inner ? features_ : dim_;
    for (int64_t start = 0; start < features_; start += length) {
      for_vectors(length, [&](int64_t c, auto left) VELM_INLINE_LAMBDA {
        const int64_t at = start + c;
        const Vec dz = load_some(d + c, left);
        const auto write = [&](T* to, const T* other) VELM_INLINE_LAMBDA {
          if (!to) return;
          Vec g = dz * load_some(other + at, left);
          if (kept_) {
            const Vec kept = load_some(kept_ + at, left);
            g = select(kept != zero(), g * kept, zero());
          }
          store_some(to + at, g, left);
        };
        write(grad_a, b);
        write(grad_b, a);
      });
      if (length == 0) return;
    }
  }

 private:
  Vec root(Vec z) const { return options_.power_norm ? stdx::copysign(stdx::sqrt(stdx::abs(z)), z) : z; }

  // The sums z of the row.
  void read(int64_t row, const T* a, const T* b) {
    if (draw_) {
      for_kept(*draw_, row, features_, [&](int64_t c, int64_t left, VecMask keep) VELM_INLINE_LAMBDA {
        store_some(kept_ + c, select(keep, Vec(draw_->scale), zero()), left);
      });
    }
    float* products = options_.factor == 1 ? z_ : products_;
    for_vectors(features_, [&](int64_t c, auto left) VELM_INLINE_LAMBDA {
      Vec product = load_some(a + c, left) * load_some(b + c, left);
      if (kept_) {
        const Vec kept = load_some(kept_ + c, left);
        // Selected, not multiplied by 0: what is dropped may be infinite.
        product = select(kept != zero(), product * kept, zero());
      }
      store_some(products + c, product, left);
    });
    if (options_.factor == 1) return;
    if (options_.inner) {
      options_.factor == 5 ? sum_neighbours<5>(products_, dim_, 5, z_)
                           : sum_neighbours<0>(products_, dim_, options_.factor, z_);
      return;
    }
    for_vectors(dim_, [&](int64_t o, auto left) VELM_INLINE_LAMBDA {
      Vec sum = load_some(products_ + o, left);
      for (int64_t f = 1; f < options_.factor; ++f) sum += load_some(products_ + f * dim_ + o, left);
      store_some(z_ + o, sum, left);
    });
  }

  float norm() const {
    Vec sum = zero();
    for_vectors(dim_, [&](int64_t o, auto left) VELM_INLINE_LAMBDA {
      const Vec z = load_some(z_ + o, left);
      sum = options_.power_norm ? sum + stdx::abs(z) : fma(z, z, sum);
    });
    return std::sqrt(sum_lanes(sum));
  }

  // z becomes the gradient of z.
  void gradient_of_sums(const T* grad) {
    float n = 1.0f, scale = 1.0f, along = 0.0f;
    if (options_.l2_norm) {
      n = norm();
      // In this order a norm of NaN stays.
      scale = 1.0f / (n < kEps ? kEps : n);
      if (n > kEps || n != n) {
        Vec sum = zero();
        for_vectors(dim_, [&](int64_t o, auto left) VELM_INLINE_LAMBDA {
          sum = fma(root(load_some(z_ + o, left)), load_some(grad + o, left), sum);
        });
        along = sum_lanes(sum) * scale * scale;
      }
    }
    constexpr float kLargest = std::numeric_limits<float>::max();
    for_vectors(dim_, [&](int64_t o, auto left) VELM_INLINE_LAMBDA {
      const Vec z = load_some(z_ + o, left), r = root(z), given = load_some(grad + o, left);
      Vec g = given;
      // Without the norm the others are not read, which may be NaN; nor is anything of a row of zeros.
      if (options_.l2_norm) g = n == 0.0f ? zero() : fma(r, Vec(-along), given) * scale;
      if (options_.power_norm) g = select(z == zero(), zero(), g / (2.0f * stdx::abs(r)));
      // What comes in infinite stays so.
      const Vec sum = given + along;
      g = select(sum - sum == zero(), simd::detail::clamp_keep_nan(g, -kLargest, kLargest), g);
      store_some(z_ + o, g, left);
    });
  }

  const Options options_;
  const Draw* draw_;
  const int64_t features_, dim_;
  float *products_, *kept_, *z_;
};

// Calls f(row, number of the row, its batch entry and region) for all rows of (batch, regions, features).
template <class T, class F>
void for_rows(const Tensor& a, const Options& options, const std::optional<Tensor>& seed, double p, const F& f) {
  const int64_t regions = a.size(1), rows = a.size(0) * regions, features = a.size(2);
  const std::optional<Draw> draw = seed ? std::optional<Draw>(std::in_place, *seed, p) : std::nullopt;
  parallel_ranges(rows, kGrain / std::max<int64_t>(features, 1), [&](int64_t begin, int64_t end) {
    Scratch memory;
    Row<T> row(options, draw ? &*draw : nullptr, features, memory);
    for (int64_t i = begin; i < end; ++i) f(row, i, i / regions, i % regions);
  });
}

void factorized_pool_forward(Tensor a, Tensor b, std::optional<Tensor> seed, int64_t factor, bool inner,
                             bool power_norm, bool l2_norm, double dropout_p, Tensor out) {
  const int64_t dim = a.size(2) / factor;
  with_type(a.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T *from_a = const_data<T>(a), *from_b = const_data<T>(b);
    T* to = mutable_data<T>(out);
    for_rows<T>(a, {factor, inner, power_norm, l2_norm}, seed, dropout_p,
                [&](Row<T>& row, int64_t i, int64_t batch, int64_t region) {
                  row.forward(i, from_a + batch * a.stride(0) + region * a.stride(1),
                              from_b + batch * b.stride(0) + region * b.stride(1), to + i * dim);
                });
  });
}

void factorized_pool_backward(Tensor grad, Tensor a, Tensor b, std::optional<Tensor> seed, int64_t factor, bool inner,
                              bool power_norm, bool l2_norm, double dropout_p, std::optional<Tensor> grad_a,
                              std::optional<Tensor> grad_b) {
  const int64_t features = a.size(2), dim = features / factor;
  in_large_pages(grad_a);
  in_large_pages(grad_b);
  with_type(a.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T *from_a = const_data<T>(a), *from_b = const_data<T>(b), *from = const_data<T>(grad);
    T* to_a = grad_a ? mutable_data<T>(*grad_a) : nullptr;
    T* to_b = grad_b ? mutable_data<T>(*grad_b) : nullptr;
    for_rows<T>(a, {factor, inner, power_norm, l2_norm}, seed, dropout_p,
                [&](Row<T>& row, int64_t i, int64_t batch, int64_t region) {
                  row.backward(i, from_a + batch * a.stride(0) + region * a.stride(1),
                               from_b + batch * b.stride(0) + region * b.stride(1), from + i * dim,
                               to_a ? to_a + i * features : nullptr, to_b ? to_b + i * features : nullptr);
                });
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "factorized_pool_forward", factorized_pool_forward);
  VELM_KERNEL(m, "factorized_pool_backward", factorized_pool_backward);
}

}  // namespace
}  // namespace velm
