// A panel: up to two vectors' worth of query rows, one row a lane. The rows of all heads that
// share a key head are numbered one after the other, so that panels are full even where each
// head has few queries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention/cpu_problem.h"
#include "simd/product.h"
#include "simd/transpose.h"

namespace velm::attention {

inline constexpr int kLanes = simd::kLanes;
inline constexpr int kPanel = 2 * kLanes;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Row length of packed matrices: whole vectors, and an odd number of cache lines, so that rows
// read side by side fall into different sets of the cache.
inline int64_t padded(int64_t columns) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(float));
  const int64_t lines = round_up(columns, line) / line;
  return (lines | 1) * line;
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

// out[d * ld + lane] = scale * row of the lane [d]; lanes of unused rows, and of rows for which
// keep(lane) is false, are zero. Writes panel.vectors vectors.
template <class Keep>
void pack_transposed(float* out, int64_t ld, const Problem& p, const Panel& panel, const Rows& rows, int64_t columns,
                     float scale, Keep&& keep) {
  with_type(rows.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
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
      for (int64_t d = 0; d < columns; d += kLanes) {
        const int wide = static_cast<int>(std::min<int64_t>(columns - d, kLanes));
        simd::Vec block[kLanes];
        if (wide == kLanes && full[v]) {
          simd::unroll<kLanes>([&](auto l)
                                   VELM_INLINE_LAMBDA { block[l] = simd::load(from[v * kLanes + l] + d) * scale; });
          simd::transpose(block);
          simd::unroll<kLanes>([&](auto j)
                                   VELM_INLINE_LAMBDA { simd::store(out + (d + j) * ld + v * kLanes, block[j]); });
          continue;
        }
        for (int l = 0; l < kLanes; ++l) {
          const T* row = from[v * kLanes + l];
          block[l] = row == nullptr   ? simd::zero()
                     : wide == kLanes ? simd::load(row + d) * scale
                                      : simd::load_first(row + d, wide) * scale;
        }
        simd::transpose(block);
        for (int j = 0; j < wide; ++j) simd::store(out + (d + j) * ld + v * kLanes, block[j]);
      }
    }
  });
}

// out[lane * ld + d] = row of the lane [d], zero up to ld; unused and unwanted rows are zero. True if all is finite.
template <class Keep>
bool pack_panel_rows(float* out, int64_t ld, const Problem& p, const Panel& panel, const Rows& rows, int64_t columns,
                     Keep&& keep) {
  return with_type(rows.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t first = p.first_query(panel.b);
    simd::Vec bad = simd::zero();
    for (int l = 0; l < panel.vectors * kLanes; ++l) {
      float* to = out + l * ld;
      int64_t d = 0;
      if (l < panel.count && keep(l)) {
        const T* row =
            reinterpret_cast<const T*>(rows.at(p.varlen ? 0 : panel.b, panel.head[l], first + panel.query[l]));
        for (; d < columns; d += kLanes) {
          const simd::Vec x = simd::load_first(row + d, static_cast<int>(std::min<int64_t>(columns - d, kLanes)));
          bad = simd::fma(x, simd::zero(), bad);
          simd::store(to + d, x);
        }
      }
      for (; d < ld; d += kLanes) simd::store(to + d, simd::zero());
    }
    return simd::sum_lanes(bad) == 0.0f;
  });
}

// Writes lane columns back to rows: row of lane l [d] = in[d * ld + l] * lane_scale[l].
inline void unpack_transposed(const Rows& rows, const Problem& p, const Panel& panel, const float* in, int64_t ld,
                              int64_t columns, const float* lane_scale) {
  with_type(rows.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t first = p.first_query(panel.b);
    for (int v = 0; v < panel.vectors; ++v) {
      const simd::Vec scale = simd::load(lane_scale + v * kLanes);
      for (int64_t d = 0; d < columns; d += kLanes) {
        const int wide = static_cast<int>(std::min<int64_t>(columns - d, kLanes));
        simd::Vec block[kLanes];
        for (int j = 0; j < kLanes; ++j)
          block[j] = j < wide ? simd::load(in + (d + j) * ld + v * kLanes) * scale : simd::zero();
        simd::transpose(block);
        for (int l = 0; l < kLanes && v * kLanes + l < panel.count; ++l) {
          const int lane = v * kLanes + l;
          T* row = reinterpret_cast<T*>(
              rows.mutable_at(p.varlen ? 0 : panel.b, panel.head[lane], first + panel.query[lane]));
          simd::store_first(row + d, block[l], wide);
        }
      }
    }
  });
}

// A run of keys and values of one key head as fp32 rows.
struct KeyBlock {
  int64_t first = 0, count = 0;
  const float *k = nullptr, *v = nullptr;
  int64_t ldk = 0, ldv = 0;
  bool k_finite = true, v_finite = true;
  const bool* holes = nullptr;  // from `first` on
};

// Copies rows [first + from, first + to) of a key head as fp32; hidden keys become zero rows, so
// that whatever stands there cannot spread. True if all is finite.
inline bool pack_key_rows(float* out, int64_t ld, const Problem& p, const Rows& rows, int64_t b, int64_t kv_head,
                          int64_t first, int64_t count, int64_t columns, const bool* holes) {
  return with_type(rows.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    simd::Vec bad = simd::zero();
    // Rows often lie pages apart, where the processor does not prefetch by itself.
    constexpr int64_t kAhead = 12;
    const int64_t left = p.key_count(b) - first;  // runs ahead into the block that comes next
    const char* base = rows.at(p.varlen ? 0 : b, kv_head, p.first_key(b) + first);
    const int64_t step = rows.row * static_cast<int64_t>(sizeof(T)), length = columns * static_cast<int64_t>(sizeof(T));
    for (int64_t j = 0; j < count; ++j) {
      float* to = out + j * ld;
      int64_t d = 0;
      if (j + kAhead < left) {
        for (int64_t line = 0; line < length; line += 64) __builtin_prefetch(base + (j + kAhead) * step + line, 0, 2);
      }
      if (holes == nullptr || holes[j]) {
        const T* row = reinterpret_cast<const T*>(base + j * step);
        for (; d + kLanes <= columns; d += kLanes) {
          const simd::Vec x = simd::load(row + d);
          bad = simd::fma(x, simd::zero(), bad);
          simd::store(to + d, x);
        }
        if (d < columns) {
          const simd::Vec x = simd::load_first(row + d, static_cast<int>(columns - d));
          bad = simd::fma(x, simd::zero(), bad);
          simd::store(to + d, x);
          d += kLanes;
        }
      }
      for (; d < columns; d += kLanes) simd::store(to + d, simd::zero());
    }
    return simd::sum_lanes(bad) == 0.0f;
  });
}

// C[r][c] += sum over k of A[r, k] * B[k][c], leaving out every term where the weight is 0: the slow way for blocks
// with infinities or NaN that only some rows may see. Weights are A or B.
template <bool WeightsInA>
void product_without_zeros(float* c, int64_t ldc, int64_t rows, int64_t columns, const float* a, int64_t a_row,
                           int64_t a_depth, int64_t depth, const float* b, int64_t ldb) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      const float x = a[r * a_row + k * a_depth];
      if (WeightsInA && x == 0.0f) continue;
      for (int64_t i = 0; i < columns; ++i) {
        const float y = b[k * ldb + i];
        if (WeightsInA || y != 0.0f) c[r * ldc + i] += x * y;
      }
    }
  }
}

}  // namespace velm::attention
