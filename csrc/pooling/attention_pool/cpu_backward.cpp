// attention_pool backward: two passes over the tokens.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/needed.h"
#include "pooling/attention_pool/cpu.h"
#include "simd/parallel.h"

namespace velm::pooling {
namespace {

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

void attention_pool_backward(Tensor grad, Tensor x, Tensor rows, std::optional<Tensor> lengths,
                             std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, Tensor /*out*/,
                             Tensor /*logsumexp*/, std::optional<Tensor> grad_x, std::optional<Tensor> grad_rows) {
  in_large_pages(grad_x);
  const int64_t segments = grad.size(0);
  if (x.dim() == 2) needed(cu_seqlens, "cu_seqlens");
  const Problem p(x, rows, segments, lengths, mask, cu_seqlens);
  const bool wants_x = grad_x.has_value(), wants_rows = grad_rows.has_value();
  const int64_t tokens = p.tokens.tokens;
  const Lines from_grad(grad, p.rows * p.dim, p.dim);
  const Lines to_x = grad_x ? Lines(*grad_x, cu_seqlens ? 0 : tokens * p.dim, p.dim) : Lines();
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
  if (!wants_rows) return;
  const bool is_shared = rows.size(0) == 1;
  const Lines to(*grad_rows, is_shared ? 0 : p.rows * p.dim, p.dim);
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
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "attention_pool_backward", attention_pool_backward);
}

}  // namespace
}  // namespace velm::pooling
