// Pooling over tokens: which tokens belong to which row of the result, and powers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "simd/lines.h"
#include "simd/math.h"

namespace velm::pooling {

using simd::as_floats;
using simd::from_floats;
using simd::kLanes;
using simd::Lines;
using simd::Vec;

enum Mode : int64_t { kMean, kSum, kMax, kLogSumExp, kGem };

constexpr float kGemEps = 1e-6f;
constexpr int64_t kMostPieces = 64, kLeastElements = 65536;

// The tokens of every segment, by number; in packed tensors numbers run through all segments.
struct Tokens {
  int64_t segments, tokens;
  const int32_t *lengths, *bounds;
  const bool* mask;

  Tokens(int64_t segments, int64_t tokens, const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask,
         const std::optional<Tensor>& cu_seqlens)
      : segments(segments),
        tokens(tokens),
        lengths(lengths ? const_data<int32_t>(*lengths) : nullptr),
        bounds(cu_seqlens ? const_data<int32_t>(*cu_seqlens) : nullptr),
        mask(mask ? const_data<bool>(*mask) : nullptr) {}

  int64_t begin(int64_t segment) const { return bounds ? std::clamp<int64_t>(bounds[segment], 0, tokens) : 0; }
  int64_t end(int64_t segment) const {
    if (bounds) return std::clamp<int64_t>(bounds[segment + 1], begin(segment), tokens);
    return lengths ? std::clamp<int64_t>(lengths[segment], 0, tokens) : tokens;
  }
  // One byte a token, or null.
  const bool* mask_of(int64_t segment) const { return mask ? mask + segment * tokens : nullptr; }
  int64_t count(int64_t segment) const {
    const int64_t first = begin(segment), last = end(segment);
    const bool* live = mask_of(segment);
    return live ? std::count(live + first, live + last, true) : last - first;
  }
};

// Tokens [begin, end) of one segment.
struct Piece {
  int64_t segment, begin, end;
};

// Pieces of at least so many tokens where there are as many, at least one a segment, in order. They depend on the shape
// alone.
inline std::vector<Piece> pieces_of(const Tokens& tokens, int64_t least, bool whole_segments) {
  const int64_t all = tokens.bounds ? tokens.tokens : tokens.segments * tokens.tokens;
  const int64_t most = std::max({(all + kMostPieces - 1) / kMostPieces, least, int64_t{1}});
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < tokens.segments; ++s) {
    // Backward writes all tokens of a padded segment.
    const int64_t begin = tokens.begin(s), end = whole_segments && !tokens.bounds ? tokens.tokens : tokens.end(s);
    int64_t at = begin;
    do {
      pieces.push_back({s, at, std::min(at + most, end)});
      at += most;
    } while (at < end);
  }
  return pieces;
}

// x^p for x >= 0, to about |p| units in the last place: the whole and the fractional part of log2(x) apart, so that a
// large logarithm does not cost the digits of the power. Not inlined: it is long, and slow whatever is around it.
[[gnu::noinline]] inline Vec power(Vec x, float p) {
  using namespace simd;
  const VecInt bits = std::bit_cast<VecInt>(x);
  const VecInt exponent = (bits - 0x3f3504f3) >> 23;
  const Vec m = std::bit_cast<Vec>(bits - (exponent << 23));
  const Vec whole = stdx::static_simd_cast<Vec>(exponent);
  const Vec fraction = simd::log(m) * 1.442695040888963f;
  const Vec high = whole * p;
  const Vec low = fma(whole, Vec(p), -high);
  const Vec limited = detail::clamp_keep_nan(high, -2000.0f, 2000.0f);
  const Vec n = detail::round_nearest(limited);
  const Vec r = fma(fraction, Vec(p), (limited - n) + low);
  // Of |r| <= 1/2 + |p| / 2, the whole part again.
  const Vec more = detail::round_nearest(detail::clamp_keep_nan(r, -2000.0f, 2000.0f));
  const Vec result = detail::scale_by_power(exp2_in_range(detail::clamp_keep_nan(r - more, -1.0f, 1.0f)),
                                            detail::clamp_keep_nan(n + more, -250.0f, 250.0f));
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Vec at_zero = p > 0 ? zero() : Vec(kInfinity), at_infinity = p > 0 ? Vec(kInfinity) : zero();
  const Vec below_infinity = select(x > zero(), result, at_zero);
  return select(x < Vec(kInfinity), below_infinity, select(x == x, at_infinity, x));
}

// x^p for x >= 0; most pool with the third power.
VELM_INLINE Vec power_or_cube(Vec x, float p, float cube) {
  return p == cube ? x * x * x : power(x, p);
}

}  // namespace velm::pooling
