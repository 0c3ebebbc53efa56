// The passes over one tile of scores between torch's products: the statistics of its rows and columns, and the gradient
// of the scores in their place.
//
// A tile is (images, texts), contiguous, float32 or bfloat16, of products x; its scores are z = scale * x + bias. Image
// i of the tile and text i + diagonal are a pair, unless there are labels or targets.

#include <algorithm>

#include "losses/cpu_tiles.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm {
namespace {

using namespace simd;
using Optional = std::optional<Tensor>;

// Rows of a task. What a task computes of its columns is joined in the order of the tasks.
constexpr int64_t kRows = 32;
// Rows that go through the columns together.
constexpr int kTogether = 4;
// Exponentials of a row and of a column are the same but for a factor as long as what is taken off them is no further
// apart than this: beyond, what rounding the difference loses is more than what rounding the score did.
constexpr float kApart = 32.0f;

// How the targets of a row are told.
enum class Targets { pair, labels, given };

struct Tile {
  int64_t rows, columns, diagonal;
  float scale, bias;
  const uint32_t *row_labels = nullptr, *column_labels = nullptr;
  const float *row_targets = nullptr, *column_targets = nullptr;  // (rows, columns) both
  Targets targets = Targets::pair;

  Tile(const Tensor& tile, const Tensor& scale, const Optional& bias, int64_t diagonal, const Optional& row_labels,
       const Optional& column_labels, const Optional& row_targets, const Optional& column_targets)
      : rows(tile.size(0)),
        columns(tile.size(1)),
        diagonal(diagonal),
        scale(*const_data<float>(scale)),
        bias(bias ? *const_data<float>(*bias) : 0.0f) {
    if (row_labels) {
      targets = Targets::labels;
      this->row_labels = const_data<uint32_t>(*row_labels);
      this->column_labels = const_data<uint32_t>(*column_labels);
    } else if (row_targets) {
      targets = Targets::given;
      this->row_targets = const_data<float>(*row_targets);
      this->column_targets = const_data<float>(*column_targets);
    }
  }
  int64_t padded() const { return (columns + kLanes - 1) / kLanes * kLanes; }
  // The column of the pair of a row, if it is in this tile.
  bool has_pair(int64_t row) const {
    return targets == Targets::pair && row + diagonal >= 0 && row + diagonal < columns;
  }
  template <class F>
  void with_targets(const F& f) const {
    if (targets == Targets::pair) f(std::integral_constant<Targets, Targets::pair>{});
    if (targets == Targets::labels) f(std::integral_constant<Targets, Targets::labels>{});
    if (targets == Targets::given) f(std::integral_constant<Targets, Targets::given>{});
  }
};

// What is known of columns, or of one task's part of them: vectors of them are read and written whole.
struct Sums {
  float *base, *sum, *positive;
  explicit Sums(float* at, int64_t padded) : base(at), sum(at + padded), positive(at + 2 * padded) {}
};

// (base, sum) of the exponentials seen so far and of some more.
VELM_INLINE void join(Vec& base, Vec& sum, Vec more_base, Vec more_sum) {
  const Vec highest = maximum(base, more_base), taken = base_of(highest);
  sum = sum * exp(base - taken) + more_sum * exp(more_base - taken);
  base = highest;
}

// Rows [first, last) of a tile.
template <class T, Targets Kind>
void statistics_of(const Tile& t, T* tile, int64_t first, int64_t last, float* row_sums, int64_t row_stride,
                   const Sums& of) {
  const int64_t columns = t.columns, padded = t.padded();
  const Vec bias(t.bias);
  // A pair is left out of the sums: 1 minus its softmax is then exact.
  const float factor = usable_scale(t.scale);
  const Vec scale(Kind == Targets::pair ? factor : t.scale);
  float* row_positive = row_sums + 2 * row_stride;
  for (int64_t j = 0; j < padded; j += kLanes) {
    store(of.base + j, Vec(-kInfinity));
    store(of.sum + j, zero());
    store(of.positive + j, zero());
  }
  if constexpr (Kind == Targets::pair) {
    for (int64_t i = first; i < last; ++i) {
      if (!t.has_pair(i)) continue;
      T* own = tile + i * columns + i + t.diagonal;
      row_positive[i] = of.positive[i + t.diagonal] = t.scale * to_float(*own) + t.bias;
      store_scalar(own, never(factor));
    }
  }
  float row_base[kRows], lowest = kInfinity, highest = -kInfinity;
  const auto in_groups = [&](const auto& run) VELM_INLINE_LAMBDA {
    int64_t i = first;
    for (; i + kTogether <= last; i += kTogether) run(i, std::integral_constant<int, kTogether>{});
    for (; i < last; ++i) run(i, std::integral_constant<int, 1>{});
  };
  in_groups([&](int64_t i, auto count) VELM_INLINE_LAMBDA {
    Vec most[count.value];
    unroll<count.value>([&](auto r) VELM_INLINE_LAMBDA { most[r] = Vec(-kInfinity); });
    for_columns(columns, [&](int64_t j, auto n) VELM_INLINE_LAMBDA {
      Vec of_column = load(of.base + j);
      unroll<count.value>([&](auto r) VELM_INLINE_LAMBDA {
        const Vec z = scores(tile + (i + r) * columns + j, scale, bias, n);
        most[r] = maximum(z, most[r]);
        of_column = maximum(z, of_column);
      });
      store(of.base + j, of_column);
    });
    unroll<count.value>([&](auto r) VELM_INLINE_LAMBDA {
      const float found = max_lanes(most[r]);
      row_base[i + r - first] = found;
      lowest = std::min(lowest, found);
      highest = std::max(highest, found);
    });
  });
  Vec least(kInfinity);
  for_columns(columns, [&](int64_t j, auto n) VELM_INLINE_LAMBDA {
    const Vec base = load(of.base + j);
    if constexpr (std::is_same_v<decltype(n), int>)
      least = stdx::min(least, select(first_lanes(n), base, Vec(kInfinity)));
    else
      least = stdx::min(least, base);
  });
  lowest = std::min(lowest, stdx::hmin(least));
  const bool one_base = highest - lowest <= kApart;
  if (one_base) {
    std::fill(row_base, row_base + (last - first), highest);
    std::fill(of.base, of.base + padded, highest);
  }
  const auto sum_up = [&](auto together) VELM_INLINE_LAMBDA {
    in_groups([&](int64_t i, auto count) VELM_INLINE_LAMBDA {
      Vec base[count.value], sum[count.value], positive[count.value];
      unroll<count.value>([&](auto r) VELM_INLINE_LAMBDA {
        base[r] = Vec(base_of(row_base[i + r - first]));
        sum[r] = positive[r] = zero();
      });
      for_columns(columns, [&](int64_t j, auto n) VELM_INLINE_LAMBDA {
        Vec of_sum = load(of.sum + j), of_positive = load(of.positive + j);
        const Vec of_base = together.value ? base[0] : base_of(load(of.base + j));
        unroll<count.value>([&](auto r) VELM_INLINE_LAMBDA {
          const Vec z = scores(tile + (i + r) * columns + j, scale, bias, n);
          const Vec e = exp(z - base[r]);
          sum[r] += e;
          of_sum += together.value ? e : exp(z - of_base);
          if constexpr (Kind == Targets::labels) {
            const Vec own = select(same_label(t.column_labels + j, t.row_labels[i + r], columns - j), z, zero());
            positive[r] += own;
            of_positive += own;
          } else if constexpr (Kind == Targets::given) {
            const int64_t at = (i + r) * columns + j;
            // Behind the last column there is no score.
            Vec known = z;
            if constexpr (std::is_same_v<decltype(n), int>) known = select(first_lanes(n), z, zero());
            positive[r] = fma(load_some(t.row_targets + at, n), known, positive[r]);
            of_positive = fma(load_some(t.column_targets + at, n), known, of_positive);
          }
        });
        store(of.sum + j, of_sum);
        if constexpr (Kind != Targets::pair) store(of.positive + j, of_positive);
      });
      unroll<count.value>([&](auto r) VELM_INLINE_LAMBDA {
        float *to_base = row_sums + i + r, *to_sum = to_base + row_stride;
        Vec known_base(*to_base), known_sum(*to_sum);
        join(known_base, known_sum, Vec(row_base[i + r - first]), Vec(sum_lanes(sum[r])));
        *to_base = known_base[0];
        *to_sum = known_sum[0];
        if constexpr (Kind != Targets::pair) row_positive[i + r] += sum_lanes(positive[r]);
      });
    });
  };
  if (one_base)
    sum_up(std::true_type{});
  else
    sum_up(std::false_type{});
}

template <class T>
void statistics(const Tile& t, T* tile, const Tensor& row_sums, const Tensor& column_sums) {
  const int64_t tasks = (t.rows + kRows - 1) / kRows, padded = t.padded();
  Scratch memory;
  float* parts = memory.take(tasks * 3 * padded);
  float* of_rows = mutable_data<float>(row_sums);
  parallel_items(tasks, [&](int64_t task) {
    const FlushSubnormals quick;
    t.with_targets([&](auto kind) {
      statistics_of<T, kind.value>(t, tile, task * kRows, std::min(t.rows, (task + 1) * kRows), of_rows,
                                   row_sums.stride(0), Sums(parts + task * 3 * padded, padded));
    });
  });
  float* of_columns = mutable_data<float>(column_sums);
  const int64_t stride = column_sums.stride(0);
  parallel_ranges(padded / kLanes, 64, [&](int64_t begin, int64_t end) {
    const FlushSubnormals quick;
    for_columns(std::min(t.columns, end * kLanes) - begin * kLanes, [&](int64_t at, auto n) {
      const int64_t j = begin * kLanes + at;
      Vec base = load_some(of_columns + j, n), sum = load_some(of_columns + stride + j, n);
      Vec positive = load_some(of_columns + 2 * stride + j, n);
      for (int64_t task = 0; task < tasks; ++task) {
        const Sums part(parts + task * 3 * padded, padded);
        join(base, sum, load(part.base + j), load(part.sum + j));
        positive += load(part.positive + j);
      }
      store_some(of_columns + j, base, n);
      store_some(of_columns + stride + j, sum, n);
      store_some(of_columns + 2 * stride + j, positive, n);
    });
  });
}

// Row and column factors, (4, rows) and (4, columns): what is taken off scores before their exponentials, the factor of
// these, what is taken off every gradient, and what of those of targets.
struct Factors {
  const float *base, *weight, *everywhere, *target;
  explicit Factors(const Tensor& t)
      : base(const_data<float>(t)),
        weight(base + t.stride(0)),
        everywhere(base + 2 * t.stride(0)),
        target(base + 3 * t.stride(0)) {}
};

template <class T, Targets Kind, bool kTogetherBase>
void gradients_of(const Tile& t, T* tile, int64_t first, int64_t last, const Factors& row, const Factors& column,
                  float base, const float* column_weight) {
  const int64_t columns = t.columns;
  const Vec scale(t.scale), bias(t.bias);
  for (int64_t i = first; i < last; ++i) {
    const Vec taken(kTogetherBase ? base : row.base[i]);
    const Vec weight = kTogetherBase ? Vec(row.weight[i]) * exp(Vec(base - row.base[i])) : Vec(row.weight[i]);
    const Vec everywhere(row.everywhere[i]), target(row.target[i]);
    T* at = tile + i * columns;
    for_columns(columns, [&](int64_t j, auto n) VELM_INLINE_LAMBDA {
      const Vec z = fma(scale, load_some(at + j, n), bias);
      Vec g = zero();
      if constexpr (kTogetherBase) {
        g = exp(z - taken) * (weight + load_some(column_weight + j, n));
      } else {
        g = exp(z - taken) * weight + exp(z - load_some(column.base + j, n)) * load_some(column.weight + j, n);
      }
      g -= everywhere + load_some(column.everywhere + j, n);
      if constexpr (Kind == Targets::labels) {
        const Vec both = target + load_some(column.target + j, n);
        g -= select(same_label(t.column_labels + j, t.row_labels[i], columns - j), both, zero());
      } else if constexpr (Kind == Targets::given) {
        g -= target * load_some(t.row_targets + i * columns + j, n);
        g -= load_some(column.target + j, n) * load_some(t.column_targets + i * columns + j, n);
      }
      store_some(at + j, g, n);
    });
    if (t.has_pair(i)) store_scalar(at + i + t.diagonal, row.target[i] + column.target[i + t.diagonal]);
  }
}

template <class T>
void gradients(const Tile& t, T* tile, const Tensor& row_factors, const Tensor& column_factors) {
  const Factors row(row_factors), column(column_factors);
  float highest = -kInfinity, lowest = kInfinity;
  bool finite = true;
  const auto look = [&](const float* base, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      highest = std::max(highest, base[i]);
      lowest = std::min(lowest, base[i]);
      finite = finite && base[i] == base[i];
    }
  };
  look(row.base, t.rows);
  look(column.base, t.columns);
  const bool one_base = finite && highest - lowest <= kApart;
  Scratch memory;
  float* weight = memory.take(t.padded());
  if (one_base) {
    for_columns(t.columns, [&](int64_t j, auto n) {
      store(weight + j, load_some(column.weight + j, n) * exp(Vec(highest) - load_some(column.base + j, n)));
    });
  }
  parallel_ranges(t.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, t.columns)),
                  [&](int64_t begin, int64_t end) {
                    const FlushSubnormals quick;
                    t.with_targets([&](auto kind) {
                      if (one_base)
                        gradients_of<T, kind.value, true>(t, tile, begin, end, row, column, highest, weight);
                      else
                        gradients_of<T, kind.value, false>(t, tile, begin, end, row, column, 0.0f, nullptr);
                    });
                  });
}

void contrastive_statistics(Tensor tile, Tensor scale, Optional bias, int64_t diagonal, Optional row_labels,
                            Optional column_labels, Optional row_targets, Optional column_targets, Tensor row_sums,
                            Tensor column_sums) {
  const Tile t(tile, scale, bias, diagonal, row_labels, column_labels, row_targets, column_targets);
  with_tile(tile, [&](auto* data) { statistics(t, data, row_sums, column_sums); });
}

void contrastive_gradients(Tensor tile, Tensor scale, Optional bias, int64_t diagonal, Optional row_labels,
                           Optional column_labels, Optional row_targets, Optional column_targets, Tensor row_factors,
                           Tensor column_factors) {
  const Tile t(tile, scale, bias, diagonal, row_labels, column_labels, row_targets, column_targets);
  with_tile(tile, [&](auto* data) { gradients(t, data, row_factors, column_factors); });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "contrastive_statistics", contrastive_statistics);
  VELM_KERNEL(m, "contrastive_gradients", contrastive_gradients);
}

}  // namespace
}  // namespace velm
