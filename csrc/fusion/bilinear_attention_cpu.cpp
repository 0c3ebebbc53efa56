// Bilinear attention over pairs of regions and words, and the pooling of their joint features. Both are made of two
// products a batch entry, in which the words of all glimpses, scaled by h, lie side by side:
//
//   scores:       s[i, (g, j)] = sum over k of v[i, k] (h[g, k] q[j, k])
//   contraction:  dv[i, k] = sum over (g, j) of w[i, (g, j)] (h[g, k] q[j, k]), and with
//                 u[(g, j), k] = sum over i of w[i, (g, j)] v[i, k]:
//                 dq[j, k] = sum over g of h[g, k] u[(g, j), k], dh[g, k] = sum over j of q[j, k] u[(g, j), k].
//
// The scaled words and u exist a tile at a time. Rows that do not count are left out when tiles are packed.

#include <algorithm>
#include <limits>
#include <tuple>

#include "common/tensor.h"
#include "simd/layout.h"
#include "simd/math.h"
#include "simd/parallel.h"
#include "simd/product.h"
#include "simd/scratch.h"
#include "simd/transpose.h"

namespace velm {
namespace {

using namespace simd;

constexpr int64_t kGradV = 1, kGradQ = 2, kGradH = 4, kGradBias = 8, kGradAttention = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
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

// Matrices of one element type with last stride 1, one an entry of the batch.
struct Matrices {
  void* data;
  ScalarType type;
  int64_t batch_stride, row_stride;

  Matrices(const Tensor& t, int64_t batch_stride, int64_t row_stride)
      : data(const_cast<void*>(t.const_data_ptr())),
        type(t.scalar_type()),
        batch_stride(batch_stride),
        row_stride(row_stride) {}
  explicit Matrices(const Tensor& t) : Matrices(t, t.stride(0), t.stride(1)) {}

  // `count` elements from `column` on, as fp32, with zeros up to `room`.
  void read(int64_t batch, int64_t row, int64_t column, int64_t count, float* to, int64_t room) const {
    const int64_t at = batch * batch_stride + row * row_stride + column;
    with_type(type, [&](auto t) { convert(to, static_cast<const decltype(t)*>(data) + at, count); });
    std::fill(to + count, to + std::max(count, room), 0.0f);
  }
  void write(int64_t batch, int64_t row, int64_t column, int64_t count, const float* from) const {
    const int64_t at = batch * batch_stride + row * row_stride + column;
    with_type(type, [&](auto t) { convert(static_cast<decltype(t)*>(data) + at, from, count); });
  }
};

// Regions or words, and which of them count.
struct Side {
  Matrices x;
  int64_t rows;
  const int32_t* lengths;
  const bool* mask;

  Side(const Tensor& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask)
      : x(x),
        rows(x.size(1)),
        lengths(lengths ? const_data<int32_t>(*lengths) : nullptr),
        mask(mask ? const_data<bool>(*mask) : nullptr) {}

  // Writes the numbers of the rows that count and returns how many there are.
  int64_t live(int64_t batch, int64_t* index) const {
    const int64_t end = lengths ? std::clamp<int64_t>(lengths[batch], 0, rows) : rows;
    int64_t count = 0;
    for (int64_t i = 0; i < end; ++i)
      if (!mask || mask[batch * rows + i]) index[count++] = i;
    return count;
  }
};

struct Problem {
  Side v, q;
  int64_t batch, glimpses, k;
  int64_t pairs() const { return v.rows * q.rows; }
};

// The rows of an entry of the batch that count.
struct Live {
  int64_t *region, *word;
  int64_t regions = 0, words = 0;

  Live(Scratch& memory, const Problem& p)
      : region(memory.take<int64_t>(p.v.rows)), word(memory.take<int64_t>(p.q.rows)) {}
  void of(const Problem& p, int64_t batch) {
    regions = p.v.live(batch, region);
    words = p.q.live(batch, word);
  }
};

// Glimpses whose words lie side by side.
int64_t group_of(const Problem& p) {
  return std::clamp<int64_t>(kSide / std::max<int64_t>(1, p.q.rows), 1, std::max<int64_t>(1, p.glimpses));
}

// Words as columns, once a glimpse: column g * words + j of row k is h[k * ldh + g] * q[k * ldq + j]. Columns lie in
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

// Calls f(offset, count) for whole vectors and then for what is left.
template <class F>
VELM_INLINE void vectors(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, kLanes);
  if (i < size) f(i, static_cast<int>(size - i));
}

// raw (batch, glimpses, regions, words) = the scores with a bias, `masked` where a pair does not count.
void scores(const Problem& p, const Matrices& h, const std::optional<Tensor>& bias, float masked, float* raw) {
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

// The softmax of all pairs of a glimpse, in out, which may be x. False where all weights are NaN: a score is NaN or
// +inf, or all are -inf.
bool softmax(const float* x, int64_t size, float* out) {
  const FlushSubnormals flush;
  Vec largest(-kInfinity);
  vectors(size, [&](int64_t i, int n) VELM_INLINE_LAMBDA {
    const Vec value = load_first(x + i, n);
    largest = maximum(n == kLanes ? value : select(first_lanes(n), value, Vec(-kInfinity)), largest);
  });
  const Vec base(max_lanes(largest));
  Vec sum = zero();
  vectors(size, [&](int64_t i, int n) VELM_INLINE_LAMBDA {
    const Vec weight = simd::exp(load_first(x + i, n) - base);
    sum += n == kLanes ? weight : select(first_lanes(n), weight, zero());
    store_first(out + i, weight, n);
  });
  const float total = sum_lanes(sum);
  const Vec scale(1.0f / total);
  vectors(size, [&](int64_t i, int n) VELM_INLINE_LAMBDA { store_first(out + i, load_first(out + i, n) * scale, n); });
  return total == total;
}

Problem problem_of(const Tensor& v, const Tensor& q, int64_t glimpses, const std::optional<Tensor>& v_lengths,
                   const std::optional<Tensor>& q_lengths, const std::optional<Tensor>& v_mask,
                   const std::optional<Tensor>& q_mask) {
  return {Side(v, v_lengths, v_mask), Side(q, q_lengths, q_mask), v.size(0), glimpses, v.size(2)};
}

// Rows that are the same for every entry of the batch.
Matrices shared_rows(const Tensor& h) {
  return {h, 0, h.stride(0)};
}

std::tuple<Tensor, Tensor> bilinear_attention_forward(Tensor v, Tensor q, Tensor h, std::optional<Tensor> bias,
                                                      std::optional<Tensor> v_lengths, std::optional<Tensor> q_lengths,
                                                      std::optional<Tensor> v_mask, std::optional<Tensor> q_mask,
                                                      bool return_logits) {
  const Problem p = problem_of(v, q, h.size(0), v_lengths, q_lengths, v_mask, q_mask);
  const auto shape = {p.batch, p.glimpses, p.v.rows, p.q.rows};
  Tensor maps = torch::stable::new_empty(v, shape);
  Tensor logits = return_logits ? torch::stable::new_empty(v, shape) : nothing(v);
  const int64_t size = p.batch * p.glimpses * p.pairs();
  if (size == 0) return {maps, logits};
  Scratch memory;
  const bool is_fp32 = v.scalar_type() == ScalarType::Float;
  float* raw = is_fp32 ? mutable_data<float>(return_logits ? logits : maps) : memory.take(size);
  scores(p, shared_rows(h), bias, -kInfinity, raw);
  const Matrices to_maps(maps, p.glimpses * p.pairs(), p.pairs()), to_logits(logits, p.glimpses * p.pairs(), p.pairs());
  parallel_ranges(p.batch * p.glimpses, 1, [&](int64_t begin, int64_t end) {
    Scratch own;
    Live live(own, p);
    float* weights = own.take(p.pairs());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.glimpses, g = task % p.glimpses;
      const float* from = raw + task * p.pairs();
      if (return_logits && !is_fp32) to_logits.write(b, g, 0, p.pairs(), from);
      live.of(p, b);
      const bool some = live.regions > 0 && live.words > 0;
      if (!some || !softmax(from, p.pairs(), weights)) {
        // NaN at the pairs that count and nowhere else.
        std::fill_n(weights, p.pairs(), 0.0f);
        for (int64_t i = 0; some && i < live.regions; ++i)
          for (int64_t j = 0; j < live.words; ++j) weights[live.region[i] * p.q.rows + live.word[j]] = kNaN;
      }
      to_maps.write(b, g, 0, p.pairs(), weights);
    }
  });
  return {maps, logits};
}

// Weights of pairs, packed: that of the live region i, glimpse g and live word j of an entry of the batch at
// [i][g][j] of its room. Rows are a little apart: those of a power of two bytes fall into the same sets of a cache.
struct Weights {
  float* data;
  static int64_t stride(const Problem& p, int64_t words) { return padded(p.glimpses * words); }
  static int64_t room(const Problem& p) { return p.v.rows * stride(p, p.q.rows); }
  float* of(const Problem& p, int64_t batch) const { return data + batch * room(p); }
};

// to[i][j] = the weight of the i-th live region and the j-th live word.
void gather(const Problem& p, const Live& live, const Matrices& from, int64_t b, int64_t g, float* line, float* to) {
  if (live.words * live.regions == p.pairs()) return from.read(b, g, 0, p.pairs(), to, 0);
  for (int64_t i = 0; i < live.regions; ++i, to += live.words) {
    const bool all = live.words == p.q.rows;
    from.read(b, g, live.region[i] * p.q.rows, p.q.rows, all ? to : line, 0);
    for (int64_t j = 0; j < live.words && !all; ++j) to[j] = line[live.word[j]];
  }
}

// Packs the weights that make(live, b, g, line, pairs) puts into pairs [i][j].
template <class Make>
void pack_weights(const Problem& p, const Weights& to, const Make& make) {
  parallel_ranges(p.batch * p.glimpses, 1, [&](int64_t begin, int64_t end) {
    Scratch own;
    Live live(own, p);
    float* line = own.take(p.q.rows);
    float* pairs = own.take(3 * p.pairs());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.glimpses, g = task % p.glimpses;
      live.of(p, b);
      make(live, b, g, line, pairs);
      float* room = to.of(p, b) + g * live.words;
      const int64_t stride = Weights::stride(p, live.words);
      for (int64_t i = 0; i < live.regions; ++i) std::copy_n(pairs + i * live.words, live.words, room + i * stride);
    }
  });
}

// What a contraction computes; those that are not there are not wanted.
struct Gradients {
  const Matrices *v = nullptr, *q = nullptr;
  // For every entry of the batch, or summed over them into fp32 (glimpses, k).
  const Matrices* h = nullptr;
  float* h_sum = nullptr;
};

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

// h is all ones where it is not given.
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

// In single precision for a few numbers at a time.
double sum_of(const float* x, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; i += kDepth) {
    Vec sum = zero();
    vectors(std::min(kDepth, size - i), [&](int64_t j, int n) VELM_INLINE_LAMBDA { sum += load_first(x + i + j, n); });
    total += sum_lanes(sum);
  }
  return total;
}

// The gradient of the scores of a glimpse: weights [i][j] holds the maps and is replaced.
void score_gradient(float* weights, const float* grad_maps, const float* grad_logits, int64_t size) {
  Vec dot = zero();
  if (grad_maps)
    vectors(size, [&](int64_t i, int n)
                      VELM_INLINE_LAMBDA { dot = fma(load_first(weights + i, n), load_first(grad_maps + i, n), dot); });
  const Vec along(sum_lanes(dot));
  vectors(size, [&](int64_t i, int n) VELM_INLINE_LAMBDA {
    Vec slope = grad_logits ? load_first(grad_logits + i, n) : zero();
    if (grad_maps) slope += load_first(weights + i, n) * (load_first(grad_maps + i, n) - along);
    store_first(weights + i, slope, n);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bilinear_attention_backward(
    std::optional<Tensor> grad_maps, std::optional<Tensor> grad_logits, Tensor maps, Tensor v, Tensor q, Tensor h,
    std::optional<Tensor> v_lengths, std::optional<Tensor> q_lengths, std::optional<Tensor> v_mask,
    std::optional<Tensor> q_mask, int64_t grad_mask) {
  const Problem p = problem_of(v, q, h.size(0), v_lengths, q_lengths, v_mask, q_mask);
  const auto result = [&](int64_t bit, std::initializer_list<int64_t> shape) {
    return grad_mask & bit ? torch::stable::new_empty(v, torch::headeronly::IntHeaderOnlyArrayRef(shape)) : nothing(v);
  };
  Tensor grad_v = result(kGradV, {p.batch, p.v.rows, p.k}), grad_q = result(kGradQ, {p.batch, p.q.rows, p.k});
  Tensor grad_h = result(kGradH, {p.glimpses, p.k}), grad_bias = result(kGradBias, {p.glimpses});
  Scratch memory;
  const Weights weights{memory.take(p.batch * Weights::room(p))};
  double* sums = memory.take<double>(p.batch * p.glimpses);
  const int64_t all = p.glimpses * p.pairs();
  const Matrices of_maps(maps, all, p.pairs());
  const Matrices of_grad(grad_maps ? *grad_maps : maps, all, p.pairs());
  const Matrices of_logits(grad_logits ? *grad_logits : maps, all, p.pairs());
  pack_weights(p, weights, [&](const Live& live, int64_t b, int64_t g, float* line, float* pairs) {
    const int64_t size = live.regions * live.words;
    float *of_map = pairs + size, *of_logit = pairs + 2 * size;
    gather(p, live, of_maps, b, g, line, pairs);
    if (grad_maps) gather(p, live, of_grad, b, g, line, of_map);
    if (grad_logits) gather(p, live, of_logits, b, g, line, of_logit);
    score_gradient(pairs, grad_maps ? of_map : nullptr, grad_logits ? of_logit : nullptr, size);
    // The softmax does not see a bias: only the gradients of the logits count.
    if (grad_mask & kGradBias) sums[b * p.glimpses + g] = grad_logits ? sum_of(of_logit, size) : 0.0;
  });
  for (int64_t g = 0; g < p.glimpses && grad_mask & kGradBias; ++g) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) sum += sums[b * p.glimpses + g];
    with_type(v.scalar_type(),
              [&](auto t) { store_scalar(mutable_data<decltype(t)>(grad_bias) + g, static_cast<float>(sum)); });
  }
  if (!(grad_mask & (kGradV | kGradQ | kGradH)) || p.k == 0) return {grad_v, grad_q, grad_h, grad_bias};
  const Matrices factors = shared_rows(h);
  Gradients to;
  const Matrices to_v = grad_mask & kGradV ? Matrices(grad_v) : Matrices(v);
  const Matrices to_q = grad_mask & kGradQ ? Matrices(grad_q) : Matrices(q);
  if (grad_mask & kGradV) to.v = &to_v;
  if (grad_mask & kGradQ) to.q = &to_q;
  if (grad_mask & kGradH) to.h_sum = memory.take(p.glimpses * p.k);
  contract(p, &factors, weights, to);
  if (to.h_sum) {
    const Matrices to_h = shared_rows(grad_h);
    for (int64_t g = 0; g < p.glimpses; ++g) to_h.write(0, g, 0, p.k, to.h_sum + g * p.k);
  }
  return {grad_v, grad_q, grad_h, grad_bias};
}

// Attention that is given, packed.
void pack_attention(const Problem& p, const Tensor& attention, const Weights& to) {
  const Matrices from(attention, p.glimpses * p.pairs(), p.pairs());
  pack_weights(p, to, [&](const Live& live, int64_t b, int64_t g, float* line, float* pairs) {
    gather(p, live, from, b, g, line, pairs);
  });
}

Tensor bilinear_attention_pool_forward(Tensor v, Tensor q, Tensor attention, std::optional<Tensor> v_lengths,
                                       std::optional<Tensor> q_lengths, std::optional<Tensor> v_mask,
                                       std::optional<Tensor> q_mask) {
  const Problem p = problem_of(v, q, attention.size(1), v_lengths, q_lengths, v_mask, q_mask);
  Tensor out = torch::stable::new_empty(v, {p.batch, p.glimpses, p.k});
  if (p.batch * p.glimpses * p.k == 0) return out;
  Scratch memory;
  const Weights weights{memory.take(p.batch * Weights::room(p))};
  pack_attention(p, attention, weights);
  const Matrices to_out(out);
  contract(p, nullptr, weights, {.h = &to_out});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> bilinear_attention_pool_backward(Tensor grad, Tensor v, Tensor q, Tensor attention,
                                                                    std::optional<Tensor> v_lengths,
                                                                    std::optional<Tensor> q_lengths,
                                                                    std::optional<Tensor> v_mask,
                                                                    std::optional<Tensor> q_mask, int64_t grad_mask) {
  const Problem p = problem_of(v, q, attention.size(1), v_lengths, q_lengths, v_mask, q_mask);
  const auto result = [&](int64_t bit, std::initializer_list<int64_t> shape) {
    return grad_mask & bit ? torch::stable::new_empty(v, torch::headeronly::IntHeaderOnlyArrayRef(shape)) : nothing(v);
  };
  Tensor grad_v = result(kGradV, {p.batch, p.v.rows, p.k}), grad_q = result(kGradQ, {p.batch, p.q.rows, p.k});
  Tensor grad_attention = result(kGradAttention, {p.batch, p.glimpses, p.v.rows, p.q.rows});
  const Matrices factors(grad);
  Scratch memory;
  const int64_t size = p.batch * p.glimpses * p.pairs();
  if (grad_mask & kGradAttention && size > 0) {
    const bool is_fp32 = v.scalar_type() == ScalarType::Float;
    float* raw = is_fp32 ? mutable_data<float>(grad_attention) : memory.take(size);
    scores(p, factors, std::nullopt, 0.0f, raw);
    const Matrices to(grad_attention, p.pairs(), 0);
    if (!is_fp32)
      parallel_items(p.batch * p.glimpses,
                     [&](int64_t task) { to.write(task, 0, 0, p.pairs(), raw + task * p.pairs()); });
  }
  if (grad_mask & (kGradV | kGradQ) && p.k > 0) {
    const Weights weights{memory.take(p.batch * Weights::room(p))};
    pack_attention(p, attention, weights);
    const Matrices to_v = grad_mask & kGradV ? Matrices(grad_v) : Matrices(v);
    const Matrices to_q = grad_mask & kGradQ ? Matrices(grad_q) : Matrices(q);
    contract(p, &factors, weights,
             {.v = grad_mask & kGradV ? &to_v : nullptr, .q = grad_mask & kGradQ ? &to_q : nullptr});
  }
  return {grad_v, grad_q, grad_attention};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("bilinear_attention_forward", TORCH_BOX(&bilinear_attention_forward));
  m.impl("bilinear_attention_backward", TORCH_BOX(&bilinear_attention_backward));
  m.impl("bilinear_attention_pool_forward", TORCH_BOX(&bilinear_attention_pool_forward));
  m.impl("bilinear_attention_pool_backward", TORCH_BOX(&bilinear_attention_pool_backward));
}

}  // namespace
}  // namespace velm
