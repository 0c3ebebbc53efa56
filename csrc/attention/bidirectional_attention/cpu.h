// Bidirectional attention on the CPU: what forward and backward share.
//
// The scores of one batch entry and head form a matrix whose rows belong to the longer sequence and whose columns to
// the shorter one. It is computed in tiles of kTileRows x kTileColumns, and each tile serves both directions: rows
// attend over its columns and columns over its rows. What a direction gathers for a row is complete after one pass over
// the columns; what is gathered for the columns is collected over chunks of rows and added up at the end. The chunks
// depend on the sizes alone, and so does every sum.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "common/philox.h"
#include "common/tensor.h"
#include "simd/layout.h"
#include "simd/math.h"
#include "simd/parallel.h"
#include "simd/product.h"
#include "simd/scratch.h"
#include "simd/transpose.h"

namespace velm::bidirectional {

using simd::kLanes;
using simd::padded;
using simd::round_up;
using simd::Vec;

inline constexpr int64_t kRows = 48, kColumns = 96;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// One of the two sequences.
template <class T>
struct Side {
  Rows<const T> query, value;
  const bool* mask = nullptr;  // (batch, length), true = may be attended by the other side
  int64_t length = 0, value_dim = 0;

  Side(const Tensor& query, const Tensor& value, const std::optional<Tensor>& mask)
      : query(query),
        value(value),
        mask(mask ? const_data<bool>(*mask) : nullptr),
        length(query.size(2)),
        value_dim(value.size(3)) {}
  const bool* mask_of(int64_t batch) const { return mask ? mask + batch * length : nullptr; }
  bool any_visible(int64_t batch) const {
    const bool* m = mask_of(batch);
    return m ? std::any_of(m, m + length, [](bool x) { return x; }) : length > 0;
  }
};

template <class T>
struct Problem {
  Side<T> rows, columns;
  int64_t batch, heads, head_dim;
  bool swapped;  // rows belong to sequence b
  float scale;
  bool dropout;
  uint64_t seed = 0;
  uint32_t drop_below = 0;
  float keep_scale = 1.0f;

  Problem(const Tensor& query_a, const Tensor& query_b, const Tensor& value_a, const Tensor& value_b,
          const std::optional<Tensor>& mask_a, const std::optional<Tensor>& mask_b, const std::optional<Tensor>& seed_,
          double scale_, double dropout_p)
      : rows(query_a, value_a, mask_a),
        columns(query_b, value_b, mask_b),
        batch(query_a.size(0)),
        heads(query_a.size(1)),
        head_dim(query_a.size(3)),
        swapped(rows.length < columns.length),
        scale(static_cast<float>(scale_)),
        dropout(seed_.has_value()) {
    if (swapped) std::swap(rows, columns);
    if (dropout) {
      seed = static_cast<uint64_t>(*const_data<int64_t>(*seed_));
      drop_below = static_cast<uint32_t>(dropout_p * 4294967296.0);
      keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    }
  }

  // Rows of a chunk: enough chunks for many threads, but none so short that packing the columns for it would show.
  int64_t chunk() const {
    const int64_t wanted = (32 + batch * heads - 1) / std::max<int64_t>(1, batch * heads);
    return std::max<int64_t>(8 * kRows, round_up((rows.length + wanted - 1) / wanted, kRows));
  }
  int64_t chunks() const { return std::max<int64_t>(1, (rows.length + chunk() - 1) / chunk()); }
  int64_t padded_columns() const { return padded(columns.length); }

  // Factors of dropout for the weights of row over columns: f[i * ld + j], i < count, j < width (rounded up to a
  // vector). Needs first_column % 4 == 0.
  void row_factors(float* f, int64_t ld, int64_t index, int64_t first_row, int64_t count, int64_t first_column,
                   int64_t width) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < width; j += 4 * kLanes) {
        simd::VecUint c[4] = {simd::VecUint(static_cast<uint32_t>(first_row + i)), quad_numbers((first_column + j) / 4),
                              simd::VecUint(static_cast<uint32_t>(index)), simd::VecUint(swapped ? 1u : 0u)};
        simd::philox(c, seed);
        float words[4][kLanes];
        for (int w = 0; w < 4; ++w) simd::store(words[w], factor(c[w]));
        const int64_t stop = std::min<int64_t>(4 * kLanes, round_up(width, kLanes) - j);
        for (int64_t k = 0; k < stop; ++k) f[i * ld + j + k] = words[k & 3][k >> 2];
      }
    }
  }

  // The same for the weights of columns over rows, f[i * ld + j] for row i and column j. Needs first_row % 4 == 0.
  void column_factors(float* f, int64_t ld, int64_t index, int64_t first_row, int64_t count, int64_t first_column,
                      int64_t width) const {
    for (int64_t i = 0; i < count; i += 4) {
      for (int64_t j = 0; j < width; j += kLanes) {
        simd::VecUint c[4] = {quad_numbers(first_column + j), simd::VecUint(static_cast<uint32_t>((first_row + i) / 4)),
                              simd::VecUint(static_cast<uint32_t>(index)), simd::VecUint(swapped ? 0u : 1u)};
        simd::philox(c, seed);
        for (int64_t w = 0; w < std::min<int64_t>(4, count - i); ++w) simd::store(f + (i + w) * ld + j, factor(c[w]));
      }
    }
  }

 private:
  static simd::VecUint quad_numbers(int64_t first) {
    const auto base = static_cast<uint32_t>(first);
    return simd::VecUint([=](auto i) { return base + static_cast<uint32_t>(i); });
  }
  Vec factor(simd::VecUint word) const {
    return simd::select(simd::at_least(word, drop_below), Vec(keep_scale), simd::zero());
  }
};

// The format of the matrix products' operands for inputs of type T.
template <class T>
struct Operands {
  using Format = simd::Words32;
};
#if defined(VELM_BF16_DOT)
template <>
struct Operands<simd::bf16> {
  using Format = simd::Pairs16;
};
#endif
template <class T>
using FormatFor = typename Operands<T>::Format;
template <class T>
using WordFor = typename FormatFor<T>::Word;

// Words of a row of `columns` elements, its neighbours in one word.
template <class T>
int64_t words_of(int64_t columns) {
  return (columns + FormatFor<T>::kDepth - 1) / FormatFor<T>::kDepth;
}

// How a product of queries begins: fp32 queries are packed with the scale, others would be rounded by it.
template <class T>
inline constexpr simd::Start kScores = FormatFor<T>::kDepth == 1 ? simd::Start::zero : simd::Start::zero_scale_product;

// Of row first + i neighbours in one word, out[i * ld + word], with zeros up to a whole vector; rows for which
// read(row) is false are zero. True if all fp32 words are finite.
template <class T, class Read>
inline bool pack_rows(WordFor<T>* out, int64_t ld, const Rows<const T>& rows, int64_t batch, int64_t head,
                      int64_t first, int64_t count, int64_t dim, const Read& read) {
  using Format = FormatFor<T>;
  constexpr int64_t kStep = kLanes * Format::kDepth;
  Vec bad = simd::zero();
  for (int64_t i = 0; i < count; ++i, out += ld) {
    const T* from = read(first + i) ? rows.at(batch, head, first + i) : nullptr;
    for (int64_t d = 0; d < dim; d += kStep) {
      const int width = static_cast<int>(std::min(kStep, dim - d));
      const auto words = from == nullptr  ? typename Format::Words(0)
                         : width == kStep ? Format::neighbours(from + d)
                                          : Format::neighbours(from + d, width);
      if constexpr (Format::kDepth == 1) bad = simd::fma(words, simd::zero(), bad);
      simd::store_words(out + d / Format::kDepth, words);
    }
  }
  return simd::sum_lanes(bad) == 0.0f;
}

// out[i * ld + d] = element d of kDepth rows from first + i * kDepth on in one word, in the same way. True if all is
// finite.
template <class T, class Read>
inline bool pack_together(WordFor<T>* out, int64_t ld, const Rows<const T>& rows, int64_t batch, int64_t head,
                          int64_t first, int64_t count, int64_t dim, const Read& read) {
  using Format = FormatFor<T>;
  Vec bad = simd::zero();
  for (int64_t i = 0; i < count; i += Format::kDepth, out += ld) {
    const T* from[Format::kDepth];
    for (int step = 0; step < Format::kDepth; ++step) {
      const bool there = i + step < count && read(first + i + step);
      from[step] = there ? rows.at(batch, head, first + i + step) : nullptr;
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int width = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
      Vec x[Format::kDepth];
      simd::unroll<Format::kDepth>([&](auto step) VELM_INLINE_LAMBDA {
        x[step] = from[step] ? simd::load_first(from[step] + d, width) : simd::zero();
        bad = simd::fma(x[step], simd::zero(), bad);
      });
      simd::store_words(out + d, Format::together(x));
    }
  }
  return simd::sum_lanes(bad) == 0.0f;
}

// out[word * ld + j] = row j [word], in fp32 words times factor, with zeros for rows for which read(row) is false and
// up to a whole vector.
template <class T, class Read>
inline void pack_transposed(WordFor<T>* out, int64_t ld, const Rows<const T>& rows, int64_t batch, int64_t head,
                            int64_t count, int64_t dim, float factor, const Read& read) {
  using Format = FormatFor<T>;
  constexpr int64_t kStep = kLanes * Format::kDepth;
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t d = 0; d < dim; d += kStep) {
      const int width = static_cast<int>(std::min(kStep, dim - d));
      typename Format::Words block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = j + i < count && read(j + i) ? Format::neighbours(rows.at(batch, head, j + i) + d, width)
                                                : typename Format::Words(0);
        if constexpr (Format::kDepth == 1) block[i] *= factor;
      }
      simd::transpose(block);
      for (int i = 0; i < words_of<T>(width); ++i) simd::store_words(out + (d / Format::kDepth + i) * ld + j, block[i]);
    }
  }
}

// A tile of weights, or of gradients of scores, as the left operand of a product over its rows, [word][column], or over
// its columns, [row][word]. fp32 operands are the tile itself.
template <class T>
class TileWords {
 public:
  using Word = WordFor<T>;
  using Format = FormatFor<T>;
  static constexpr int64_t kLd = kColumns + 16, kLdOverColumns = kLd / Format::kDepth;

  explicit TileWords(simd::Scratch& scratch) {
    if (Format::kDepth > 1) words_ = scratch.take<Word>(kRows * kLd);
  }

  // `full` is a multiple of kLanes. A row beyond `count` is zero where a word needs one.
  const Word* over_rows(const float* tile, int64_t count, int64_t full) const {
    if constexpr (Format::kDepth == 1) {
      return tile;
    } else {
      for (int64_t i = 0; i < count; i += Format::kDepth) {
        for (int64_t j = 0; j < full; j += kLanes) {
          Vec x[Format::kDepth];
          simd::unroll<Format::kDepth>([&](auto step) VELM_INLINE_LAMBDA {
            x[step] = i + step < count ? simd::load(tile + (i + step) * kLd + j) : simd::zero();
          });
          simd::store_words(words_ + i / Format::kDepth * kLd + j, Format::together(x));
        }
      }
      return words_;
    }
  }

  const Word* over_columns(const float* tile, int64_t count, int64_t full) const {
    if constexpr (Format::kDepth == 1) {
      return tile;
    } else {
      static_assert(Format::kDepth == 2 && kColumns % (2 * kLanes) == 0);
      for (int64_t i = 0; i < count; ++i) {
        const float* row = tile + i * kLd;
        for (int64_t j = 0; j < full; j += 2 * kLanes) {
          const Vec second = j + kLanes < full ? simd::load(row + j + kLanes) : simd::zero();
          simd::store_words(words_ + i * kLdOverColumns + j / 2, Format::neighbours(simd::load(row + j), second));
        }
      }
      return words_;
    }
  }

 private:
  Word* words_ = nullptr;
};

// 1 for what may be attended, 0 elsewhere and up to a whole vector.
inline void pack_mask(float* out, const bool* mask, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] = !mask || mask[j] ? 1.0f : 0.0f;
  std::fill(out + count, out + round_up(count, kLanes), 0.0f);
}

template <class T>
inline void store_row(T* out, const float* in, int64_t dim, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) simd::store(out + d, simd::load(in + d) * factor);
  if (d < dim) {
    const int left = static_cast<int>(dim - d);
    simd::store_first(out + d, simd::load_first(in + d, left) * factor, left);
  }
}

void forward(Tensor query_a, Tensor query_b, Tensor value_a, Tensor value_b, std::optional<Tensor> mask_a,
             std::optional<Tensor> mask_b, std::optional<Tensor> seed, double scale, double dropout_p, Tensor out_a,
             Tensor out_b, Tensor lse_a, Tensor lse_b);
void backward(std::optional<Tensor> grad_out_a, std::optional<Tensor> grad_out_b,
              std::optional<Tensor> grad_logsumexp_a, std::optional<Tensor> grad_logsumexp_b, Tensor query_a,
              Tensor query_b, Tensor value_a, Tensor value_b, std::optional<Tensor> mask_a,
              std::optional<Tensor> mask_b, std::optional<Tensor> seed, Tensor out_a, Tensor out_b, Tensor logsumexp_a,
              Tensor logsumexp_b, double scale, double dropout_p, std::optional<Tensor> grad_query_a,
              std::optional<Tensor> grad_query_b, std::optional<Tensor> grad_value_a,
              std::optional<Tensor> grad_value_b);

}  // namespace velm::bidirectional
