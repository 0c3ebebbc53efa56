// Squares of neighbouring tokens, by number: where they lie in maps of one size or of several.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "simd/parallel.h"

namespace velm::pooling {

// Bytes below which another thread costs more than it saves.
constexpr int64_t kGrainBytes = 1 << 16;

// The squares of every entry of a batch, `factor` rows of `factor` tokens each.
struct Windows {
  const int32_t* table;  // (batch, rows, 2): first token and width of its map; null for one map of height * width
  int64_t batch, tokens, height, width, factor, rows;

  Windows(const std::optional<Tensor>& windows, int64_t batch, int64_t tokens, int64_t height, int64_t width,
          int64_t factor)
      : table(windows ? const_data<int32_t>(*windows) : nullptr),
        batch(batch),
        tokens(tokens),
        height(height),
        width(width),
        factor(factor),
        rows(windows ? windows->size(1) : (height / factor) * (width / factor)) {}

  struct Window {
    int64_t first, width;  // first is -1 where there is no token
  };

  Window at(int64_t entry, int64_t row) const {
    if (!table) {
      const int64_t across = width / factor;
      return {(row / across * width + row % across) * factor, width};
    }
    const int32_t* of = table + 2 * (entry * rows + row);
    const int64_t first = of[0], of_width = of[1];
    // Whatever the numbers are, no memory but that of x is touched.
    const bool inside = first >= 0 && of_width >= factor && first + (factor - 1) * of_width + factor <= tokens;
    return {inside ? first : -1, of_width};
  }

  // Calls f(entry, row, window) for every square, shared by threads; `bytes` are those of a square.
  template <class F>
  void for_each(int64_t bytes, const F& f) const {
    simd::parallel_ranges(batch * rows, kGrainBytes / std::max<int64_t>(bytes, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i / rows, i % rows, at(i / rows, i % rows));
    });
  }

  // Fills the tokens of (batch, tokens, dim), contiguous, that lie in no square with zeros.
  void clear_others(const Tensor& grad) const {
    const int64_t bytes = grad.size(2) * static_cast<int64_t>(grad.element_size());
    if (!table && height % factor == 0 && width % factor == 0) return;
    std::vector<char> inside(static_cast<size_t>(batch * tokens), 0);
    for (int64_t i = 0; i < batch * rows; ++i) {
      const Window window = at(i / rows, i % rows);
      if (window.first < 0) continue;
      for (int64_t line = 0; line < factor; ++line)
        std::fill_n(inside.begin() + i / rows * tokens + window.first + line * window.width, factor, char{1});
    }
    char* data = static_cast<char*>(grad.mutable_data_ptr());
    simd::parallel_ranges(batch * tokens, kGrainBytes / std::max<int64_t>(bytes, 1), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        if (!inside[static_cast<size_t>(t)]) std::fill_n(data + t * bytes, bytes, char{0});
    });
  }
};

}  // namespace velm::pooling
