// Attention of a few rows over the tokens of a segment, which are keys and values at once: one pass over the tokens
// forward and two backward.

#include <cmath>
#include <cstring>
#include <limits>

#include "pooling/tokens_cpu.h"
#include "simd/layout.h"
#include "simd/math.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm::pooling {
namespace {

using namespace simd;

constexpr int64_t kGradX = 1, kGradRows = 2;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Tokens that are taken together: they stay in the cache between the two products.
constexpr int kTile = 32;
constexpr int64_t kLeastTokens = 64;
// Rows and vectors of a register tile.
constexpr int kRowsOfTile = 4, kVectors = kRegisters == 32 ? 4 : 2;

// Columns of a product that are summed at a time: those of all rows of a register tile stay in the innermost cache.
constexpr int64_t kColumns = 768;

// Memory that will be read soon. The products of a tile leave the way to memory idle, so that they ask for the tokens
// of the next one meanwhile: a line at every step, into the second cache.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const char* begin, const char* end) : at_(begin), end_(end) {}

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
void dot_tile(const float* const* a, const float* const* b, int64_t begin, int64_t end, float* out, Ahead& ahead) {
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
void dots(const float* const* row, int64_t rows, const float* const* token, int tokens, int64_t padded, float* out,
          Ahead& ahead) {
  constexpr int kI = kRowsOfTile, kJ = kVectors;
  for (int64_t begin = 0; begin < padded; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, padded);
    for (int j = 0; j < tokens;) {
      const int wide = j + kJ <= tokens ? kJ : 1;
      int64_t i = 0;
      for (; i + kI <= rows; i += kI) {
        if (wide == kJ)
          dot_tile<kI, kJ>(row + i, token + j, begin, end, out + i * kTile + j, ahead);
        else
          dot_tile<kI, 1>(row + i, token + j, begin, end, out + i * kTile + j, ahead);
      }
      for (; i < rows; ++i) {
        if (wide == kJ)
          dot_tile<1, kJ>(row + i, token + j, begin, end, out + i * kTile + j, ahead);
        else
          dot_tile<1, 1>(row + i, token + j, begin, end, out + i * kTile + j, ahead);
      }
      j += wide;
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
                              float* const* out, int64_t c, const float* scale, Ahead& ahead) {
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

void combine(const Weights& weights, const float* const* row, int64_t rows, float* const* out, int64_t sums,
             int64_t padded, const float* scale, Ahead& ahead) {
  constexpr int64_t kWide = kVectors * kLanes;
  int64_t c = 0;
  for (; c + kWide <= padded; c += kWide) {
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
  Ahead ahead;

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
    ahead = Ahead();
    // Where few tokens count, these would be the wrong ones.
    if (is_dense_ && !live && n < end)
      ahead = Ahead(from_.at(piece.segment, n), from_.at(piece.segment, std::min(n + kTile, end)));
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
void unpack(const Lines& from, int64_t outer, int64_t rows, int64_t dim, int64_t stride, float* to) {
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

int64_t segments_of(const Tensor& x, const std::optional<Tensor>& cu_seqlens) {
  return cu_seqlens ? cu_seqlens->size(0) - 1 : x.size(0);
}

// What some tokens amount to for every row: the largest score, the sum of exponentials, the sum of tokens under them.
struct State {
  float *largest, *sum, *pooled;

  static int64_t floats(const Problem& p) { return p.rows * (2 + p.stride); }
  State(float* memory, const Problem& p) : largest(memory), sum(memory + p.rows), pooled(memory + 2 * p.rows) {}
};

struct ForwardWorker {
  Scratch scratch;
  Tiles tiles;
  float *rows, *scores, *scale, *state;
  std::vector<const float*> row;
  std::vector<float*> sums;

  ForwardWorker(const Problem& p, const Tensor& x)
      : tiles(scratch, x, p.tokens, p.dim, p.padded, p.stride),
        rows(scratch.take(p.rows * p.stride)),
        scores(scratch.take(p.rows * kTile)),
        scale(scratch.take(p.rows)),
        state(scratch.take(State::floats(p))),
        row(static_cast<size_t>(p.rows)),
        sums(static_cast<size_t>(p.rows)) {
    for (int64_t i = 0; i < p.rows; ++i) row[static_cast<size_t>(i)] = rows + i * p.stride;
  }

  void run(const Problem& p, const Piece& piece, const State& s) {
    unpack(p.from_rows, piece.segment, p.rows, p.dim, p.stride, rows);
    std::fill_n(s.largest, p.rows, -kInfinity);
    std::fill_n(s.sum, p.rows, 0.0f);
    std::fill_n(s.pooled, p.rows * p.stride, 0.0f);
    for (int64_t i = 0; i < p.rows; ++i) sums[static_cast<size_t>(i)] = s.pooled + i * p.stride;
    for (int64_t n = piece.begin; tiles.next(piece, n, [](int64_t) {});) {
      dots(row.data(), p.rows, tiles.row, tiles.count, p.padded, scores, tiles.ahead);
      for (int64_t i = 0; i < p.rows; ++i) {
        float* of_row = scores + i * kTile;
        std::fill(of_row + tiles.count, of_row + kTile, -kInfinity);
        Vec most(s.largest[i]);
        for (int t = 0; t < kTile; t += kLanes) most = maximum(load(of_row + t), most);
        const float largest = max_lanes(most);
        // With a score of +inf everything is NaN, and -inf alone weighs nothing.
        const float base = largest == -kInfinity ? 0.0f : largest;
        Vec total = zero();
        for (int t = 0; t < kTile; t += kLanes) {
          const Vec weight = simd::exp(load(of_row + t) - base);
          store(of_row + t, weight);
          total += weight;
        }
        scale[i] = std::exp(s.largest[i] - base);
        s.sum[i] = s.sum[i] * scale[i] + sum_lanes(total);
        s.largest[i] = largest;
      }
      combine({scores, kTile, 1}, tiles.row, tiles.count, sums.data(), p.rows, p.padded, scale, tiles.ahead);
    }
  }
};

void join(const Problem& p, const State& earlier, const State& later) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const float largest = std::max(earlier.largest[i], later.largest[i]);
    const float base = largest == -kInfinity ? 0.0f : largest;
    const float a = std::exp(earlier.largest[i] - base), b = std::exp(later.largest[i] - base);
    earlier.largest[i] = largest;
    earlier.sum[i] = earlier.sum[i] * a + later.sum[i] * b;
    float* to = earlier.pooled + i * p.stride;
    const float* from = later.pooled + i * p.stride;
    for (int64_t c = 0; c < p.padded; c += kLanes) store(to + c, fma(load(to + c), Vec(a), load(from + c) * b));
  }
}

std::tuple<Tensor, Tensor> attention_pool_forward(Tensor x, Tensor rows, std::optional<Tensor> lengths,
                                                  std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens) {
  const int64_t segments = segments_of(x, cu_seqlens);
  const Problem p(x, rows, segments, lengths, mask, cu_seqlens);
  Tensor out = torch::stable::new_empty(x, {segments, p.rows, p.dim});
  Tensor logsumexp = torch::stable::new_empty(x, {segments, p.rows}, ScalarType::Float);
  if (segments == 0 || p.rows == 0) return {out, logsumexp};
  const Lines to(out, p.rows * p.dim, p.dim);
  float* lse = mutable_data<float>(logsumexp);
  const std::vector<Piece> pieces = pieces_of(p.tokens, kLeastTokens, false);
  const auto count = static_cast<int64_t>(pieces.size());
  std::vector<int64_t> first(static_cast<size_t>(segments) + 1, count);
  for (size_t i = pieces.size(); i-- > 0;) first[static_cast<size_t>(pieces[i].segment)] = static_cast<int64_t>(i);
  Scratch shared;
  float* states = count > segments ? shared.take(State::floats(p) * count) : nullptr;

  const auto write = [&](int64_t segment, const State& s) {
    // Where all scores are -inf, softmax divides 0 by 0.
    const float of_nothing = p.tokens.count(segment) > 0 ? kNaN : 0.0f;
    for (int64_t i = 0; i < p.rows; ++i) {
      float* row = s.pooled + i * p.stride;
      const bool none = s.sum[i] == 0.0f;
      const Vec inverse(none ? of_nothing : 1.0f / s.sum[i]);
      for (int64_t c = 0; c < p.padded; c += kLanes) store(row + c, load(row + c) * inverse);
      from_floats(to.type, to.at(segment, i), row, p.dim);
      lse[segment * p.rows + i] = none ? (of_nothing == 0.0f ? -kInfinity : kNaN) : s.largest[i] + std::log(s.sum[i]);
    }
  };
  parallel_workers(
      count, [&] { return ForwardWorker(p, x); },
      [&](ForwardWorker& worker, int64_t i) {
        const FlushSubnormals flush;
        const Piece& piece = pieces[static_cast<size_t>(i)];
        const auto s = static_cast<size_t>(piece.segment);
        const bool alone = first[s + 1] - first[s] == 1;
        const State state(alone ? worker.state : states + State::floats(p) * i, p);
        worker.run(p, piece, state);
        if (alone) write(piece.segment, state);
      });
  if (states == nullptr) return {out, logsumexp};
  parallel_items(segments, [&](int64_t s) {
    const int64_t begin = first[static_cast<size_t>(s)], end = first[static_cast<size_t>(s) + 1];
    if (end - begin == 1) return;
    const State total(states + State::floats(p) * begin, p);
    for (int64_t i = begin + 1; i < end; ++i) join(p, total, State(states + State::floats(p) * i, p));
    write(s, total);
  });
  return {out, logsumexp};
}

// Of every row over some tokens: the largest score, the gradient of the weight of that token (`center`), and with
// weights exp(score - largest) the sum of the weights and that of the weights times their gradients less center. These,
// not the saved logsumexp and out: a logsumexp of 30 was rounded by as much as its last place, by which all weights of
// the row would be off, and where a row is nearly one token, the gradient of its weight and out * grad cancel but for
// less than the rounding of out. Less center, what is left is a sum of what the other tokens have, with all its digits.
struct Sums {
  float *largest, *center, *weights, *weighted;

  static int64_t floats(const Problem& p) { return 4 * p.rows; }
  Sums(float* memory, const Problem& p)
      : largest(memory), center(memory + p.rows), weights(memory + 2 * p.rows), weighted(memory + 3 * p.rows) {}

  void clear(const Problem& p) const {
    std::fill_n(largest, p.rows, -kInfinity);
    std::fill_n(center, 3 * p.rows, 0.0f);
  }
  // Adds those of other tokens, of row i.
  void add(int64_t i, float of_largest, float of_center, float of_weights, float of_weighted) const {
    const float most = std::max(largest[i], of_largest), base = base_of(most);
    const float a = std::exp(largest[i] - base), b = std::exp(of_largest - base);
    const float to = of_largest > largest[i] ? of_center : center[i];
    weighted[i] = (weighted[i] + weights[i] * (center[i] - to)) * a + (of_weighted + of_weights * (of_center - to)) * b;
    weights[i] = weights[i] * a + of_weights * b;
    largest[i] = most;
    center[i] = to;
  }
  // What scores are taken off before the exponential.
  static float base_of(float largest) { return largest == -kInfinity ? 0.0f : largest; }
};

// How backward goes through the tokens: each piece twice, for the sums of the rows and for the gradients. The products
// of rows and tokens are kept from the first time for the second one.
struct BackwardPlan {
  const Problem& p;
  std::vector<Piece> pieces;
  std::vector<int64_t> first;  // piece of every segment, and their number
  std::vector<int64_t> kept;   // floats of kept products before every piece, and of all
  int64_t largest = 0;         // floats of the products of a piece that is a segment

  explicit BackwardPlan(const Problem& p)
      : p(p),
        pieces(pieces_of(p.tokens, kLeastTokens, true)),
        first(static_cast<size_t>(p.tokens.segments) + 1, static_cast<int64_t>(pieces.size())),
        kept{0} {
    for (size_t i = pieces.size(); i-- > 0;) first[static_cast<size_t>(pieces[i].segment)] = static_cast<int64_t>(i);
    for (const Piece& piece : pieces) {
      const int64_t floats = (piece.end - piece.begin + kTile - 1) / kTile * of_tile();
      if (alone(piece)) largest = std::max(largest, floats);
      kept.push_back(kept.back() + (keeps() && !alone(piece) ? floats : 0));
    }
  }
  int64_t count() const { return static_cast<int64_t>(pieces.size()); }
  int64_t of_tile() const { return 2 * p.rows * kTile; }
  bool alone(const Piece& piece) const {
    const auto s = static_cast<size_t>(piece.segment);
    return first[s + 1] - first[s] == 1;
  }
  // A segment of one piece is gone through twice at once, in memory of the worker. Products of longer ones wait until
  // all are known, where they take no more memory than the tokens; else they are computed twice.
  bool keeps() const { return 2 * p.rows <= p.dim; }
};

struct BackwardWorker {
  const BackwardPlan& plan;
  const Problem& p;
  Scratch scratch;
  Tiles tiles;
  // Rows of the segment, and behind them the gradients of what was pooled; the products of both with tokens.
  float *rows, *products, *grad_tile;
  Sums total;
  std::vector<const float*> row;
  std::vector<float*> to_rows;
  std::vector<float> ones;

  BackwardWorker(const BackwardPlan& plan, const Tensor& x)
      : plan(plan),
        p(plan.p),
        tiles(scratch, x, p.tokens, p.dim, p.padded, p.stride),
        rows(scratch.take(2 * p.rows * p.stride)),
        products(scratch.take(std::max(plan.largest, plan.of_tile()))),
        grad_tile(scratch.take(kTile * p.stride)),
        total(scratch.take(Sums::floats(p)), p),
        row(static_cast<size_t>(2 * p.rows)),
        to_rows(static_cast<size_t>(p.rows)),
        ones(static_cast<size_t>(p.rows), 1.0f) {
    for (int64_t i = 0; i < 2 * p.rows; ++i) row[static_cast<size_t>(i)] = rows + i * p.stride;
  }

  void take_rows(int64_t segment, const Lines& from_grad) {
    unpack(p.from_rows, segment, p.rows, p.dim, p.stride, rows);
    unpack(from_grad, segment, p.rows, p.dim, p.stride, rows + p.rows * p.stride);
  }

  // Scores of the tokens of the tile, and products with the gradients; filled up with tokens that weigh nothing.
  void multiply(float* to) {
    dots(row.data(), 2 * p.rows, tiles.row, tiles.count, p.padded, to, tiles.ahead);
    for (int64_t i = 0; i < 2 * p.rows; ++i)
      std::fill(to + i * kTile + tiles.count, to + (i + 1) * kTile, i < p.rows ? -kInfinity : 0.0f);
  }

  // The sums over a piece, whose products go where `kept` is; null: nowhere.
  void sum(const Piece& piece, float* kept, const Sums& sums) {
    sums.clear(p);
    for (int64_t n = piece.begin; tiles.next(piece, n, [](int64_t) {});) {
      float* of_tile = kept ? kept : products;
      if (kept) kept += plan.of_tile();
      multiply(of_tile);
      for (int64_t i = 0; i < p.rows; ++i) {
        const float *score = of_tile + i * kTile, *product = score + p.rows * kTile;
        Vec most(-kInfinity);
        for (int t = 0; t < kTile; t += kLanes) most = maximum(load(score + t), most);
        const float largest = max_lanes(most);
        float center = sums.center[i];
        if (largest > sums.largest[i]) {
          center = product[std::find(score, score + kTile - 1, largest) - score];
          // Of an infinite one nothing can be taken off.
          if (!std::isfinite(center)) center = 0.0f;
        }
        const Vec base(Sums::base_of(largest));
        Vec weights = zero(), weighted = zero();
        for (int t = 0; t < kTile; t += kLanes) {
          const Vec weight = simd::exp(load(score + t) - base);
          weights += weight;
          weighted = fma(weight, load(product + t) - center, weighted);
        }
        sums.add(i, largest, center, sum_lanes(weights), sum_lanes(weighted));
      }
    }
  }

  // The gradients of the tokens of a piece, and its part of that of the rows. Either may not be wanted.
  void differentiate(const Piece& piece, float* kept, const Sums& sums, const Lines* to_x, bool in_place,
                     float* to_grad_rows) {
    const int64_t s = piece.segment;
    if (to_grad_rows) std::fill_n(to_grad_rows, p.rows * p.stride, 0.0f);
    for (int64_t i = 0; to_grad_rows && i < p.rows; ++i) to_rows[static_cast<size_t>(i)] = to_grad_rows + i * p.stride;
    const auto skip = [&](int64_t n) {
      if (to_x) std::memset(to_x->at(s, n), 0, static_cast<size_t>(to_x->inner));
    };
    for (int64_t n = piece.begin; tiles.next(piece, n, skip);) {
      float* of_tile = kept ? kept : products;
      if (kept)
        kept += plan.of_tile();
      else
        multiply(of_tile);
      // The scores become their gradients, and the products with the gradients the weights.
      for (int64_t i = 0; i < p.rows; ++i) {
        float *score = of_tile + i * kTile, *product = score + p.rows * kTile;
        const float inverse_sum = 1.0f / sums.weights[i];
        const Vec base(Sums::base_of(sums.largest[i])), inverse(inverse_sum), delta(sums.weighted[i] * inverse_sum);
        const Vec center(sums.center[i]);
        for (int t = 0; t < kTile; t += kLanes) {
          const Vec weight = simd::exp(load(score + t) - base) * inverse;
          store(score + t, weight * ((load(product + t) - center) - delta));
          store(product + t, weight);
        }
      }
      if (to_grad_rows)
        combine({of_tile, kTile, 1}, tiles.row, tiles.count, to_rows.data(), p.rows, p.padded, ones.data(),
                tiles.ahead);
      if (!to_x) continue;
      float* to[kTile];
      for (int t = 0; t < tiles.count; ++t)
        to[t] = in_place ? reinterpret_cast<float*>(to_x->at(s, tiles.number[t])) : grad_tile + t * p.stride;
      combine({of_tile, 1, kTile}, row.data(), 2 * p.rows, to, tiles.count, p.padded, nullptr, tiles.ahead);
      if (!in_place)
        for (int t = 0; t < tiles.count; ++t) from_floats(to_x->type, to_x->at(s, tiles.number[t]), to[t], p.dim);
    }
  }
};

std::tuple<Tensor, Tensor> attention_pool_backward(Tensor grad, Tensor x, Tensor rows, std::optional<Tensor> lengths,
                                                   std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                                   Tensor /*out*/, Tensor /*logsumexp*/, int64_t grad_mask) {
  const int64_t segments = segments_of(x, cu_seqlens);
  const Problem p(x, rows, segments, lengths, mask, cu_seqlens);
  const bool wants_x = grad_mask & kGradX, wants_rows = grad_mask & kGradRows;
  const int64_t tokens = p.tokens.tokens;
  Tensor grad_x = !wants_x     ? nothing(x)
                  : cu_seqlens ? in_large_pages(torch::stable::new_empty(x, {tokens, p.dim}))
                               : in_large_pages(torch::stable::new_empty(x, {segments, tokens, p.dim}));
  Tensor grad_rows = wants_rows ? torch::stable::new_empty(rows, {rows.size(0), p.rows, p.dim}) : nothing(rows);
  const Lines from_grad(grad, p.rows * p.dim, p.dim);
  const Lines to_x(grad_x, cu_seqlens ? 0 : tokens * p.dim, p.dim);
  const bool in_place = x.scalar_type() == ScalarType::Float && p.dim == p.padded;
  const BackwardPlan plan(p);
  const int64_t count = plan.count(), of_piece = p.rows * p.stride;
  Scratch shared;
  float* partials = wants_rows ? shared.take(of_piece * count) : nullptr;
  const bool several = count > segments;
  float* sums = several ? shared.take(Sums::floats(p) * count) : nullptr;
  float* kept = several && plan.keeps() ? shared.take(plan.kept.back()) : nullptr;
  const auto sums_of = [&](int64_t i) { return Sums(sums + Sums::floats(p) * i, p); };
  const auto kept_of = [&](int64_t i) { return kept ? kept + plan.kept[static_cast<size_t>(i)] : nullptr; };
  const auto differentiate = [&](BackwardWorker& w, int64_t i, float* products, const Sums& of_segment) {
    w.differentiate(plan.pieces[static_cast<size_t>(i)], products, of_segment, wants_x ? &to_x : nullptr, in_place,
                    wants_rows ? partials + of_piece * i : nullptr);
  };
  parallel_workers(
      count, [&] { return BackwardWorker(plan, x); },
      [&](BackwardWorker& w, int64_t i) {
        const FlushSubnormals flush;
        const Piece& piece = plan.pieces[static_cast<size_t>(i)];
        w.take_rows(piece.segment, from_grad);
        if (!plan.alone(piece)) return w.sum(piece, kept_of(i), sums_of(i));
        w.sum(piece, w.products, w.total);
        differentiate(w, i, w.products, w.total);
      });
  if (several) {
    parallel_workers(
        count, [&] { return BackwardWorker(plan, x); },
        [&](BackwardWorker& w, int64_t i) {
          const FlushSubnormals flush;
          const Piece& piece = plan.pieces[static_cast<size_t>(i)];
          if (plan.alone(piece)) return;
          w.take_rows(piece.segment, from_grad);
          w.total.clear(p);
          const auto s = static_cast<size_t>(piece.segment);
          for (int64_t k = plan.first[s]; k < plan.first[s + 1]; ++k) {
            const Sums other = sums_of(k);
            for (int64_t r = 0; r < p.rows; ++r)
              w.total.add(r, other.largest[r], other.center[r], other.weights[r], other.weighted[r]);
          }
          differentiate(w, i, kept_of(i), w.total);
        });
  }
  if (!wants_rows) return {grad_x, grad_rows};
  const bool is_shared = rows.size(0) == 1;
  const Lines to(grad_rows, is_shared ? 0 : p.rows * p.dim, p.dim);
  parallel_items(rows.size(0) * p.rows, [&](int64_t item) {
    const int64_t outer = item / p.rows, i = item % p.rows;
    const int64_t begin = is_shared ? 0 : plan.first[static_cast<size_t>(outer)];
    const int64_t end = is_shared ? count : plan.first[static_cast<size_t>(outer) + 1];
    std::vector<float> total(static_cast<size_t>(p.padded));
    for (int64_t k = begin; k < end; ++k)
      for (int64_t c = 0; c < p.padded; c += kLanes)
        store(total.data() + c, load(total.data() + c) + load(partials + of_piece * k + i * p.stride + c));
    from_floats(to.type, to.at(outer, i), total.data(), p.dim);
  });
  return {grad_x, grad_rows};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&attention_pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&attention_pool_backward));
}

}  // namespace
}  // namespace velm::pooling
