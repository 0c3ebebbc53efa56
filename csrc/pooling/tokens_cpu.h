// Which tokens belong to which row of the result.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "simd/lines.h"

namespace velm::pooling {

using simd::as_floats;
using simd::from_floats;
using simd::kLanes;
using simd::Lines;
using simd::Vec;

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
  // One byte per token, or null.
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

// Pieces of at least so many tokens where there are as many, at least one per segment, in order. They depend on the
// shape alone.
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

}  // namespace velm::pooling
