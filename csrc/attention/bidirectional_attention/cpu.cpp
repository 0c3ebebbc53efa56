// Bidirectional attention on the CPU: forward, and the registration of both operators.

#include <cmath>
#include <tuple>

#include "attention/bidirectional_attention/cpu.h"

namespace velm::bidirectional {
namespace {

// Sums over one chunk of rows, for every column: relative to its highest score there.
struct ColumnSums {
  float *highest, *sum, *out;  // out: [column][padded(value_dim of the rows)], not divided by sum
};

template <class T>
class Forward {
 public:
  Forward(const Problem<T>& problem, const Tensor& out_rows, const Tensor& out_columns, float* lse_rows,
          float* lse_columns)
      : p_(problem),
        out_rows_(out_rows),
        out_columns_(out_columns),
        lse_rows_(lse_rows),
        lse_columns_(lse_columns),
        ld_columns_(p_.padded_columns()),
        ld_row_value_(padded(p_.rows.value_dim)) {}

  void run() {
    const int64_t chunks = p_.chunks(), items = p_.batch * p_.heads * chunks;
    const int64_t floats_an_item = ld_columns_ * (2 + ld_row_value_);
    simd::Scratch shared;
    float* all_sums = shared.take(items * floats_an_item);
    const auto sums_of = [&](int64_t item) {
      float* at = all_sums + item * floats_an_item;
      return ColumnSums{at, at + ld_columns_, at + 2 * ld_columns_};
    };
    simd::parallel_workers(
        items, [&] { return Worker(*this); },
        [&](Worker& worker, int64_t item) {
          worker.set_columns(item / chunks);
          worker.chunk(item % chunks, sums_of(item));
        });
    // Blocks of columns, so that a single head keeps several threads busy too.
    constexpr int64_t kBlock = 32;
    const int64_t blocks = (p_.columns.length + kBlock - 1) / kBlock;
    simd::parallel_items(p_.batch * p_.heads * blocks, [&](int64_t i) {
      const int64_t index = i / blocks, first = i % blocks * kBlock;
      std::vector<ColumnSums> parts;
      for (int64_t c = 0; c < chunks; ++c) parts.push_back(sums_of(index * chunks + c));
      for (int64_t j = first; j < std::min(first + kBlock, p_.columns.length); ++j) finish_column(index, j, parts);
    });
  }

 private:
  class Worker {
   public:
    explicit Worker(const Forward& forward)
        : f_(forward),
          p_(forward.p_),
          query_words_(words_of<T>(p_.head_dim)),
          ld_query_(padded(query_words_)),
          ld_column_value_(padded(p_.columns.value_dim)),
          words_(scratch_) {
      column_queries_ = scratch_.template take<Word>(query_words_ * f_.ld_columns_);
      column_values_ = scratch_.template take<Word>(words_of<T>(p_.columns.length) * ld_column_value_);
      column_visible_ = scratch_.take(f_.ld_columns_);
      queries_ = scratch_.template take<Word>(kRows * ld_query_);
      values_ = scratch_.template take<Word>(words_of<T>(kRows) * f_.ld_row_value_);
      out_ = scratch_.take(kRows * ld_column_value_);
      scores_ = scratch_.take(kRows * kLd);
      weights_ = scratch_.take(kRows * kLd);
      if (p_.dropout) factors_ = scratch_.take(kRows * kLd);
      std::fill_n(scale_, 2 * kLanes, p_.scale);
    }

    void set_columns(int64_t index) {
      if (index == index_) return;
      index_ = index;
      b_ = index / p_.heads;
      h_ = index % p_.heads;
      const auto& columns = p_.columns;
      const bool* mask = columns.mask_of(b_);
      pack_transposed(column_queries_, f_.ld_columns_, columns.query, b_, h_, columns.length, p_.head_dim, p_.scale,
                      [](int64_t) { return true; });
      pack_together(column_values_, ld_column_value_, columns.value, b_, h_, 0, columns.length, columns.value_dim,
                    [=](int64_t j) { return !mask || mask[j]; });
      pack_mask(column_visible_, mask, columns.length);
    }

    void chunk(int64_t number, const ColumnSums& sums) {
      std::fill(sums.highest, sums.highest + f_.ld_columns_, -kInfinity);
      std::fill(sums.sum, sums.sum + f_.ld_columns_, 0.0f);
      std::fill(sums.out, sums.out + p_.columns.length * f_.ld_row_value_, 0.0f);
      const int64_t stop = std::min((number + 1) * p_.chunk(), p_.rows.length);
      for (int64_t first = number * p_.chunk(); first < stop; first += kRows)
        tile_row(first, std::min(kRows, stop - first), sums);
    }

   private:
    using Word = WordFor<T>;
    static constexpr int64_t kLd = TileWords<T>::kLd, kLdOverColumns = TileWords<T>::kLdOverColumns,
                             kDepth = FormatFor<T>::kDepth;

    void tile_row(int64_t first, int64_t count, const ColumnSums& sums) {
      const bool* mask = p_.rows.mask_of(b_);
      const auto visible = [=](int64_t i) { return !mask || mask[i]; };
      bool any_row = false;
      for (int64_t i = 0; i < count; ++i) any_row = (row_visible_[i] = visible(first + i)) || any_row;
      pack_rows(queries_, ld_query_, p_.rows.query, b_, h_, first, count, p_.head_dim, [](int64_t) { return true; });
      if (any_row)
        pack_together(values_, f_.ld_row_value_, p_.rows.value, b_, h_, first, count, p_.rows.value_dim, visible);
      std::fill(out_, out_ + count * ld_column_value_, 0.0f);
      std::fill(highest_, highest_ + count, -kInfinity);
      std::fill(sum_, sum_ + count, 0.0f);

      for (int64_t column = 0; column < p_.columns.length; column += kColumns) {
        const int64_t width = std::min(kColumns, p_.columns.length - column), full = round_up(width, kLanes);
        const float* seen = column_visible_ + column;
        const int64_t seen_count = std::count(seen, seen + width, 1.0f);
        if (!any_row && seen_count == 0) continue;
        simd::product_columns<false, kScores<T>>(scores_, kLd, count, full, queries_, ld_query_, query_words_,
                                                 column_queries_ + column, f_.ld_columns_, scale_);
        if (any_row) {
          columns_over_rows(column, full, count, sums);
          if (p_.dropout) {
            p_.column_factors(factors_, kLd, index_, first, count, column, width);
            multiply(weights_, count, full);
          }
          simd::product_columns<true, simd::Start::add>(
              sums.out + column * f_.ld_row_value_, f_.ld_row_value_, width, round_up(p_.rows.value_dim, kLanes),
              words_.over_rows(weights_, count, full), kLd, words_of<T>(count), values_, f_.ld_row_value_);
        }
        if (seen_count > 0) {
          if (seen_count == full)
            rows_over_columns<false>(seen, full, count);
          else
            rows_over_columns<true>(seen, full, count);
          if (p_.dropout) {
            p_.row_factors(factors_, kLd, index_, first, count, column, width);
            multiply(scores_, count, full);
          }
          simd::product_columns<false, simd::Start::add>(
              out_, ld_column_value_, count, round_up(p_.columns.value_dim, kLanes),
              words_.over_columns(scores_, count, full), kLdOverColumns, words_of<T>(width),
              column_values_ + column / kDepth * ld_column_value_, ld_column_value_);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const bool empty = sum_[i] == 0.0f;
        // Where all that is seen has the score -inf, softmax divides 0 by 0.
        store_row(f_.out_rows_.at(b_, h_, first + i), out_ + i * ld_column_value_, p_.columns.value_dim,
                  !empty                       ? 1.0f / sum_[i]
                  : p_.columns.any_visible(b_) ? kNaN
                                               : 0.0f);
        f_.lse_rows_[index_ * p_.rows.length + first + i] = empty ? -kInfinity : highest_[i] + std::log(sum_[i]);
      }
    }

    // Weights of the columns over these rows, relative to the highest score that the chunk has had so far; what was
    // gathered before is scaled to a higher one.
    void columns_over_rows(int64_t column, int64_t full, int64_t count, const ColumnSums& sums) {
      for (int64_t j = 0; j < full; j += kLanes) {
        const Vec before = simd::load(sums.highest + column + j);
        Vec highest = before;
        for (int64_t i = 0; i < count; ++i)
          if (row_visible_[i]) highest = simd::maximum(simd::load(scores_ + i * kLd + j), highest);
        const Vec base = simd::base_of(highest);
        Vec sum = simd::zero();
        for (int64_t i = 0; i < count; ++i) {
          Vec weight = simd::zero();
          if (row_visible_[i]) {
            weight = simd::exp(simd::load(scores_ + i * kLd + j) - base);
            sum += weight;
          }
          simd::store(weights_ + i * kLd + j, weight);
        }
        const Vec shrink = simd::exp(before - base);
        simd::store(sums.sum + column + j, simd::fma(simd::load(sums.sum + column + j), shrink, sum));
        simd::store(sums.highest + column + j, highest);
        // Nothing was gathered yet where `before` is -inf.
        if (simd::stdx::any_of(highest > before && before > Vec(-kInfinity))) {
          float factor[kLanes];
          simd::store(factor, shrink);
          for (int64_t k = 0; k < std::min<int64_t>(kLanes, p_.columns.length - column - j); ++k) {
            if (factor[k] == 1.0f) continue;
            float* row = sums.out + (column + j + k) * f_.ld_row_value_;
            for (int64_t d = 0; d < p_.rows.value_dim; d += kLanes)
              simd::store(row + d, simd::load(row + d) * factor[k]);
          }
        }
      }
    }

    // Replaces the scores by the weights of the rows over these columns, in the same way.
    template <bool Masked>
    void rows_over_columns(const float* seen, int64_t full, int64_t count) {
      const auto score = [&](const float* row, int64_t j) VELM_INLINE_LAMBDA {
        const Vec x = simd::load(row + j);
        return Masked ? simd::select(simd::load(seen + j) != simd::zero(), x, Vec(-kInfinity)) : x;
      };
      for (int64_t i = 0; i < count; ++i) {
        float* row = scores_ + i * kLd;
        Vec top(-kInfinity);
        for (int64_t j = 0; j < full; j += kLanes) top = simd::maximum(score(row, j), top);
        const float before = highest_[i], highest = std::max(before, simd::max_lanes(top));
        const Vec base(simd::base_of(highest));
        Vec sum = simd::zero();
        for (int64_t j = 0; j < full; j += kLanes) {
          const Vec weight = simd::exp(score(row, j) - base);
          sum += weight;
          simd::store(row + j, weight);
        }
        highest_[i] = highest;
        if (highest > before && before > -kInfinity) {
          const float shrink = std::exp(before - simd::base_of(highest));
          sum_[i] *= shrink;
          float* out = out_ + i * ld_column_value_;
          for (int64_t d = 0; d < p_.columns.value_dim; d += kLanes) simd::store(out + d, simd::load(out + d) * shrink);
        }
        sum_[i] += simd::sum_lanes(sum);
      }
    }

    void multiply(float* weights, int64_t count, int64_t full) const {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = i * kLd; j < i * kLd + full; j += kLanes) {
          const Vec weight = simd::load(weights + j), factor = simd::load(factors_ + j);
          simd::store(weights + j, simd::select(factor == simd::zero(), simd::zero(), weight * factor));
        }
    }

    const Forward& f_;
    const Problem<T>& p_;
    const int64_t query_words_, ld_query_, ld_column_value_;
    simd::FlushSubnormals flush_;
    simd::Scratch scratch_;
    const TileWords<T> words_;
    Word *column_queries_, *column_values_, *queries_, *values_;
    float *column_visible_, *out_, *scores_, *weights_, *factors_ = nullptr;
    alignas(64) float scale_[2 * kLanes];
    float highest_[kRows], sum_[kRows];
    bool row_visible_[kRows];
    int64_t index_ = -1, b_ = 0, h_ = 0;
  };

  void finish_column(int64_t index, int64_t j, const std::vector<ColumnSums>& parts) const {
    float highest = -kInfinity;
    for (const ColumnSums& part : parts) highest = std::max(highest, part.highest[j]);
    const float base = simd::base_of(highest);
    float sum = 0.0f;
    for (const ColumnSums& part : parts) sum += part.sum[j] * std::exp(part.highest[j] - base);
    const bool empty = sum == 0.0f;
    float* total = parts[0].out + j * ld_row_value_;
    for (size_t c = 0; c < parts.size(); ++c) {
      const float factor = std::exp(parts[c].highest[j] - base);
      const float* part = parts[c].out + j * ld_row_value_;
      for (int64_t d = 0; d < p_.rows.value_dim; d += kLanes) {
        const Vec x = simd::load(part + d) * factor;
        simd::store(total + d, c == 0 ? x : simd::load(total + d) + x);
      }
    }
    store_row(out_columns_.at(index / p_.heads, index % p_.heads, j), total, p_.rows.value_dim,
              !empty                                  ? 1.0f / sum
              : p_.rows.any_visible(index / p_.heads) ? kNaN
                                                      : 0.0f);
    lse_columns_[index * p_.columns.length + j] = empty ? -kInfinity : highest + std::log(sum);
  }

  const Problem<T>& p_;
  const Rows<T> out_rows_, out_columns_;
  float *lse_rows_, *lse_columns_;
  const int64_t ld_columns_, ld_row_value_;
};

}  // namespace

void forward(Tensor query_a, Tensor query_b, Tensor value_a, Tensor value_b, std::optional<Tensor> mask_a,
             std::optional<Tensor> mask_b, std::optional<Tensor> seed, double scale, double dropout_p, Tensor out_a,
             Tensor out_b, Tensor lse_a, Tensor lse_b) {
  with_type(query_a.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Problem<T> problem(query_a, query_b, value_a, value_b, mask_a, mask_b, seed, scale, dropout_p);
    const bool s = problem.swapped;
    float *rows_lse = mutable_data<float>(s ? lse_b : lse_a), *columns_lse = mutable_data<float>(s ? lse_a : lse_b);
    Forward<T>(problem, s ? out_b : out_a, s ? out_a : out_b, rows_lse, columns_lse).run();
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "bidirectional_attention_forward", forward);
  VELM_KERNEL(m, "bidirectional_attention_backward", backward);
}

}  // namespace velm::bidirectional
