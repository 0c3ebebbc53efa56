// Copies of matrix operands in the order in which the micro-kernel reads them.
//
// The operand of a product over `depth` is cut into panels of W consecutive rows (of A) or columns (of B). A panel is
// stored as [depth][W], so that one step of the micro-kernel reads consecutive memory, and widened to fp32; or, where
// the processor multiplies bfloat16, as [depth / 2][W] words that hold two consecutive steps. Elements beyond the
// matrix are zero.
#pragma once

#include <algorithm>
#include <array>

#include "linear/linear/cpu_elementwise.h"
#include "simd/tile.h"

namespace velm::linear {

using simd::kLanes;
using simd::Vec;
using simd::Words32;
#if defined(VELM_BF16_DOT)
using simd::Pairs16;
#endif

template <class Word, class Words>
VELM_INLINE void store_words(Word* p, Words x, int n) {
  if (n == kLanes) return simd::store_words(p, x);
  simd::store_first(reinterpret_cast<float*>(p), std::bit_cast<Vec>(x), n);
}

// Packs rows [row, row + valid) of `in`, whose contiguous dimension is the depth, as one panel [depth][W].
template <int W, class Format>
void pack_along_depth(Format, typename Format::Word* out, const Source& in, int64_t row, int valid, int64_t depth) {
  constexpr int kTall = (W + kLanes - 1) / kLanes * kLanes;
  constexpr int64_t kSteps = 4 * kLanes, kSquare = kLanes * Format::kDepth;
  // rows of a chunk of the depth as fp32: small enough for the first-level cache
  alignas(64) float rows[kTall][kSteps];
  for (int r = valid; r < kTall; ++r) std::fill_n(rows[r], kSteps, 0.0f);
  for (int64_t k = 0; k < depth; k += kSteps) {
    const int64_t steps = std::min(kSteps, depth - k);
    for (int r = 0; r < valid; ++r) {
      in(row + r, k, steps, rows[r]);
      std::fill(rows[r] + steps, rows[r] + kSteps, 0.0f);
    }
    for (int first = 0; first < W; first += kLanes) {
      const int lanes_left = std::min(kLanes, W - first);
      for (int64_t s = 0; s < steps; s += kSquare) {
        typename Format::Words square[kLanes];
        simd::unroll<kLanes>([&](auto r) VELM_INLINE_LAMBDA { square[r] = Format::neighbours(rows[first + r] + s); });
        simd::transpose(square);
        auto* to = out + (k + s) / Format::kDepth * W + first;
        const int words =
            static_cast<int>(std::min<int64_t>(kLanes, (steps - s + Format::kDepth - 1) / Format::kDepth));
        if (words == kLanes) {
          simd::unroll<kLanes>([&](auto i) VELM_INLINE_LAMBDA { store_words(to + i * W, square[i], lanes_left); });
        } else {
          for (int i = 0; i < words; ++i) store_words(to + i * W, square[i], lanes_left);
        }
      }
    }
  }
}

// Packs `panels` panels from column `column` on, of which `valid` columns are there, over rows
// [first_row + begin, first_row + end) of `in`, into the depth [begin, end) of panels [words][W] that lie one after
// another at out. begin is a multiple of kDepth; an odd end is that of the matrix. If sums is given, the sums over
// these rows are written to sums[0..panels * W).
template <int W, class Format>
void pack_across_depth(Format, typename Format::Word* out, int64_t words, const Source& in, int64_t column,
                       int64_t panels, int64_t valid, int64_t first_row, int64_t begin, int64_t end, float* sums) {
  constexpr int64_t kMost = 256 + 2 * W;
  alignas(64) float rows[2][kMost + 16];
  const int64_t width = panels * W;
  for (auto& r : rows) std::fill_n(r, kMost, 0.0f);
  if (sums) std::fill_n(sums, width, 0.0f);
  for (int64_t k = begin; k < end; k += Format::kDepth) {
    in(first_row + k, column, valid, rows[0]);
    if constexpr (Format::kDepth == 2) {
      if (k + 1 < end)
        in(first_row + k + 1, column, valid, rows[1]);
      else
        std::fill_n(rows[1], kMost, 0.0f);
    }
    if (sums) {
      for (int64_t j = 0; j < width; ++j) sums[j] += Format::kDepth == 2 ? rows[0][j] + rows[1][j] : rows[0][j];
    }
    auto* to = out + k / Format::kDepth * W;
    for (int64_t p = 0; p < panels; ++p, to += words * W) {
      for (int first = 0; first < W; first += kLanes) {
        const int lanes_left = std::min(kLanes, W - first);
        Vec steps[Format::kDepth];
        simd::unroll<Format::kDepth>([&](auto i)
                                         VELM_INLINE_LAMBDA { steps[i] = simd::load(rows[i] + p * W + first); });
        store_words(to + first, Format::together(steps), lanes_left);
      }
    }
  }
}

}  // namespace velm::linear
