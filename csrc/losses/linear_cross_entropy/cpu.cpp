// The passes of linear_cross_entropy over logits that a product of torch has just made: what a row's softmax needs, and
// the gradients of logits in their place. See velm_kernels/losses/linear_cross_entropy/chunks.py.

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/tensor.h"
#include "simd/math.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace simd;

using Optional = std::optional<Tensor>;

// Logits below which another thread costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

// Calls f(column, lanes) for the vectors of a row: a constant number of lanes, but in the last one.
template <class F>
VELM_INLINE void for_vectors(int64_t columns, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) f(j, std::integral_constant<int, kLanes>{});
  if (j < columns) f(j, static_cast<int>(columns - j));
}

template <class T, class N>
VELM_INLINE Vec load_some(const T* p, N n) {
  if constexpr (std::is_same_v<N, int>)
    return load_first(p, n);
  else
    return load(p);
}

template <class T, class N>
VELM_INLINE void store_some(T* p, Vec x, N n) {
  if constexpr (std::is_same_v<N, int>)
    store_first(p, x, n);
  else
    store(p, x);
}

// x in the first n lanes, `other` behind them.
template <class N>
VELM_INLINE Vec or_else(Vec x, N n, float other) {
  if constexpr (std::is_same_v<N, int>)
    return select(first_lanes(n), x, Vec(other));
  else
    return x;
}

// What a logit is made of: the product, a bias and a cap.
struct Logits {
  const float* bias = nullptr;
  float softcap = 0.0f, inverse = 0.0f;

  template <class T, class N>
  VELM_INLINE Vec at(const T* z, int64_t j, N n) const {
    Vec x = load_some(z + j, n);
    if (bias) x += load_some(bias + j, n);
    return softcap ? softcap * tanh(x * inverse) : x;
  }
};

struct Given {
  int64_t rows, columns, stride, first;
  const int64_t* targets;
  std::vector<float> bias;
  Logits logits;

  Given(const Tensor& z, const Optional& bias_tensor, const Tensor& targets_tensor, int64_t first, double softcap)
      : rows(z.size(0)),
        columns(z.size(1)),
        stride(z.stride(0)),
        first(first),
        targets(const_data<int64_t>(targets_tensor)) {
    if (bias_tensor) {
      bias.resize(static_cast<size_t>(columns));
      with_type(bias_tensor->scalar_type(),
                [&](auto t) { convert(bias.data(), const_data<decltype(t)>(*bias_tensor), columns); });
      logits.bias = bias.data();
    }
    logits.softcap = static_cast<float>(softcap);
    logits.inverse = softcap ? static_cast<float>(1.0 / softcap) : 0.0f;
  }
};

// Takes one row's logits into its sums: the largest, the sum of e^(z - largest), the target's, the sum of all, and that
// of e^(z - largest) (z - largest).
template <bool kDetails, class T>
void sums_of_row(const Given& given, const T* z, int64_t target, bool smooths, float* sums, int64_t rows) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Logits& logits = given.logits;
  Vec highest_of(-kInfinity), all = zero();
  for_vectors(given.columns, [&](int64_t j, auto n) VELM_INLINE_LAMBDA {
    const Vec x = logits.at(z, j, n);
    // NaN is seen by the sum of exponentials.
    highest_of = maximum(or_else(x, n, -kInfinity), highest_of);
    if (smooths) all += or_else(x, n, 0.0f);
  });
  const float before = sums[0], highest = std::max(before, max_lanes(highest_of));
  // Where all are -inf, nothing is taken off.
  const float base = highest == -kInfinity ? 0.0f : highest;
  Vec total = zero(), weighted = zero();
  for_vectors(given.columns, [&](int64_t j, auto n) VELM_INLINE_LAMBDA {
    const Vec x = logits.at(z, j, n) - base;
    const Vec e = or_else(exp(x), n, 0.0f);
    total += e;
    if constexpr (kDetails) weighted += or_else(e * x, n, 0.0f);
  });
  float old_total = sums[rows], old_weighted = sums[4 * rows];
  if (before != -kInfinity) {
    const float off = before - highest, scale = exp(Vec(off))[0];
    if (kDetails) old_weighted = (old_weighted + old_total * off) * scale;
    old_total *= scale;
  }
  sums[0] = highest;
  sums[rows] = old_total + sum_lanes(total);
  if (smooths) sums[3 * rows] += sum_lanes(all);
  if (kDetails) sums[4 * rows] = old_weighted + sum_lanes(weighted);
  const int64_t at = target - given.first;
  if (at >= 0 && at < given.columns) sums[2 * rows] = logits.at(z, at, 1)[0];
}

void linear_cross_entropy_sums(Tensor z, Optional bias, Tensor targets, int64_t first, double softcap, bool smooths,
                               bool details, Tensor sums) {
  const Given given(z, bias, targets, first, softcap);
  auto* to = mutable_data<float>(sums);
  with_type(z.scalar_type(), [&](auto t) {
    const auto* from = const_data<decltype(t)>(z);
    parallel_ranges(given.rows, kGrain / std::max<int64_t>(1, given.columns), [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      for (int64_t row = begin; row < end; ++row) {
        const auto* of_row = from + row * given.stride;
        if (details)
          sums_of_row<true>(given, of_row, given.targets[row], smooths, to + row, given.rows);
        else
          sums_of_row<false>(given, of_row, given.targets[row], smooths, to + row, given.rows);
      }
    });
  });
}

// Of a row, see `_weights` in chunks.py.
struct Weights {
  float of_all, of_target, uniform, of_entropy, logsumexp, entropy;

  Weights(const float* data, int64_t row, int64_t rows)
      : of_all(data[row]),
        of_target(data[rows + row]),
        uniform(data[2 * rows + row]),
        of_entropy(data[3 * rows + row]),
        logsumexp(data[4 * rows + row]),
        entropy(data[5 * rows + row]) {}
};

template <bool kDetails>
VELM_INLINE Vec gradient_of(Vec z, const Weights& w, const Logits& logits, float of_target) {
  const Vec log_probability = z - w.logsumexp;
  Vec factor(w.of_all);
  if constexpr (kDetails) factor -= w.of_entropy * (log_probability + w.entropy);
  Vec gradient = fma(exp(log_probability), factor, Vec(-w.uniform)) - of_target;
  if (logits.softcap) {
    const Vec share = z * logits.inverse;
    gradient *= 1.0f - share * share;
  }
  return gradient;
}

template <bool kDetails, class T>
void gradient_of_row(const Given& given, const Weights& w, T* z, int64_t target) {
  const Logits& logits = given.logits;
  const int64_t at = target - given.first;
  const bool is_here = at >= 0 && at < given.columns;
  T of_target{};
  // Before its logit is overwritten.
  if (is_here) store_scalar(&of_target, gradient_of<kDetails>(logits.at(z, at, 1), w, logits, w.of_target)[0]);
  for_vectors(given.columns, [&](int64_t j, auto n) VELM_INLINE_LAMBDA {
    store_some(z + j, gradient_of<kDetails>(logits.at(z, j, n), w, logits, 0.0f), n);
  });
  if (is_here) z[at] = of_target;
}

void linear_cross_entropy_gradient(Tensor z, Optional bias, Tensor targets, int64_t first, double softcap, bool details,
                                   Tensor weights) {
  const Given given(z, bias, targets, first, softcap);
  const auto* of_rows = const_data<float>(weights);
  with_type(z.scalar_type(), [&](auto t) {
    auto* data = mutable_data<decltype(t)>(z);
    parallel_ranges(given.rows, kGrain / std::max<int64_t>(1, given.columns), [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      for (int64_t row = begin; row < end; ++row) {
        auto* of_row = data + row * given.stride;
        const Weights w(of_rows, row, given.rows);
        if (given.targets[row] < 0)
          std::fill_n(of_row, given.columns, decltype(t){});
        else if (details)
          gradient_of_row<true>(given, w, of_row, given.targets[row]);
        else
          gradient_of_row<false>(given, w, of_row, given.targets[row]);
      }
    });
  });
}

void linear_cross_entropy_fresh(Tensor x) {
  in_large_pages(x);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "linear_cross_entropy_fresh", linear_cross_entropy_fresh);
  VELM_KERNEL(m, "linear_cross_entropy_sums", linear_cross_entropy_sums);
  VELM_KERNEL(m, "linear_cross_entropy_gradient", linear_cross_entropy_gradient);
}

}  // namespace
}  // namespace velm
