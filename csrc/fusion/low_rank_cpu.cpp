// What surrounds the matrix products of low_rank_fusion: the sum over ranks of products over modalities, and the
// gradients of the factors of these products.

#include <algorithm>
#include <vector>

#include "attention/small_ops.h"
#include "simd/layout.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace simd;

constexpr int kMost = 4;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;
// Columns of one task of the gradients.
constexpr int64_t kColumns = 8 * kLanes;

using Optional = std::optional<Tensor>;

// The products of all modalities with some ranks of their factors: (ranks, rows of m, out) each, fp32, where a row of a
// modality serves `repeat` neighbouring rows of the result.
struct Products {
  int count = 0;
  float* data[kMost] = {};
  int64_t rows[kMost] = {}, repeat[kMost] = {};

  void add(const Optional& t, int64_t result_rows) {
    if (!t) return;
    data[count] = const_cast<float*>(const_data<float>(*t));
    rows[count] = t->size(1);
    repeat[count] = result_rows / std::max<int64_t>(1, t->size(1));
    ++count;
  }
};

template <class F>
VELM_INLINE void with_count(int count, const F& f) {
  if (count == 2) return f(std::integral_constant<int, 2>{});
  if (count == 3) return f(std::integral_constant<int, 3>{});
  f(std::integral_constant<int, 4>{});
}

template <class F>
VELM_INLINE void for_vectors(int64_t first, int64_t last, const F& f) {
  int64_t o = first;
  for (; o + kLanes <= last; o += kLanes) f(o, std::integral_constant<int, kLanes>{});
  if (o < last) f(o, static_cast<int>(last - o));
}
template <class N>
VELM_INLINE Vec load_some(const float* p, N n) {
  if constexpr (std::is_same_v<N, int>)
    return load_first(p, n);
  else
    return load(p);
}
template <class N>
VELM_INLINE void store_some(float* p, Vec x, N n) {
  if constexpr (std::is_same_v<N, int>)
    store_first(p, x, n);
  else
    store(p, x);
}

// sums (rows, out) += the sum over ranks of weight[r] times the product over modalities, in the order of the ranks.
void low_rank_sum(Tensor p0, Tensor p1, Optional p2, Optional p3, Tensor weight, Tensor sums) {
  const int64_t ranks = p0.size(0), out = p0.size(2), rows = sums.size(0);
  Products p;
  for (const Optional& t : {Optional(p0), Optional(p1), p2, p3}) p.add(t, rows);
  const float* scale = const_data<float>(weight);
  float* to = mutable_data<float>(sums);
  with_count(p.count, [&](auto modalities) {
    constexpr int kCount = decltype(modalities)::value;
    parallel_ranges(rows, kGrain / std::max<int64_t>(1, ranks * out), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t r = 0; r < ranks; ++r) {
          const float* of[kCount];
          for (int m = 0; m < kCount; ++m) of[m] = p.data[m] + (r * p.rows[m] + row / p.repeat[m]) * out;
          const Vec factor(scale[r]);
          for_vectors(0, out, [&](int64_t o, auto lanes) VELM_INLINE_LAMBDA {
            Vec product = factor;
            unroll<kCount>([&](auto m) VELM_INLINE_LAMBDA { product *= load_some(of[m] + o, lanes); });
            store_some(to + row * out + o, load_some(to + row * out + o, lanes) + product, lanes);
          });
        }
      }
    });
  });
}

// d_m = grad weight[r] times the products of the other modalities, summed over the rows of the result that a row of m
// serves; d_m may be p_m. Returns sum over rows and columns of grad times the product of all, for every rank.
Tensor low_rank_gradients(Tensor grad, Tensor p0, Tensor p1, Optional p2, Optional p3, Tensor weight, Tensor d0,
                          Tensor d1, Optional d2, Optional d3) {
  const int64_t ranks = p0.size(0), out = p0.size(2), rows = grad.size(0);
  Tensor grad_weight = torch::stable::new_empty(weight, {ranks});
  Products p, d;
  for (const Optional& t : {Optional(p0), Optional(p1), p2, p3}) p.add(t, rows);
  for (const Optional& t : {Optional(d0), Optional(d1), d2, d3}) d.add(t, rows);
  const float* g = const_data<float>(grad);
  const float* scales = const_data<float>(weight);
  // Rows of the result that belong together, because one row of some modality serves them.
  const int64_t unit = *std::max_element(p.repeat, p.repeat + p.count);
  const int64_t chunks = divide_up(out, kColumns), tasks = rows / std::max<int64_t>(1, unit) * ranks * chunks;
  std::vector<float> sums(static_cast<size_t>(tasks));
  with_count(p.count, [&](auto modalities) {
    constexpr int kCount = decltype(modalities)::value;
    parallel_ranges(tasks, kGrain / std::max<int64_t>(1, unit * kColumns), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t entry = task / (ranks * chunks), r = task / chunks % ranks;
        const int64_t first = task % chunks * kColumns, last = std::min(first + kColumns, out);
        const Vec scale(scales[r]);
        const float* from[kCount];
        float* to[kCount];
        int64_t step[kCount];  // from a row of the result to the next
        for (int m = 0; m < kCount; ++m) {
          step[m] = p.repeat[m] > 1 ? 0 : out;
          const int64_t at = (r * p.rows[m] + (step[m] ? entry * unit : entry)) * out;
          from[m] = p.data[m] + at;
          to[m] = d.data[m] + at;
        }
        Vec sum = zero();
        for_vectors(first, last, [&](int64_t o, auto lanes) VELM_INLINE_LAMBDA {
          Vec held[kCount];
          unroll<kCount>([&](auto m) VELM_INLINE_LAMBDA { held[m] = zero(); });
          for (int64_t t = 0; t < unit; ++t) {
            Vec product[kCount], others[kCount];
            Vec before = load_some(g + (entry * unit + t) * out + o, lanes);
            unroll<kCount>([&](auto m) VELM_INLINE_LAMBDA {
              product[m] = load_some(from[m] + t * step[m] + o, lanes);
              others[m] = before;
              before *= product[m];
            });
            sum += before;
            Vec after = scale;
            unroll<kCount>([&](auto i) VELM_INLINE_LAMBDA {
              constexpr int m = kCount - 1 - i;
              const Vec gradient = others[m] * after;
              after *= product[m];
              if (step[m])
                store_some(to[m] + t * step[m] + o, gradient, lanes);
              else
                held[m] += gradient;
            });
          }
          unroll<kCount>([&](auto m) VELM_INLINE_LAMBDA {
            if (!step[m]) store_some(to[m] + o, held[m], lanes);
          });
        });
        sums[static_cast<size_t>(task)] = sum_lanes(sum);
      }
    });
  });
  std::vector<double> totals(static_cast<size_t>(ranks));
  for (int64_t task = 0; task < tasks; ++task)
    totals[static_cast<size_t>(task / chunks % ranks)] += sums[static_cast<size_t>(task)];
  std::copy(totals.begin(), totals.end(), mutable_data<float>(grad_weight));
  return grad_weight;
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("low_rank_sum", TORCH_BOX(&low_rank_sum));
  m.impl("low_rank_gradients", TORCH_BOX(&low_rank_gradients));
}

}  // namespace
}  // namespace velm
