// A panel: up to two vectors' worth of query rows, one row per lane. The rows of all heads that
// share a key head are numbered one after the other, so that panels are full even where each
// head has few queries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention/cross_attention/cpu_problem.h"
#include "simd/layout.h"
#include "simd/product.h"
#include "simd/transpose.h"

namespace velm::attention {

inline constexpr int kLanes = simd::kLanes;
inline constexpr int kPanel = 2 * kLanes;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using simd::padded;
using simd::round_up;

// Words of a row of `columns` elements, its neighbours in one word.
template <class Format>
int64_t words_of(int64_t columns) {
  return (columns + Format::kDepth - 1) / Format::kDepth;
}

// Calls f with the format of the matrix products' operands.
template <class F>
void with_format(const Problem& p, F&& f) {
#if defined(VELM_BF16_DOT)
  if (p.v.dtype == ScalarType::BFloat16) return f(simd::Pairs16{});
#endif
  static_cast<void>(p);
  f(simd::Words32{});
}

// Calls f with a value of the element type of rows that are packed: pairs are packed from bfloat16 alone.
template <class Format, class F>
auto with_packed_type(ScalarType dtype, F&& f) {
  if constexpr (Format::kDepth == 1) {
    return with_type(dtype, f);
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "expected bfloat16");
    return f(simd::bf16{});
  }
}

struct Panel {
  int64_t b = 0, kv_head = 0;
  int count = 0;    // rows in use
  int vectors = 2;  // vectors they need
  int64_t head[kPanel], query[kPanel];
  Range range[kPanel];
  // Over the rows that see anything: the union of their ranges and the part all of them see.
  int64_t lo = 0, hi = 0, all_lo = 0, all_hi = 0;
  // Lane vectors of the ranges for comparison with key numbers relative to `first`.
  alignas(64) float relative_lo[kPanel], relative_hi[kPanel];

  // Rows [first, first + count) of the group's rows.
  Panel(const Problem& p, int64_t batch, int64_t kv, int64_t first, int64_t rows) : b(batch), kv_head(kv) {
    count = static_cast<int>(std::min<int64_t>(rows, kPanel));
    vectors = count > kLanes ? 2 : 1;
    const int64_t per_head = p.query_count(b);
    lo = std::numeric_limits<int64_t>::max();
    all_hi = std::numeric_limits<int64_t>::max();
    for (int l = 0; l < kPanel; ++l) {
      const int64_t row = first + std::min(l, count - 1);
      head[l] = kv * p.group + row / per_head;
      query[l] = row % per_head;
      range[l] = l < count ? p.range(b, query[l]) : Range{};
      if (l >= count) continue;
      if (range[l].hi > range[l].lo) {
        lo = std::min<int64_t>(lo, range[l].lo);
        hi = std::max<int64_t>(hi, range[l].hi);
      }
      all_lo = std::max<int64_t>(all_lo, range[l].lo);
      all_hi = std::min<int64_t>(all_hi, range[l].hi);
    }
    lo = std::min(lo, hi);
  }

  bool sees_all(int64_t from, int64_t to) const { return all_lo <= from && to <= all_hi; }

  void set_relative(int64_t first) {
    for (int l = 0; l < kPanel; ++l) {
      relative_lo[l] = static_cast<float>(std::clamp<int64_t>(range[l].lo - first, 0, 1 << 20));
      relative_hi[l] = static_cast<float>(std::clamp<int64_t>(range[l].hi - first, 0, 1 << 20));
    }
  }
};

// out[d * ld + lane] = row of the lane, word d, in fp32 words times scale; lanes of unused rows, and of rows for which
// keep(lane) is false, are zero. Writes panel.vectors vectors.
template <class Word, class Keep>
void pack_transposed(Word* out, int64_t ld, const Problem& p, const Panel& panel, const Rows& rows, int64_t columns,
                     float scale, Keep&& keep) {
  using Format = simd::FormatOf<Word>;
  constexpr int kStep = kLanes * Format::kDepth;
  const auto scaled = [&](typename Format::Words x) VELM_INLINE_LAMBDA {
    if constexpr (Format::kDepth == 1) x *= scale;
    return x;
  };
  with_packed_type<Format>(rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from[kPanel];
    bool full[2] = {true, true};
    const int64_t first = p.first_query(panel.b);
    for (int l = 0; l < kPanel; ++l) {
      from[l] = l < panel.count && keep(l)
                    ? reinterpret_cast<const T*>(rows.at(p.varlen ? 0 : panel.b, panel.head[l], first + panel.query[l]))
                    : nullptr;
      if (from[l] == nullptr) full[l / kLanes] = false;
    }
    for (int v = 0; v < panel.vectors; ++v) {
      for (int64_t d = 0; d < columns; d += kStep) {
        const int width = static_cast<int>(std::min<int64_t>(columns - d, kStep));
        Word* to = out + d / Format::kDepth * ld + v * kLanes;
        typename Format::Words block[kLanes];
        if (width == kStep && full[v]) {
          simd::unroll<kLanes>(
              [&](auto l) VELM_INLINE_LAMBDA { block[l] = scaled(Format::neighbours(from[v * kLanes + l] + d)); });
          simd::transpose(block);
          simd::unroll<kLanes>([&](auto j) VELM_INLINE_LAMBDA { simd::store_words(to + j * ld, block[j]); });
          continue;
        }
        for (int l = 0; l < kLanes; ++l) {
          const T* row = from[v * kLanes + l];
          block[l] = row == nullptr   ? typename Format::Words(0)
                     : width == kStep ? scaled(Format::neighbours(row + d))
                                      : scaled(Format::neighbours(row + d, width));
        }
        simd::transpose(block);
        for (int j = 0; j < words_of<Format>(width); ++j) simd::store_words(to + j * ld, block[j]);
      }
    }
  });
}

// The biases of the grid's rows, then those of its columns: out[number * width + lane].
template <class Keep>
void pack_grid(float* out, const Problem& p, const Panel& panel, Keep&& keep) {
  const int64_t width = panel.vectors * kLanes;
  pack_transposed(out, width, p, panel, p.rel_pos_height, p.grid_height, 1.0f, keep);
  pack_transposed(out + p.grid_height * width, width, p, panel, p.rel_pos_width, p.grid_width, 1.0f, keep);
}

// out[i * ld + d] = element d of kDepth rows, lane by lane, in one word, zero up to ld; unused and unwanted rows are
// zero. True if all is finite.
template <class Word, class Keep>
bool pack_panel_rows(Word* out, int64_t ld, const Problem& p, const Panel& panel, const Rows& rows, int64_t columns,
                     Keep&& keep) {
  using Format = simd::FormatOf<Word>;
  return with_packed_type<Format>(rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t first = p.first_query(panel.b);
    simd::Vec bad = simd::zero();
    for (int l = 0; l < panel.vectors * kLanes; l += Format::kDepth) {
      Word* to = out + l / Format::kDepth * ld;
      const T* from[Format::kDepth];
      for (int i = 0; i < Format::kDepth; ++i) {
        from[i] = l + i < panel.count && keep(l + i)
                      ? reinterpret_cast<const T*>(
                            rows.at(p.varlen ? 0 : panel.b, panel.head[l + i], first + panel.query[l + i]))
                      : nullptr;
      }
      for (int64_t d = 0; d < ld; d += kLanes) {
        const int width = static_cast<int>(std::clamp<int64_t>(columns - d, 0, kLanes));
        simd::Vec x[Format::kDepth];
        simd::unroll<Format::kDepth>([&](auto i) VELM_INLINE_LAMBDA {
          x[i] = from[i] && width > 0 ? simd::load_first(from[i] + d, width) : simd::zero();
          bad = simd::fma(x[i], simd::zero(), bad);
        });
        simd::store_words(to + d, Format::together(x));
      }
    }
    return simd::sum_lanes(bad) == 0.0f;
  });
}

// Writes lane columns back to rows: row of lane l [d] = in[d * ld + l] * lane_scale[l].
inline void unpack_transposed(const Rows& rows, const Problem& p, const Panel& panel, const float* in, int64_t ld,
                              int64_t columns, const float* lane_scale) {
  with_type(rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t first = p.first_query(panel.b);
    for (int v = 0; v < panel.vectors; ++v) {
      const simd::Vec scale = simd::load(lane_scale + v * kLanes);
      for (int64_t d = 0; d < columns; d += kLanes) {
        const int width = static_cast<int>(std::min<int64_t>(columns - d, kLanes));
        simd::Vec block[kLanes];
        for (int j = 0; j < kLanes; ++j)
          block[j] = j < width ? simd::load(in + (d + j) * ld + v * kLanes) * scale : simd::zero();
        simd::transpose(block);
        for (int l = 0; l < kLanes && v * kLanes + l < panel.count; ++l) {
          const int lane = v * kLanes + l;
          T* row = reinterpret_cast<T*>(
              rows.mutable_at(p.varlen ? 0 : panel.b, panel.head[lane], first + panel.query[lane]));
          simd::store_first(row + d, block[l], width);
        }
      }
    }
  });
}

// A run of keys and values of one key head. For products over head_dim or value_dim the words of a row hold
// neighbours in it; for products over the keys they hold kDepth rows, from an even one on.
template <class Format>
struct KeyBlockOf {
  using Word = typename Format::Word;
  int64_t first = 0, count = 0;
  const Word *k = nullptr, *v = nullptr;
  const Word *k_together = nullptr, *v_together = nullptr;
  int64_t ldk = 0, ldv = 0, ldk_together = 0, ldv_together = 0;
  bool k_finite = true, v_finite = true;
  const bool* holes = nullptr;  // from `first` on
};
using KeyBlock = KeyBlockOf<simd::Words32>;

// The rows of a run of keys, read one after another.
template <class T>
class KeyRows {
 public:
  KeyRows(const Problem& p, const Rows& rows, int64_t b, int64_t kv_head, int64_t first, int64_t columns,
          const bool* holes)
      : base_(rows.at(p.varlen ? 0 : b, kv_head, p.first_key(b) + first)),
        step_(rows.row * static_cast<int64_t>(sizeof(T))),
        length_(columns * static_cast<int64_t>(sizeof(T))),
        left_(p.key_count(b) - first),
        holes_(holes) {}

  // Row j, null where it is hidden.
  const T* operator[](int64_t j) const {
    // Rows often lie pages apart, where the processor does not prefetch by itself. Runs ahead into the block that comes
    // next.
    if (j + kPrefetchRows < left_) {
      for (int64_t line = 0; line < length_; line += 64)
        __builtin_prefetch(base_ + (j + kPrefetchRows) * step_ + line, 0, 2);
    }
    return holes_ == nullptr || holes_[j] ? reinterpret_cast<const T*>(base_ + j * step_) : nullptr;
  }

 private:
  // So many rows ahead of what is read.
  static constexpr int64_t kPrefetchRows = 12;
  const char* base_;
  int64_t step_, length_, left_;
  const bool* holes_;
};

// Copies rows [first, first + count) of a key head, element d of kDepth rows in one word; hidden keys become zero rows,
// so that whatever stands there cannot spread. `skip` rows of zeros, fewer than kDepth, come before. True if all is
// finite.
template <class Word>
bool pack_keys_together(Word* out, int64_t ld, const Problem& p, const Rows& rows, int64_t b, int64_t kv_head,
                        int64_t first, int64_t count, int64_t columns, const bool* holes, int64_t skip = 0) {
  using Format = simd::FormatOf<Word>;
  return with_packed_type<Format>(rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    const KeyRows<T> from(p, rows, b, kv_head, first, columns, holes);
    simd::Vec bad = simd::zero();
    for (int64_t j = -skip; j < count; j += Format::kDepth, out += ld) {
      const T* row[Format::kDepth];
      for (int i = 0; i < Format::kDepth; ++i) row[i] = j + i >= 0 && j + i < count ? from[j + i] : nullptr;
      const auto copy = [&](int64_t d, auto&& read) VELM_INLINE_LAMBDA {
        simd::Vec x[Format::kDepth];
        simd::unroll<Format::kDepth>([&](auto i) VELM_INLINE_LAMBDA {
          x[i] = row[i] ? read(row[i] + d) : simd::zero();
          bad = simd::fma(x[i], simd::zero(), bad);
        });
        simd::store_words(out + d, Format::together(x));
      };
      int64_t d = 0;
      for (; d + kLanes <= columns; d += kLanes) copy(d, [](const T* at) VELM_INLINE_LAMBDA { return simd::load(at); });
      if (d < columns) {
        const int width = static_cast<int>(columns - d);
        copy(d, [=](const T* at) VELM_INLINE_LAMBDA { return simd::load_first(at, width); });
      }
    }
    return simd::sum_lanes(bad) == 0.0f;
  });
}

// The same with neighbours of a row in one word, of which there are no zero rows before.
template <class Word>
bool pack_key_rows(Word* out, int64_t ld, const Problem& p, const Rows& rows, int64_t b, int64_t kv_head, int64_t first,
                   int64_t count, int64_t columns, const bool* holes) {
  using Format = simd::FormatOf<Word>;
  if constexpr (Format::kDepth == 1) {
    return pack_keys_together(out, ld, p, rows, b, kv_head, first, count, columns, holes);
  } else {
    constexpr int64_t kStep = kLanes * Format::kDepth;
    return with_packed_type<Format>(rows.dtype, [&](auto tag) {
      using T = decltype(tag);
      const KeyRows<T> from(p, rows, b, kv_head, first, columns, holes);
      simd::Vec bad = simd::zero();
      for (int64_t j = 0; j < count; ++j, out += ld) {
        const T* row = from[j];
        for (int64_t d = 0; d < columns; d += kStep) {
          const int width = static_cast<int>(std::min<int64_t>(columns - d, kStep));
          const auto words = row == nullptr   ? typename Format::Words(0)
                             : width == kStep ? Format::neighbours(row + d)
                                              : Format::neighbours(row + d, width);
          // Both elements of a word times 0, in fp32.
          bad = simd::fma(simd::float_of(words << 16), simd::zero(), bad);
          bad = simd::fma(simd::float_of(words & 0xffff0000u), simd::zero(), bad);
          simd::store_words(out + d / Format::kDepth, words);
        }
      }
      return simd::sum_lanes(bad) == 0.0f;
    });
  }
}

}  // namespace velm::attention
