// The similarity of a query and a row, summed in one order whatever is computed beside it: what decides which rows are
// found, and what is returned.
#pragma once

#include <cmath>

#include "simd/vec.h"

namespace velm::topk {

using simd::kLanes;
using simd::Vec;

enum class Metric { dot, cosine, l2 };

// Sums of every fourth vector of a row.
inline constexpr int kParts = 4;
// Below this norm rows are divided by it.
inline constexpr float kLeastNorm = 1e-12f;

namespace detail {

template <bool Difference, int Q, int R, class T, class N>
VELM_INLINE void add_vector(Vec (&sum)[Q][R][kParts], int part, const float* const (&queries)[Q],
                            const T* const (&rows)[R], int64_t at, N lanes) {
  Vec x[R];
  const auto load_some = [&](const auto* p) VELM_INLINE_LAMBDA {
    if constexpr (std::is_same_v<N, int>)
      return simd::load_first(p + at, lanes);
    else
      return simd::load(p + at);
  };
  simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA { x[r] = load_some(rows[r]); });
  simd::unroll<Q>([&](auto q) VELM_INLINE_LAMBDA {
    const Vec y = load_some(queries[q]);
    simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      if constexpr (Difference) {
        const Vec z = y - x[r];
        sum[q][r][part] = simd::fma(z, z, sum[q][r][part]);
      } else {
        sum[q][r][part] = simd::fma(y, x[r], sum[q][r][part]);
      }
    });
  });
}

}  // namespace detail

// The sums of products, or of squared differences, of each of Q queries and each of R rows.
template <bool Difference, int Q, int R, class T>
VELM_INLINE void sum_pairs(float (&out)[Q][R], const float* const (&queries)[Q], const T* const (&rows)[R],
                           int64_t dim) {
  constexpr std::integral_constant<int, kLanes> kWhole{};
  Vec sum[Q][R][kParts];
  simd::unroll<Q>([&](auto q) VELM_INLINE_LAMBDA {
    simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      simd::unroll<kParts>([&](auto part) VELM_INLINE_LAMBDA { sum[q][r][part] = simd::zero(); });
    });
  });
  int64_t i = 0;
  for (; i + kParts * kLanes <= dim; i += kParts * kLanes) {
    simd::unroll<kParts>([&](auto part) VELM_INLINE_LAMBDA {
      detail::add_vector<Difference>(sum, part, queries, rows, i + part * kLanes, kWhole);
    });
  }
  simd::unroll<kParts>([&](auto part) VELM_INLINE_LAMBDA {
    const int64_t at = i + part * kLanes;
    if (at + kLanes <= dim)
      detail::add_vector<Difference>(sum, part, queries, rows, at, kWhole);
    else if (at < dim)
      detail::add_vector<Difference>(sum, part, queries, rows, at, static_cast<int>(dim - at));
  });
  simd::unroll<Q>([&](auto q) VELM_INLINE_LAMBDA {
    simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      const auto& parts = sum[q][r];
      out[q][r] = simd::sum_lanes((parts[0] + parts[1]) + (parts[2] + parts[3]));
    });
  });
}

template <bool Difference, class T>
VELM_INLINE float sum_pair(const float* query, const T* row, int64_t dim) {
  float out[1][1];
  sum_pairs<Difference>(out, {query}, {row}, dim);
  return out[0][0];
}

template <class T>
VELM_INLINE float square_sum(const T* row, int64_t dim) {
  Vec sum[kParts] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  int64_t i = 0;
  int part = 0;
  for (; i + kParts * kLanes <= dim; i += kParts * kLanes) {
    simd::unroll<kParts>([&](auto p) VELM_INLINE_LAMBDA {
      const Vec x = simd::load(row + i + p * kLanes);
      sum[p] = simd::fma(x, x, sum[p]);
    });
  }
  for (; i < dim; i += kLanes, ++part) {
    const Vec x = simd::load_first(row + i, static_cast<int>(dim - i < kLanes ? dim - i : kLanes));
    sum[part] = simd::fma(x, x, sum[part]);
  }
  return simd::sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The norm that a row is divided by. NaN stays.
inline float norm_of(float square_sum) {
  const float norm = std::sqrt(square_sum);
  return norm < kLeastNorm ? kLeastNorm : norm;
}

// From the sum of a pair; the inverse norms are those of a cosine.
template <Metric M>
VELM_INLINE float similarity_of(float sum, float inverse_query, float inverse_row) {
  return M == Metric::cosine ? (sum * inverse_query) * inverse_row : sum;
}

}  // namespace velm::topk
