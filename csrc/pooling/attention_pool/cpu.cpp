// Attention of a few rows over the tokens of a segment, which are keys and values at once: one pass over the tokens.

#include <cmath>
#include <limits>
#include <vector>

#include "pooling/attention_pool/cpu.h"
#include "simd/parallel.h"

namespace velm::pooling {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

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

void attention_pool_forward(Tensor x, Tensor rows, std::optional<Tensor> lengths, std::optional<Tensor> mask,
                            std::optional<Tensor> cu_seqlens, Tensor out, Tensor logsumexp) {
  const int64_t segments = out.size(0);
  const Problem p(x, rows, segments, lengths, mask, cu_seqlens);
  if (segments == 0 || p.rows == 0) return;
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
  if (states == nullptr) return;
  parallel_items(segments, [&](int64_t s) {
    const int64_t begin = first[static_cast<size_t>(s)], end = first[static_cast<size_t>(s) + 1];
    if (end - begin == 1) return;
    const State total(states + State::floats(p) * begin, p);
    for (int64_t i = begin + 1; i < end; ++i) join(p, total, State(states + State::floats(p) * i, p));
    write(s, total);
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "attention_pool_forward", attention_pool_forward);
}

}  // namespace
}  // namespace velm::pooling
