// The two products behind bilinear_attention and bilinear_attention_pool. The scaled words and u exist a tile at a
// time; rows that do not count are left out when tiles are packed.

#include "fusion/bilinear_attention/cpu_pairs.h"

#include "simd/product.h"
#include "simd/transpose.h"

namespace velm::pairs {
namespace {

constexpr int kN = 2 * kLanes;
// Scaled words that lie side by side at the most, unless one glimpse has more.
constexpr int64_t kSide = 512;
// Regions of a task of the scores, and the most depth of a step of theirs, in which the scaled words have kStep
// numbers. The products of a step are summed kPiece at a time: two vectors of the scaled words stay in the innermost
// cache.
constexpr int64_t kRegions = 96, kDepth = 512, kStep = 98304, kPiece = 192;
constexpr int64_t kStride = padded(kDepth);
// Columns of a task of the contraction, and the most parts that the batch is cut into.
constexpr int64_t kColumns = 256, kParts = 8;
constexpr int64_t kLine = padded(kColumns);

// Glimpses whose words lie side by side.
int64_t group_of(const Problem& p) {
  return std::clamp<int64_t>(kSide / std::max<int64_t>(1, p.q.rows), 1, std::max<int64_t>(1, p.glimpses));
}

// Words as columns, once per glimpse: column g * words + j of row k is h[k * ldh + g] * q[k * ldq + j]. Columns lie in
// panels, kN of every row below one another, so that a product reads few pages; `line` is memory for a row and a
// vector.
void scaled_words(const float* q, int64_t ldq, const float* h, int64_t ldh, int64_t glimpses, int64_t words,
                  int64_t depth, float* line, float* to) {
  for (int64_t k = 0; k < depth; ++k, to += kN, q += ldq, h += ldh) {
    if (words % kLanes == 0) {
      for (int64_t g = 0, at = 0; g < glimpses; ++g)
        for (int64_t j = 0; j < words; j += kLanes, at += kLanes)
          store(to + at / kN * kN * depth + at % kN, load(q + j) * Vec(h[g]));
      continue;
    }
    // What is past the words of a glimpse is overwritten by the next.
    for (int64_t g = 0; g < glimpses; ++g)
      for (int64_t j = 0; j < words; j += kLanes) store(line + g * words + j, load(q + j) * Vec(h[g]));
    for (int64_t j = 0; j < glimpses * words; j += kN)
      for (int v = 0; v < kN; v += kLanes) store(to + j * depth + v, load(line + j + v));
  }
}

// c = or += a times `columns` columns in panels of this depth, from its row d on.
template <Start S>
void product_panels(float* c, int64_t ldc, int64_t rows, int64_t columns, const float* a, int64_t piece,
                    const float* side, int64_t depth, int64_t d) {
  for (int64_t j = 0; j < columns; j += kN) {
    const float* b = side + j * depth + d * kN;
    if (columns - j > kLanes)
      product<2, false, S>(c + j, ldc, rows, a + d, kStride, piece, b, kN);
    else
      product<1, false, S>(c + j, ldc, rows, a + d, kStride, piece, b, kN);
  }
}

}  // namespace

void scores(const Problem& p, const Matrices& h, const Given& bias, float masked, float* raw) {
  const int64_t group = group_of(p), groups = divide_up(p.glimpses, group);
  const int64_t blocks = std::max<int64_t>(1, divide_up(p.v.rows, kRegions)), words = p.q.rows;
  const int64_t ldq = round_up(words, kLanes), ldh = round_up(group, kLanes),
                stride = padded(group * words + 2 * kLanes);
  const int64_t most = std::clamp<int64_t>(round_up(kStep / stride, kLanes), 64, kDepth);
  const int64_t step = std::min(most, round_up(divide_up(p.k, std::max<int64_t>(1, divide_up(p.k, most))), kLanes));
  parallel_ranges(p.batch * groups * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch memory;
    Live live(memory, p);
    float* a = memory.take(kRegions * kStride);
    float* row = memory.take(std::max(words, group) * kStride);
    float* columns = memory.take(kDepth * ldq);
    float* side = memory.take(kDepth * round_up(group * words, kN));
    float* line = memory.take(stride);
    float* factors = memory.take(kDepth * ldh);
    float* c = memory.take(kRegions * stride);
    std::fill_n(line, stride, 0.0f);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / groups, g0 = task / blocks % groups * group, block = task % blocks;
      const int64_t some = std::min(group, p.glimpses - g0);
      live.of(p, b);
      const int64_t top = block * kRegions, bottom = std::min(top + kRegions, p.v.rows);
      const int64_t* region = std::lower_bound(live.region, live.region + live.regions, top);
      const int64_t rows = std::lower_bound(live.region, live.region + live.regions, bottom) - region;
      const int64_t lanes = round_up(some * live.words, kLanes);
      for (int64_t k = 0; k < p.k && rows > 0 && live.words > 0; k += step) {
        const int64_t depth = std::min(step, p.k - k);
        for (int64_t i = 0; i < rows; ++i) p.v.x.read(b, region[i], k, depth, a + i * kStride, 0);
        for (int64_t g = 0; g < some; ++g) h.read(b, g0 + g, k, depth, row + g * kStride, 0);
        transpose_to(factors, ldh, row, kStride, some, depth);
        for (int64_t j = 0; j < live.words; ++j) p.q.x.read(b, live.word[j], k, depth, row + j * kStride, 0);
        transpose_to(columns, ldq, row, kStride, live.words, depth);
        scaled_words(columns, ldq, factors, ldh, some, live.words, depth, line, side);
        const int64_t most_piece = divide_up(depth, divide_up(depth, kPiece));
        for (int64_t d = 0; d < depth; d += most_piece) {
          const int64_t piece = std::min(most_piece, depth - d);
          if (k + d == 0)
            product_panels<Start::zero>(c, stride, rows, lanes, a, piece, side, depth, d);
          else
            product_panels<Start::add>(c, stride, rows, lanes, a, piece, side, depth, d);
        }
      }
      for (int64_t g = 0; g < some; ++g) {
        float* to = raw + (b * p.glimpses + g0 + g) * p.pairs();
        if (rows * live.words < (bottom - top) * words) std::fill_n(to + top * words, (bottom - top) * words, masked);
        if (live.words == 0) continue;
        float added = 0.0f;
        if (bias)
          with_type(bias->scalar_type(), [&](auto t) { added = to_float(const_data<decltype(t)>(*bias)[g0 + g]); });
        for (int64_t i = 0; i < rows; ++i) {
          const float* from = c + i * stride + g * live.words;
          float* pairs = to + region[i] * words;
          if (live.words == words && p.k > 0) {
            vectors(words, [&](int64_t j, int n)
                               VELM_INLINE_LAMBDA { store_first(pairs + j, load_first(from + j, n) + added, n); });
            continue;
          }
          // No depth, no products.
          for (int64_t j = 0; j < live.words; ++j) pairs[live.word[j]] = (p.k > 0 ? from[j] : 0.0f) + added;
        }
      }
    }
  });
}

namespace {

// Columns of rows from column k on, with zeros up to whole tiles.
void read_rows(const Matrices& x, int64_t batch, const int64_t* index, int64_t rows, int64_t k, int64_t columns,
               float* to) {
  for (int64_t r = 0; r < rows; ++r)
    x.read(batch, index ? index[r] : r, k, columns, to + r * kLine, round_up(columns, kN));
}

void write_rows(const Matrices& to, int64_t batch, const int64_t* index, int64_t live, int64_t rows, int64_t k,
                int64_t columns, const float* from, const float* zeros) {
  for (int64_t r = 0, next = 0; r < rows; ++r) {
    const bool is_live = next < live && index[next] == r;
    to.write(batch, r, k, columns, is_live ? from + next * kLine : zeros);
    next += is_live;
  }
}

// Memory of a task of the contraction.
struct Worker {
  Scratch memory;
  Live live;
  float *v, *q, *h, *side, *u, *grad_v, *grad_q, *grad_h, *zeros;

  Worker(const Problem& p, int64_t group)
      : live(memory, p),
        v(memory.take(p.v.rows * kLine)),
        q(memory.take(p.q.rows * kLine)),
        h(memory.take(p.glimpses * kLine)),
        side(memory.take(group * p.q.rows * kN)),
        u(memory.take(group * p.q.rows * kN)),
        grad_v(memory.take(p.v.rows * kLine)),
        grad_q(memory.take(p.q.rows * kLine)),
        grad_h(memory.take(p.glimpses * kLine)),
        zeros(memory.take(kColumns)) {
    std::fill_n(zeros, kColumns, 0.0f);
  }
};

// grad_q += h u and grad_h += q u for the glimpses of a panel of u.
void combine(const float* u, const float* h, const float* q, int64_t glimpses, int64_t words, float* grad_q,
             float* grad_h) {
  for (int64_t g = 0; g < glimpses; ++g) {
    Vec factor[2], sum[2];
    unroll<2>([&](auto c) VELM_INLINE_LAMBDA {
      factor[c] = load(h + g * kLine + c * kLanes);
      sum[c] = load(grad_h + g * kLine + c * kLanes);
    });
    for (int64_t j = 0; j < words; ++j) {
      unroll<2>([&](auto c) VELM_INLINE_LAMBDA {
        const Vec value = load(u + (g * words + j) * kN + c * kLanes);
        float* to = grad_q + j * kLine + c * kLanes;
        store(to, fma(factor[c], value, load(to)));
        sum[c] = fma(load(q + j * kLine + c * kLanes), value, sum[c]);
      });
    }
    unroll<2>([&](auto c) VELM_INLINE_LAMBDA { store(grad_h + g * kLine + c * kLanes, sum[c]); });
  }
}

// Columns [k, k + columns) of one entry of the batch; adds to w.grad_h.
void contract_entry(const Problem& p, const Matrices* h, const float* weights, int64_t b, int64_t group, int64_t k,
                    int64_t columns, const Gradients& to, Worker& w) {
  const int64_t regions = w.live.regions, words = w.live.words, stride = Weights::stride(p, words);
  const bool wants_u = to.q || to.h || to.h_sum;
  if (wants_u) {
    std::fill_n(w.grad_q, words * kLine, 0.0f);
    read_rows(p.v.x, b, w.live.region, regions, k, columns, w.v);
  }
  read_rows(p.q.x, b, w.live.word, words, k, columns, w.q);
  if (h)
    read_rows(*h, b, nullptr, p.glimpses, k, columns, w.h);
  else
    std::fill_n(w.h, p.glimpses * kLine, 1.0f);
  for (int64_t c = 0; c < columns; c += kN) {
    for (int64_t g = 0; g < p.glimpses; g += group) {
      const int64_t some = std::min(group, p.glimpses - g), depth = some * words;
      if (to.v) {
        for (int64_t i = 0; i < some; ++i)
          for (int64_t j = 0; j < words; ++j)
            unroll<2>([&](auto x) VELM_INLINE_LAMBDA {
              store(w.side + (i * words + j) * kN + x * kLanes,
                    load(w.q + j * kLine + c + x * kLanes) * load(w.h + (g + i) * kLine + c + x * kLanes));
            });
      }
      // Weights of some regions serve both products while they are in the second-level cache.
      for (int64_t r = 0; r < regions; r += kRegions) {
        const int64_t rows = std::min(kRegions, regions - r);
        const float* from = weights + r * stride + g * words;
        float* grad_v = w.grad_v + r * kLine + c;
        if (to.v && g == 0) product<2, false, Start::zero>(grad_v, kLine, rows, from, stride, depth, w.side, kN);
        if (to.v && g > 0) product<2, false, Start::add>(grad_v, kLine, rows, from, stride, depth, w.side, kN);
        const float* v = w.v + r * kLine + c;
        if (wants_u && r == 0) product<2, true, Start::zero>(w.u, kN, depth, from, stride, rows, v, kLine);
        if (wants_u && r > 0) product<2, true, Start::add>(w.u, kN, depth, from, stride, rows, v, kLine);
      }
      if (wants_u) combine(w.u, w.h + g * kLine + c, w.q + c, some, words, w.grad_q + c, w.grad_h + g * kLine + c);
    }
  }
}

}  // namespace

void contract(const Problem& p, const Matrices* h, const Weights& weights, const Gradients& to) {
  const int64_t group = group_of(p), chunks = divide_up(p.k, kColumns);
  const int64_t parts = std::clamp<int64_t>(p.batch, 1, kParts);
  Scratch memory;
  float* sums = to.h_sum ? memory.take(parts * p.glimpses * p.k) : nullptr;
  parallel_ranges(parts * chunks, 1, [&](int64_t begin, int64_t end) {
    Worker w(p, group);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / chunks, k = task % chunks * kColumns, columns = std::min(kColumns, p.k - k);
      std::fill_n(w.grad_h, p.glimpses * kLine, 0.0f);
      for (int64_t b = p.batch * part / parts; b < p.batch * (part + 1) / parts; ++b) {
        w.live.of(p, b);
        if (w.live.regions == 0 || w.live.words == 0 || p.glimpses == 0)
          w.live.regions = w.live.words = 0;
        else
          contract_entry(p, h, weights.of(p, b), b, group, k, columns, to, w);
        if (to.v) write_rows(*to.v, b, w.live.region, w.live.regions, p.v.rows, k, columns, w.grad_v, w.zeros);
        if (to.q) write_rows(*to.q, b, w.live.word, w.live.words, p.q.rows, k, columns, w.grad_q, w.zeros);
        if (!to.h) continue;
        for (int64_t g = 0; g < p.glimpses; ++g) to.h->write(b, g, k, columns, w.grad_h + g * kLine);
        std::fill_n(w.grad_h, p.glimpses * kLine, 0.0f);
      }
      for (int64_t g = 0; g < p.glimpses && sums; ++g)
        std::copy_n(w.grad_h + g * kLine, columns, sums + (part * p.glimpses + g) * p.k + k);
    }
  });
  const int64_t size = p.glimpses * p.k;
  for (int64_t i = 0; i < size && sums; ++i) {
    to.h_sum[i] = sums[i];
    for (int64_t part = 1; part < parts; ++part) to.h_sum[i] += sums[part * size + i];
  }
}

}  // namespace velm::pairs
