// Which scores of a tile of products may belong to a row that is kept. A tile is summed in another order than what
// decides, and maybe of rounded factors: a score passes unless it is further below the limit than both can differ.
//
// Of |a b - fl(a b)| <= e |a| |b| for the tile and for what decides, which Cauchy and Schwarz give, with e the number
// of terms times the rounding of each:
//
//   dot     s < limit - e |q| |d|
//   cosine  s < (limit - e) |q| |d|
//   l2      s < ((1 - 2 e) (|q|^2 + |d|^2) - limit) / 2        as |q - d|^2 = |q|^2 + |d|^2 - 2 q . d
//
// Comparisons are such that NaN passes.
#pragma once

#include "retrieval/topk_similarity/nearest.h"

namespace velm::topk {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What a query brings to the bound of its scores.
struct OfQuery {
  // Bound = offset + slope * norm of a row, of a cosine offset * norm, of l2 offset + half of a square.
  float *offset, *slope;
};

struct Rounding {
  float relative;
  // Added to norms: what squares and products lose that are subnormal.
  float tiny;

  // `factors`: what each product is off by before it is rounded itself.
  Rounding(int64_t dim, float factors)
      : relative(factors + static_cast<float>(2 * dim + 64) * 0x1p-23f),
        tiny(std::sqrt(static_cast<float>(dim)) * 0x1p-58f) {}
};

template <Metric M>
inline void set_bound(const OfQuery& to, int64_t at, float limit, float square_sum, Rounding rounding) {
  if constexpr (M == Metric::dot) {
    to.offset[at] = limit;
    to.slope[at] = -rounding.relative * (std::sqrt(square_sum) + rounding.tiny);
  } else if constexpr (M == Metric::cosine) {
    to.offset[at] = square_sum < kInfinity ? (limit - rounding.relative) * norm_of(square_sum) : kNaN;
  } else {
    const float half = 0.5f * ((1.0f - 2.0f * rounding.relative) * square_sum - limit) - rounding.tiny * rounding.tiny;
    to.offset[at] = square_sum < kInfinity ? half : -kInfinity;
  }
}

// What a row brings.
template <Metric M>
inline float of_row(float square_sum, Rounding rounding) {
  if constexpr (M == Metric::dot) return std::sqrt(square_sum) + rounding.tiny;
  // What is divided by infinity is NaN, or 0.
  if constexpr (M == Metric::cosine) return square_sum < kInfinity ? norm_of(square_sum) : kNaN;
  const float half = 0.5f * (1.0f - 2.0f * rounding.relative) * square_sum;
  return half < kInfinity ? half : kNaN;
}

template <Metric M>
VELM_INLINE Vec bound(const OfQuery& of, int64_t at, Vec row) {
  const Vec offset = simd::load(of.offset + at);
  if constexpr (M == Metric::dot) return simd::fma(simd::load(of.slope + at), row, offset);
  if constexpr (M == Metric::cosine) return offset * row;
  return offset + row;
}

}  // namespace velm::topk
