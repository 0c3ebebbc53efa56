// attention_pool on the CPU: rows against the tokens of a segment, tile by tile of tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

#include "pooling/tokens_cpu.h"
#include "simd/layout.h"
#include "simd/math.h"
#include "simd/scratch.h"

namespace velm::pooling {

using namespace simd;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Tokens that are taken together: they stay in the cache between the two products.
constexpr int kTile = 32;
constexpr int64_t kLeastTokens = 64;
// Rows and vectors of a register tile.
constexpr int kRowsOfTile = 4, kVectors = kRegisters == 32 ? 4 : 2;

// Columns of a product that are summed at a time: those of all rows of a register tile stay in the innermost cache.
constexpr int64_t kColumns = 768;

// Memory that will be read soon. The products of a tile leave the way to memory idle, so that they ask for the tokens
// of the next one meanwhile: a line at every step, into the second cache.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const char* begin, const char* end) : at_(begin), end_(end) {}

  // Calls step(k) for k = begin, begin + by, ... below end. `known` is memory that may be asked for in vain.
  template <class Step>
  VELM_INLINE void during(int64_t begin, int64_t end, int64_t by, const void* known, const Step& step) {
    const bool is_left = (end - begin) / by * kLine <= end_ - at_;
    const char* at = is_left ? at_ : static_cast<const char*>(known);
    const int64_t line = is_left ? kLine : 0;
    for (int64_t k = begin; k < end; k += by) {
      __builtin_prefetch(at, 0, 2);
      at += line;
      step(k);
    }
    if (is_left) at_ = at;
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_ = nullptr, *end_ = nullptr;
};

// out[i * kTile + j] (+)= a[i] . b[j] over [begin, end), whole vectors, for I rows of a and J of b.
template <int I, int J>
void dot_tile(const float* const* a, const float* const* b, int64_t begin, int64_t end, float* out, Prefetch& ahead) {
  Vec sum[I][J];
  unroll<I>([&](auto i) VELM_INLINE_LAMBDA { unroll<J>([&](auto j) VELM_INLINE_LAMBDA { sum[i][j] = zero(); }); });
  ahead.during(begin, end, kLanes, b[0], [&](int64_t c) VELM_INLINE_LAMBDA {
    Vec y[J];
    unroll<J>([&](auto j) VELM_INLINE_LAMBDA { y[j] = load(b[j] + c); });
    unroll<I>([&](auto i) VELM_INLINE_LAMBDA {
      const Vec x = load(a[i] + c);
      unroll<J>([&](auto j) VELM_INLINE_LAMBDA { sum[i][j] = fma(x, y[j], sum[i][j]); });
    });
  });
  unroll<I>([&](auto i) VELM_INLINE_LAMBDA {
    unroll<J>([&](auto j) VELM_INLINE_LAMBDA {
      const float total = sum_lanes(sum[i][j]);
      out[i * kTile + j] = begin ? out[i * kTile + j] + total : total;
    });
  });
}

// All products of some rows and the tokens of a tile.
inline void dots(const float* const* row, int64_t rows, const float* const* token, int tokens, int64_t padded,
                 float* out, Prefetch& ahead) {
  constexpr int kI = kRowsOfTile, kJ = kVectors;
  for (int64_t begin = 0; begin < padded; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, padded);
    for (int j = 0; j < tokens;) {
      const int tokens_at_once = j + kJ <= tokens ? kJ : 1;
      int64_t i = 0;
      for (; i + kI <= rows; i += kI) {
        if (tokens_at_once == kJ)
          dot_tile<kI, kJ>(row + i, token + j, begin, end, out + i * kTile + j, ahead);
        else
          dot_tile<kI, 1>(row + i, token + j, begin, end, out + i * kTile + j, ahead);
      }
      for (; i < rows; ++i) {
        if (tokens_at_once == kJ)
          dot_tile<1, kJ>(row + i, token + j, begin, end, out + i * kTile + j, ahead);
        else
          dot_tile<1, 1>(row + i, token + j, begin, end, out + i * kTile + j, ahead);
      }
      j += tokens_at_once;
    }
  }
}

// Weights of a sum of rows: that of row j in sum i.
struct Weights {
  const float* data;
  int64_t sum_stride, row_stride;
  float operator()(int64_t i, int64_t j) const { return data[i * sum_stride + j * row_stride]; }
};

// out[i] = out[i] * scale[i] + sum_j weights(i, j) row[j], for I sums and V vectors of columns; scale null: 0.
template <int I, int V>
VELM_INLINE void combine_tile(const Weights& weights, int64_t first, const float* const* row, int64_t rows,
                              float* const* out, int64_t c, const float* scale, Prefetch& ahead) {
  Vec sum[I][V];
  unroll<I>([&](auto i) VELM_INLINE_LAMBDA {
    unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
      sum[i][v] = scale ? load(out[first + i] + c + v * kLanes) * scale[first + i] : zero();
    });
  });
  ahead.during(0, rows, 1, row[0], [&](int64_t j) VELM_INLINE_LAMBDA {
    Vec x[V];
    unroll<V>([&](auto v) VELM_INLINE_LAMBDA { x[v] = load(row[j] + c + v * kLanes); });
    unroll<I>([&](auto i) VELM_INLINE_LAMBDA {
      const Vec w(weights(first + i, j));
      unroll<V>([&](auto v) VELM_INLINE_LAMBDA { sum[i][v] = fma(w, x[v], sum[i][v]); });
    });
  });
  unroll<I>([&](auto i) VELM_INLINE_LAMBDA {
    unroll<V>([&](auto v) VELM_INLINE_LAMBDA { store(out[first + i] + c + v * kLanes, sum[i][v]); });
  });
}

inline void combine(const Weights& weights, const float* const* row, int64_t rows, float* const* out, int64_t sums,
                    int64_t padded, const float* scale, Prefetch& ahead) {
  constexpr int64_t kTileColumns = kVectors * kLanes;
  int64_t c = 0;
  for (; c + kTileColumns <= padded; c += kTileColumns) {
    int64_t i = 0;
    for (; i + kRowsOfTile <= sums; i += kRowsOfTile)
      combine_tile<kRowsOfTile, kVectors>(weights, i, row, rows, out, c, scale, ahead);
    for (; i < sums; ++i) combine_tile<1, kVectors>(weights, i, row, rows, out, c, scale, ahead);
  }
  for (; c < padded; c += kLanes)
    for (int64_t i = 0; i < sums; ++i) combine_tile<1, 1>(weights, i, row, rows, out, c, scale, ahead);
}

// The tokens that count, tile by tile, as rows of float32 that are whole vectors long.
class Tiles {
 public:
  Tiles(Scratch& scratch, const Tensor& x, const Tokens& tokens, int64_t dim, int64_t padded, int64_t stride)
      : from_(x, tokens.bounds ? 0 : x.stride(0), x.stride(x.dim() - 2)),
        tokens_(tokens),
        dim_(dim),
        stride_(stride),
        is_dense_(x.stride(x.dim() - 2) == dim),
        // Rows a multiple of 2 KiB apart would fall into few sets of the cache.
        in_place_(x.scalar_type() == ScalarType::Float && dim == padded && dim % 512 != 0),
        memory_(scratch.take(kTile * stride)) {
    std::fill_n(memory_, kTile * stride, 0.0f);
  }

  const float* row[kTile];
  int64_t number[kTile];
  int count = 0;
  // The tokens behind them.
  Prefetch ahead;

  // The next tile of a piece, from token `n` on, which moves behind it; false where there is none. `skip` is called
  // with the tokens that do not count.
  template <class Skip>
  bool next(const Piece& piece, int64_t& n, const Skip& skip) {
    const bool* live = tokens_.mask_of(piece.segment);
    const int64_t end = tokens_.end(piece.segment);
    count = 0;
    for (; n < piece.end && count < kTile; ++n) {
      if (n >= end || (live && !live[n])) {
        skip(n);
        continue;
      }
      const char* there = from_.at(piece.segment, n);
      float* copy = memory_ + count * stride_;
      row[count] = in_place_ ? reinterpret_cast<const float*>(there) : copy;
      if (!in_place_ && as_floats(from_.type, there, dim_, copy) != copy)
        std::memcpy(copy, there, sizeof(float) * dim_);
      number[count++] = n;
    }
    ahead = Prefetch();
    // Where few tokens count, these would be the wrong ones.
    if (is_dense_ && !live && n < end)
      ahead = Prefetch(from_.at(piece.segment, n), from_.at(piece.segment, std::min(n + kTile, end)));
    return count > 0;
  }

 private:
  Lines from_;
  const Tokens& tokens_;
  int64_t dim_, stride_;
  bool is_dense_, in_place_;
  float* memory_;
};

// Rows of any type as float32 rows `padded` apart, filled up with zeros.
inline void unpack(const Lines& from, int64_t outer, int64_t rows, int64_t dim, int64_t stride, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = to + i * stride;
    const float* values = as_floats(from.type, from.at(outer, i), dim, row);
    if (values != row) std::copy(values, values + dim, row);
    std::fill(row + dim, row + stride, 0.0f);
  }
}

struct Problem {
  Tokens tokens;
  int64_t rows, dim;
  // Whole vectors, and the distance of rows in memory of our own.
  int64_t padded, stride;
  Lines from_rows;

  Problem(const Tensor& x, const Tensor& rows_tensor, int64_t segments, const std::optional<Tensor>& lengths,
          const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens)
      : tokens(segments, x.size(x.dim() - 2), lengths, mask, cu_seqlens),
        rows(rows_tensor.size(1)),
        dim(rows_tensor.size(2)),
        padded(round_up(dim, kLanes)),
        stride(simd::padded(dim)),
        from_rows(rows_tensor, rows_tensor.size(0) == 1 ? 0 : rows * dim, dim) {}
};

}  // namespace velm::pooling
