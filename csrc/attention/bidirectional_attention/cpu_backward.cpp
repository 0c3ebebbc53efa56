// Bidirectional attention on the CPU: backward. One tile of scores and one of their gradients serve both directions.

#include <cmath>
#include <tuple>

#include "attention/bidirectional_attention/cpu.h"

namespace velm::bidirectional {
namespace {

// Floats of tiles of scores and gradients of weights that a worker may keep from one pass over the scores for the next.
constexpr int64_t kKeptTiles = 1 << 20;

// What comes from above for one direction: of the rows over the columns, or of the columns over the rows.
template <class T>
struct Upstream {
  Rows<const T> grad_out, out;
  const float *lse = nullptr, *grad_lse = nullptr;  // (batch, heads, length)
  bool has_grad_out = false;
  int64_t length = 0, dim = 0;

  Upstream(const std::optional<Tensor>& grad_out_, const std::optional<Tensor>& grad_lse_, const Tensor& out_,
           const Tensor& lse_)
      : out(out_),
        lse(const_data<float>(lse_)),
        grad_lse(grad_lse_ ? const_data<float>(*grad_lse_) : nullptr),
        has_grad_out(grad_out_.has_value()),
        length(out_.size(2)),
        dim(out_.size(3)) {
    if (grad_out_) grad_out = Rows<const T>(*grad_out_);
  }
  bool used() const { return has_grad_out || grad_lse; }

  // For queries [first, first + count) that see something: the logsumexp, NaN where that is infinite, since all weights
  // are NaN then, and delta = grad_out . out - grad_lse; without the product where it is added later.
  void pack_sums(float* row_lse, float* delta, int64_t index, int64_t batch, int64_t head, int64_t first, int64_t count,
                 bool with_product) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = index * length + first + i;
      row_lse[i] = std::abs(lse[at]) == kInfinity ? kNaN : lse[at];
      Vec sum = simd::zero();
      if (has_grad_out && with_product) {
        const T* o = out.at(batch, head, first + i);
        const T* g = grad_out.at(batch, head, first + i);
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) sum = simd::fma(simd::load(g + d), simd::load(o + d), sum);
        if (d < dim) {
          const int left = static_cast<int>(dim - d);
          sum = simd::fma(simd::load_first(g + d, left), simd::load_first(o + d, left), sum);
        }
      }
      delta[i] = simd::sum_lanes(sum) - (grad_lse ? grad_lse[at] : 0.0f);
    }
  }
};

// Where gradients go; a null pointer for what nobody wants.
template <class T>
struct Downstream {
  Rows<T> query, value;
};

template <class T>
class Backward {
 public:
  Backward(const Problem<T>& problem, const Upstream<T>& rows_up, const Upstream<T>& columns_up,
           const Downstream<T>& rows_down, const Downstream<T>& columns_down)
      : p_(problem),
        rows_up_(rows_up),
        columns_up_(columns_up),
        rows_down_(rows_down),
        columns_down_(columns_down),
        ld_query_(padded(p_.head_dim)),
        ld_row_value_(padded(p_.rows.value_dim)),
        ld_column_value_(padded(p_.columns.value_dim)),
        tiles_(column_tiles() * ((p_.rows.length + kRows - 1) / kRows)),
        sums_first_(p_.chunks() == 1 && tiles_ * kTileParts * TileWords<T>::kLd * kRows <= kKeptTiles) {}

  void run() {
    const int64_t chunks = p_.chunks(), items = p_.batch * p_.heads * chunks;
    const int64_t query_floats = columns_down_.query.data ? p_.columns.length * ld_query_ : 0;
    const int64_t value_floats = columns_down_.value.data ? p_.columns.length * ld_column_value_ : 0;
    simd::Scratch shared;
    float* sums = shared.take(items * (query_floats + value_floats));
    simd::parallel_workers(
        items, [&] { return Worker(*this); },
        [&](Worker& worker, int64_t item) {
          float* at = sums + item * (query_floats + value_floats);
          std::fill(at, at + query_floats + value_floats, 0.0f);
          worker.set_columns(item / chunks);
          worker.chunk(item % chunks, query_floats ? at : nullptr, value_floats ? at + query_floats : nullptr);
        });
    if (query_floats + value_floats == 0) return;
    constexpr int64_t kBlock = 32;
    const int64_t blocks = (p_.columns.length + kBlock - 1) / kBlock;
    simd::parallel_items(p_.batch * p_.heads * blocks, [&](int64_t i) {
      const int64_t index = i / blocks, first = i % blocks * kBlock;
      float* start = sums + index * chunks * (query_floats + value_floats);
      for (int64_t j = first; j < std::min(first + kBlock, p_.columns.length); ++j) {
        if (query_floats)
          add_chunks(columns_down_.query, index, j, start + j * ld_query_, query_floats + value_floats, chunks,
                     p_.head_dim, p_.scale);
        if (value_floats)
          add_chunks(columns_down_.value, index, j, start + query_floats + j * ld_column_value_,
                     query_floats + value_floats, chunks, p_.columns.value_dim, 1.0f);
      }
    });
  }

 private:
  // Scores, and the gradients of the weights of both directions.
  static constexpr int64_t kTileParts = 3;
  int64_t column_tiles() const { return (p_.columns.length + kColumns - 1) / kColumns; }

  // What a pass over the scores is for.
  enum class Pass { sum, differentiate };

  void add_chunks(const Rows<T>& to, int64_t index, int64_t j, float* first, int64_t step, int64_t chunks, int64_t dim,
                  float factor) const {
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t d = 0; d < dim; d += kLanes)
        simd::store(first + d, simd::load(first + d) + simd::load(first + c * step + d));
    store_row(to.at(index / p_.heads, index % p_.heads, j), first, dim, factor);
  }

  class Worker {
   public:
    explicit Worker(const Backward& backward)
        : k_(backward),
          p_(backward.p_),
          ld_(p_.padded_columns()),
          query_words_(words_of<T>(p_.head_dim)),
          row_words_(words_of<T>(p_.rows.value_dim)),
          column_words_(words_of<T>(p_.columns.value_dim)),
          ld_query_words_(padded(query_words_)),
          ld_row_words_(padded(row_words_)),
          ld_column_words_(padded(column_words_)),
          words_(scratch_) {
      const auto take = [&](int64_t count) { return scratch_.template take<Word>(count); };
      const int64_t columns = words_of<T>(p_.columns.length), rows = words_of<T>(kRows);
      query_columns_ = take(query_words_ * ld_);
      query_rows_ = take(columns * k_.ld_query_);
      value_columns_ = take(column_words_ * ld_);
      grad_columns_ = take(row_words_ * ld_);
      grad_rows_ = take(columns * k_.ld_row_value_);
      visible_ = scratch_.take(ld_);
      lse_ = scratch_.take(ld_);
      delta_ = scratch_.take(ld_);
      queries_ = take(kRows * ld_query_words_);
      values_ = take(kRows * ld_row_words_);
      grads_ = take(kRows * ld_column_words_);
      // One row a word is the same in both orders.
      queries_together_ = kDepth == 1 ? queries_ : take(rows * k_.ld_query_);
      grads_together_ = kDepth == 1 ? grads_ : take(rows * k_.ld_column_value_);
      grad_queries_ = scratch_.take(kRows * k_.ld_query_);
      grad_values_ = scratch_.take(kRows * k_.ld_row_value_);
      inverse_ = scratch_.take(ld_);
      column_sums_ = scratch_.take(ld_);
      std::fill_n(inverse_, ld_, 1.0f);
      std::fill_n(row_inverse_, kRows, 1.0f);
      kept_ = scratch_.take((k_.sums_first_ ? k_.tiles_ : 1) * kTileParts * kRows * kLd);
      if (k_.sums_first_) {
        row_weights_ = scratch_.take(p_.rows.length);
        row_sums_ = scratch_.take(p_.rows.length);
      }
      use_tile(0);
      if (p_.dropout) {
        row_factors_ = scratch_.take(kRows * kLd);
        column_factors_ = scratch_.take(kRows * kLd);
      }
      std::fill_n(scale_, 2 * kLanes, p_.scale);
    }

    void set_columns(int64_t index) {
      if (index == index_) return;
      index_ = index;
      b_ = index / p_.heads;
      h_ = index % p_.heads;
      const auto& columns = p_.columns;
      const bool* mask = columns.mask_of(b_);
      rows_active_ = k_.rows_up_.used() && columns.any_visible(b_);
      columns_active_ = k_.columns_up_.used() && p_.rows.any_visible(b_);
      const bool all_read = columns_active_;
      const auto visible = [=](int64_t j) { return !mask || mask[j]; };
      const auto read = [=](int64_t j) { return all_read || visible(j); };
      pack_transposed(query_columns_, ld_, columns.query, b_, h_, columns.length, p_.head_dim, p_.scale, read);
      query_columns_finite_ =
          pack_together(query_rows_, k_.ld_query_, columns.query, b_, h_, 0, columns.length, p_.head_dim, read);
      pack_transposed(value_columns_, ld_, columns.value, b_, h_, columns.length, columns.value_dim, 1.0f, visible);
      pack_mask(visible_, mask, columns.length);
      std::fill(lse_, lse_ + ld_, kInfinity);
      std::fill(delta_, delta_ + ld_, 0.0f);
      if (!columns_active_) return;
      const auto& up = k_.columns_up_;
      const auto given = [&](int64_t) { return up.has_grad_out; };
      pack_transposed(grad_columns_, ld_, up.grad_out, b_, h_, columns.length, up.dim, 1.0f, given);
      grad_columns_finite_ =
          pack_together(grad_rows_, k_.ld_row_value_, up.grad_out, b_, h_, 0, columns.length, up.dim, given);
      up.pack_sums(lse_, delta_, index, b_, h_, 0, columns.length, !k_.sums_first_);
    }

    // grad_query and grad_value collect the columns' gradients over this chunk of rows.
    void chunk(int64_t number, float* grad_query, float* grad_value) {
      const int64_t stop = std::min((number + 1) * p_.chunk(), p_.rows.length);
      const auto run = [&](Pass pass) {
        for (int64_t first = number * p_.chunk(); first < stop; first += kRows)
          tile_row(pass, first, std::min(kRows, stop - first), grad_query, grad_value);
      };
      if (k_.sums_first_) {
        for (float* sums : {row_weights_, row_sums_}) std::fill_n(sums, p_.rows.length, 0.0f);
        for (float* sums : {inverse_, column_sums_}) std::fill_n(sums, ld_, 0.0f);
        run(Pass::sum);
        for (int64_t j = 0; j < ld_; ++j) finish_sums(inverse_[j], delta_[j], inverse_[j], column_sums_[j]);
      }
      run(Pass::differentiate);
    }

   private:
    using Word = WordFor<T>;
    static constexpr int64_t kLd = TileWords<T>::kLd, kLdOverColumns = TileWords<T>::kLdOverColumns,
                             kDepth = FormatFor<T>::kDepth;

    void use_tile(int64_t tile) {
      scores_ = kept_ + tile * kTileParts * kRows * kLd;
      row_tile_ = scores_ + kRows * kLd;
      column_tile_ = row_tile_ + kRows * kLd;
    }

    // Where delta comes from, the sum of the weights times their gradients: of the very products that it is taken off,
    // and not of out, whose rounding is all that would be left where the attention is nearly one key. Divided by the
    // sum of the weights, as the weights are: the logsumexp was rounded as well. Tiles are kept from the pass that
    // finds the sums for the next one; where they do not fit, out and the logsumexp are taken after all.
    static void finish_sums(float& inverse, float& delta, float weights, float sum) {
      inverse = weights == 0.0f ? 1.0f : 1.0f / weights;
      delta += sum * inverse;
    }

    void tile_row(Pass pass, int64_t first, int64_t count, float* grad_query, float* grad_value) {
      const auto &rows = p_.rows, &columns = p_.columns;
      const bool* mask = rows.mask_of(b_);
      const auto visible = [=](int64_t i) { return !mask || mask[i]; };
      const bool rows_active = rows_active_;
      bool any_row = false;
      for (int64_t i = 0; i < count; ++i) any_row = (row_visible_[i] = visible(first + i)) || any_row;
      const bool over_rows = columns_active_ && any_row;
      const int64_t query_dim = round_up(p_.head_dim, kLanes), row_dim = round_up(rows.value_dim, kLanes),
                    column_dim = round_up(columns.value_dim, kLanes);

      const auto read = [=](int64_t i) { return rows_active || visible(i); };
      bool queries_finite = pack_rows(queries_, ld_query_words_, rows.query, b_, h_, first, count, p_.head_dim, read);
      if (kDepth > 1)
        queries_finite =
            pack_together(queries_together_, k_.ld_query_, rows.query, b_, h_, first, count, p_.head_dim, read);
      bool grads_finite = true;
      if (over_rows) pack_rows(values_, ld_row_words_, rows.value, b_, h_, first, count, rows.value_dim, visible);
      if (rows_active) {
        const auto& up = k_.rows_up_;
        const auto given = [&](int64_t) { return up.has_grad_out; };
        grads_finite = pack_rows(grads_, ld_column_words_, up.grad_out, b_, h_, first, count, up.dim, given);
        if (kDepth > 1)
          grads_finite =
              pack_together(grads_together_, k_.ld_column_value_, up.grad_out, b_, h_, first, count, up.dim, given);
        up.pack_sums(row_lse_, row_delta_, index_, b_, h_, first, count, !k_.sums_first_);
        if (k_.sums_first_ && pass == Pass::differentiate)
          for (int64_t i = 0; i < count; ++i)
            finish_sums(row_inverse_[i], row_delta_[i], row_weights_[first + i], row_sums_[first + i]);
      }
      const bool wants_query = k_.rows_down_.query.data, wants_value = k_.rows_down_.value.data;
      std::fill(grad_queries_, grad_queries_ + count * k_.ld_query_, 0.0f);
      std::fill(grad_values_, grad_values_ + count * k_.ld_row_value_, 0.0f);

      for (int64_t column = 0; column < columns.length; column += kColumns) {
        const int64_t width = std::min(kColumns, columns.length - column), full = round_up(width, kLanes);
        const bool over_columns =
            rows_active && std::any_of(visible_ + column, visible_ + column + width, [](float x) { return x != 0; });
        if (!over_rows && !over_columns) continue;
        if (k_.sums_first_) use_tile(first / kRows * k_.column_tiles() + column / kColumns);
        const bool computes = pass == Pass::sum || !k_.sums_first_;
        if (computes)
          simd::product_columns<false, kScores<T>>(scores_, kLd, count, full, queries_, ld_query_words_, query_words_,
                                                   query_columns_ + column, ld_, scale_);
        if (computes && over_columns)
          simd::product_columns<false, simd::Start::zero>(row_tile_, kLd, count, full, grads_, ld_column_words_,
                                                          column_words_, value_columns_ + column, ld_);
        if (computes && over_rows)
          simd::product_columns<false, simd::Start::zero>(column_tile_, kLd, count, full, values_, ld_row_words_,
                                                          row_words_, grad_columns_ + column, ld_);
        if (p_.dropout) {
          if (over_columns) p_.row_factors(row_factors_, kLd, index_, first, count, column, width);
          if (over_rows) p_.column_factors(column_factors_, kLd, index_, first, count, column, width);
        }
        if (pass == Pass::sum) {
          if (p_.dropout)
            add_sums<true>(first, count, column, full, over_columns, over_rows);
          else
            add_sums<false>(first, count, column, full, over_columns, over_rows);
          continue;
        }
        if (p_.dropout)
          differentiate<true>(count, column, full, over_columns, over_rows);
        else
          differentiate<false>(count, column, full, over_columns, over_rows);

        // Who reads whom: rows the columns that may be attended, columns the rows. Where all that is packed is finite,
        // what is not read has the weight 0 and that is enough.
        const float* seen = visible_ + column;
        const auto row_reads = [&](int64_t, int64_t j) { return over_columns && seen[j] != 0.0f; };
        const auto column_reads = [&](int64_t i, int64_t) { return over_rows && row_visible_[i]; };
        const auto either = [&](int64_t i, int64_t j) { return row_reads(i, j) || column_reads(i, j); };
        const auto turned = [](const auto& reads) { return [&reads](int64_t j, int64_t i) { return reads(i, j); }; };
        if (grad_value && over_columns)
          to_columns(grads_finite, grad_value + column * k_.ld_column_value_, k_.ld_column_value_, width, column_dim,
                     words_.over_rows(row_tile_, count, full), count, grads_together_, turned(row_reads));
        if (grad_query)
          to_columns(queries_finite, grad_query + column * k_.ld_query_, k_.ld_query_, width, query_dim,
                     words_.over_rows(scores_, count, full), count, queries_together_, turned(either));
        if (wants_query)
          to_rows(query_columns_finite_, grad_queries_, k_.ld_query_, count, query_dim,
                  words_.over_columns(scores_, count, full), width, query_rows_ + column / kDepth * k_.ld_query_,
                  either);
        if (wants_value && over_rows)
          to_rows(grad_columns_finite_, grad_values_, k_.ld_row_value_, count, row_dim,
                  words_.over_columns(column_tile_, count, full), width,
                  grad_rows_ + column / kDepth * k_.ld_row_value_, column_reads);
      }
      if (pass == Pass::sum) return;
      for (int64_t i = 0; i < count; ++i) {
        if (wants_query)
          store_row(k_.rows_down_.query.at(b_, h_, first + i), grad_queries_ + i * k_.ld_query_, p_.head_dim, p_.scale);
        if (wants_value)
          store_row(k_.rows_down_.value.at(b_, h_, first + i), grad_values_ + i * k_.ld_row_value_, rows.value_dim,
                    1.0f);
      }
    }

    // Adds to rows of columns, or of rows, what a tile of weights or gradients of scores makes of the others.
    template <class Reads>
    void to_columns(bool finite, float* c, int64_t ld, int64_t width, int64_t dim, const Word* tile, int64_t count,
                    const Word* rows, const Reads& reads) const {
      if (finite)
        simd::product_columns<true, simd::Start::add>(c, ld, width, dim, tile, kLd, words_of<T>(count), rows, ld);
      else
        simd::product_of_some(c, ld, width, dim, tile, 1, kLd, words_of<T>(count), rows, ld, nullptr,
                              [&](int64_t j, int64_t i, int64_t) { return i < count && reads(j, i); });
    }
    template <class Reads>
    void to_rows(bool finite, float* c, int64_t ld, int64_t count, int64_t dim, const Word* tile, int64_t width,
                 const Word* columns, const Reads& reads) const {
      if (finite)
        simd::product_columns<false, simd::Start::add>(c, ld, count, dim, tile, kLdOverColumns, words_of<T>(width),
                                                       columns, ld);
      else
        simd::product_of_some(c, ld, count, dim, tile, kLdOverColumns, 1, words_of<T>(width), columns, ld, nullptr,
                              [&](int64_t i, int64_t j, int64_t) { return j < width && reads(i, j); });
    }

    // What dropout leaves of x; nothing of a NaN that it drops.
    static Vec kept(Vec x, Vec factor) { return simd::select(factor == simd::zero(), simd::zero(), x * factor); }

    // The sums of weights and of weights times their gradients of rows from `first` on, and of columns.
    template <bool Dropout>
    void add_sums(int64_t first, int64_t count, int64_t column, int64_t full, bool over_columns, bool over_rows) {
      const auto add = [](float* to, Vec x) { simd::store(to, simd::load(to) + x); };
      for (int64_t i = 0; i < count; ++i) {
        const Vec lse(over_columns ? row_lse_[i] : 0.0f);
        const bool row = over_rows && row_visible_[i];
        Vec weights = simd::zero(), sum = simd::zero();
        for (int64_t j = 0; j < full; j += kLanes) {
          const int64_t at = i * kLd + j;
          const Vec score = simd::load(scores_ + at);
          if (over_columns) {
            const simd::VecMask seen = simd::load(visible_ + column + j) != simd::zero();
            const Vec weight = simd::exp(score - lse), upstream = simd::load(row_tile_ + at);
            const Vec change = Dropout ? kept(upstream, simd::load(row_factors_ + at)) : upstream;
            weights += simd::select(seen, weight, simd::zero());
            sum += simd::select(seen, weight * change, simd::zero());
          }
          if (row) {
            const Vec weight = simd::exp(score - simd::load(lse_ + column + j));
            const Vec upstream = simd::load(column_tile_ + at);
            add(inverse_ + column + j, weight);
            const Vec change = Dropout ? kept(upstream, simd::load(column_factors_ + at)) : upstream;
            add(column_sums_ + column + j, weight * change);
          }
        }
        if (!over_columns) continue;
        row_weights_[first + i] += simd::sum_lanes(weights);
        row_sums_[first + i] += simd::sum_lanes(sum);
      }
    }

    // From scores and gradients of the weights: row_tile_ and column_tile_ become the weights after dropout, scores_
    // the gradient of the scores, dS = P_rows * (dP_rows - delta_row) + P_columns * (dP_columns - delta_column).
    template <bool Dropout>
    void differentiate(int64_t count, int64_t column, int64_t full, bool over_columns, bool over_rows) {
      for (int64_t i = 0; i < count; ++i) {
        const Vec lse(over_columns ? row_lse_[i] : 0.0f), delta(over_columns ? row_delta_[i] : 0.0f);
        const Vec inverse(row_inverse_[i]);
        const bool row = over_rows && row_visible_[i];
        for (int64_t j = 0; j < full; j += kLanes) {
          const int64_t at = i * kLd + j;
          const Vec score = simd::load(scores_ + at);
          Vec gradient = simd::zero();
          if (over_columns) {
            const simd::VecMask seen = simd::load(visible_ + column + j) != simd::zero();
            const Vec weight = simd::select(seen, simd::exp(score - lse) * inverse, simd::zero());
            const Vec factor = Dropout ? simd::load(row_factors_ + at) : Vec(1.0f);
            const Vec upstream = simd::load(row_tile_ + at);
            const Vec change = weight * ((Dropout ? kept(upstream, factor) : upstream) - delta);
            gradient = simd::select(seen, change, simd::zero());
            simd::store(row_tile_ + at, Dropout ? kept(weight, factor) : weight);
          }
          if (row) {
            const Vec weight = simd::exp(score - simd::load(lse_ + column + j)) * simd::load(inverse_ + column + j);
            const Vec factor = Dropout ? simd::load(column_factors_ + at) : Vec(1.0f);
            const Vec upstream = simd::load(column_tile_ + at);
            gradient = simd::fma(
                weight, (Dropout ? kept(upstream, factor) : upstream) - simd::load(delta_ + column + j), gradient);
            simd::store(column_tile_ + at, Dropout ? kept(weight, factor) : weight);
          } else if (over_rows) {
            simd::store(column_tile_ + at, simd::zero());
          }
          simd::store(scores_ + at, gradient);
        }
      }
    }

    const Backward& k_;
    const Problem<T>& p_;
    const int64_t ld_, query_words_, row_words_, column_words_, ld_query_words_, ld_row_words_, ld_column_words_;
    simd::FlushSubnormals flush_;
    simd::Scratch scratch_;
    const TileWords<T> words_;
    // of all columns
    Word *query_columns_, *query_rows_, *value_columns_, *grad_columns_, *grad_rows_;
    float *visible_, *lse_, *delta_;
    // One over the sum of the weights, which is gathered there first, and the sum of weights times their gradients.
    float *inverse_, *column_sums_;
    // The same of all rows, before they are taken tile by tile.
    float *row_weights_ = nullptr, *row_sums_ = nullptr;
    // of a tile of rows
    Word *queries_, *values_, *grads_, *queries_together_, *grads_together_;
    float *grad_queries_, *grad_values_;
    float row_lse_[kRows], row_delta_[kRows], row_inverse_[kRows];
    bool row_visible_[kRows];
    // of a tile
    float *kept_, *scores_, *row_tile_, *column_tile_, *row_factors_ = nullptr, *column_factors_ = nullptr;
    alignas(64) float scale_[2 * kLanes];
    int64_t index_ = -1, b_ = 0, h_ = 0;
    bool rows_active_ = false, columns_active_ = false;
    bool query_columns_finite_ = true, grad_columns_finite_ = true;
  };

  const Problem<T>& p_;
  const Upstream<T>&rows_up_, &columns_up_;
  const Downstream<T>&rows_down_, &columns_down_;
  const int64_t ld_query_, ld_row_value_, ld_column_value_, tiles_;
  const bool sums_first_;
};

}  // namespace

void backward(std::optional<Tensor> grad_out_a, std::optional<Tensor> grad_out_b,
              std::optional<Tensor> grad_logsumexp_a, std::optional<Tensor> grad_logsumexp_b, Tensor query_a,
              Tensor query_b, Tensor value_a, Tensor value_b, std::optional<Tensor> mask_a,
              std::optional<Tensor> mask_b, std::optional<Tensor> seed, Tensor out_a, Tensor out_b, Tensor logsumexp_a,
              Tensor logsumexp_b, double scale, double dropout_p, std::optional<Tensor> grad_query_a,
              std::optional<Tensor> grad_query_b, std::optional<Tensor> grad_value_a,
              std::optional<Tensor> grad_value_b) {
  with_type(query_a.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Downstream<T> down[2];
    if (grad_query_a) down[0].query = Rows<T>(*grad_query_a);
    if (grad_query_b) down[1].query = Rows<T>(*grad_query_b);
    if (grad_value_a) down[0].value = Rows<T>(*grad_value_a);
    if (grad_value_b) down[1].value = Rows<T>(*grad_value_b);
    const Problem<T> problem(query_a, query_b, value_a, value_b, mask_a, mask_b, seed, scale, dropout_p);
    const Upstream<T> up_a(grad_out_a, grad_logsumexp_a, out_a, logsumexp_a);
    const Upstream<T> up_b(grad_out_b, grad_logsumexp_b, out_b, logsumexp_b);
    if (problem.swapped)
      Backward<T>(problem, up_b, up_a, down[1], down[0]).run();
    else
      Backward<T>(problem, up_a, up_b, down[0], down[1]).run();
  });
}

}  // namespace velm::bidirectional
