// Attention of a few rows over the tokens of a segment, which are keys and values at once: one pass over the tokens
// forward and one backward.

#include <cmath>
#include <cstring>
#include <limits>

#include "pooling/pool_cpu.h"
#include "simd/layout.h"
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

struct BackwardWorker {
  Scratch scratch;
  Tiles tiles;
  // Those of the segment, and behind them the gradients of what was pooled; their products with the tokens.
  float *rows, *products, *delta, *pooled, *grad_tile;
  std::vector<const float*> row;
  std::vector<float*> sums;
  std::vector<float> ones;

  BackwardWorker(const Problem& p, const Tensor& x)
      : tiles(scratch, x, p.tokens, p.dim, p.padded, p.stride),
        rows(scratch.take(2 * p.rows * p.stride)),
        products(scratch.take(2 * p.rows * kTile)),
        delta(scratch.take(p.rows)),
        pooled(scratch.take(p.stride)),
        grad_tile(scratch.take(kTile * p.stride)),
        row(static_cast<size_t>(2 * p.rows)),
        sums(static_cast<size_t>(p.rows)),
        ones(static_cast<size_t>(p.rows), 1.0f) {
    for (int64_t i = 0; i < 2 * p.rows; ++i) row[static_cast<size_t>(i)] = rows + i * p.stride;
  }
};

std::tuple<Tensor, Tensor> attention_pool_backward(Tensor grad, Tensor x, Tensor rows, std::optional<Tensor> lengths,
                                                   std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                                   Tensor out, Tensor logsumexp, int64_t grad_mask) {
  const int64_t segments = segments_of(x, cu_seqlens);
  const Problem p(x, rows, segments, lengths, mask, cu_seqlens);
  const bool wants_x = grad_mask & kGradX, wants_rows = grad_mask & kGradRows;
  const int64_t tokens = p.tokens.tokens;
  Tensor grad_x = !wants_x     ? nothing(x)
                  : cu_seqlens ? in_large_pages(torch::stable::new_empty(x, {tokens, p.dim}))
                               : in_large_pages(torch::stable::new_empty(x, {segments, tokens, p.dim}));
  Tensor grad_rows = wants_rows ? torch::stable::new_empty(rows, {rows.size(0), p.rows, p.dim}) : nothing(rows);
  const Lines from_grad(grad, p.rows * p.dim, p.dim), from_out(out, p.dim, 0);
  const Lines to_x(grad_x, cu_seqlens ? 0 : tokens * p.dim, p.dim);
  const float* lse = const_data<float>(logsumexp);
  const bool in_place = x.scalar_type() == ScalarType::Float && p.dim == p.padded;
  const std::vector<Piece> pieces = pieces_of(p.tokens, kLeastTokens, true);
  const auto count = static_cast<int64_t>(pieces.size());
  Scratch shared;
  const int64_t of_piece = p.rows * p.stride;
  float* partials = wants_rows ? shared.take(of_piece * count) : nullptr;
  parallel_workers(
      count, [&] { return BackwardWorker(p, x); },
      [&](BackwardWorker& w, int64_t index) {
        const FlushSubnormals flush;
        const Piece& piece = pieces[static_cast<size_t>(index)];
        const int64_t s = piece.segment;
        float* of_grad = w.rows + p.rows * p.stride;
        unpack(p.from_rows, s, p.rows, p.dim, p.stride, w.rows);
        unpack(from_grad, s, p.rows, p.dim, p.stride, of_grad);
        float* partial = wants_rows ? partials + of_piece * index : nullptr;
        if (partial) std::fill_n(partial, of_piece, 0.0f);
        for (int64_t i = 0; i < p.rows; ++i) {
          unpack(from_out, s * p.rows + i, 1, p.dim, p.stride, w.pooled);
          const float* a[1] = {of_grad + i * p.stride};
          const float* b[1] = {w.pooled};
          dot_tile<1, 1>(a, b, 0, p.padded, w.delta + i, w.tiles.ahead);
          if (partial) w.sums[static_cast<size_t>(i)] = partial + i * p.stride;
        }
        const auto skip = [&](int64_t n) {
          if (wants_x) std::memset(to_x.at(s, n), 0, static_cast<size_t>(to_x.inner));
        };
        for (int64_t n = piece.begin; w.tiles.next(piece, n, skip);) {
          dots(w.row.data(), 2 * p.rows, w.tiles.row, w.tiles.count, p.padded, w.products, w.tiles.ahead);
          // The scores become their gradients, and the products with the gradients the weights.
          for (int64_t i = 0; i < p.rows; ++i) {
            float* score = w.products + i * kTile;
            float* product = score + p.rows * kTile;
            const float of_row = lse[s * p.rows + i];
            const Vec base(of_row == -kInfinity ? kInfinity : of_row), delta(w.delta[i]);
            for (int t = 0; t < w.tiles.count; t += kLanes) {
              const Vec weight = simd::exp(load(score + t) - base);
              store(score + t, weight * (load(product + t) - delta));
              store(product + t, weight);
            }
          }
          if (partial)
            combine({w.products, kTile, 1}, w.tiles.row, w.tiles.count, w.sums.data(), p.rows, p.padded, w.ones.data(),
                    w.tiles.ahead);
          if (!wants_x) continue;
          float* to[kTile];
          for (int t = 0; t < w.tiles.count; ++t)
            to[t] = in_place ? reinterpret_cast<float*>(to_x.at(s, w.tiles.number[t])) : w.grad_tile + t * p.stride;
          combine({w.products, 1, kTile}, w.row.data(), 2 * p.rows, to, w.tiles.count, p.padded, nullptr,
                  w.tiles.ahead);
          if (!in_place)
            for (int t = 0; t < w.tiles.count; ++t) from_floats(to_x.type, to_x.at(s, w.tiles.number[t]), to[t], p.dim);
        }
      });
  if (!wants_rows) return {grad_x, grad_rows};
  const bool is_shared = rows.size(0) == 1;
  const Lines to(grad_rows, is_shared ? 0 : p.rows * p.dim, p.dim);
  std::vector<int64_t> first(static_cast<size_t>(segments) + 1, count);
  for (size_t i = pieces.size(); i-- > 0;) first[static_cast<size_t>(pieces[i].segment)] = static_cast<int64_t>(i);
  parallel_items(rows.size(0) * p.rows, [&](int64_t item) {
    const int64_t outer = item / p.rows, i = item % p.rows;
    const int64_t begin = is_shared ? 0 : first[static_cast<size_t>(outer)];
    const int64_t end = is_shared ? count : first[static_cast<size_t>(outer) + 1];
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
