// What bilinear_attention and bilinear_attention_pool share on the CPU: pairs of the rows of two sides, and two
// products of an entry of the batch, in which the words of all glimpses, scaled by h, lie side by side:
//
//   scores:       s[i, (g, j)] = sum over k of v[i, k] (h[g, k] q[j, k])
//   contraction:  dv[i, k] = sum over (g, j) of w[i, (g, j)] (h[g, k] q[j, k]), and with
//                 u[(g, j), k] = sum over i of w[i, (g, j)] v[i, k]:
//                 dq[j, k] = sum over g of h[g, k] u[(g, j), k], dh[g, k] = sum over j of q[j, k] u[(g, j), k].
#pragma once

#include <algorithm>

#include "common/tensor.h"
#include "simd/layout.h"
#include "simd/parallel.h"
#include "simd/scratch.h"
#include "simd/vec.h"

namespace velm::pairs {

using namespace simd;
using Given = std::optional<Tensor>;

// Matrices of one element type with last stride 1, one per entry of the batch.
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

  Side(const Tensor& x, const Given& lengths, const Given& mask)
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

inline Problem problem_of(const Tensor& v, const Tensor& q, int64_t glimpses, const Given& v_lengths,
                          const Given& q_lengths, const Given& v_mask, const Given& q_mask) {
  return {Side(v, v_lengths, v_mask), Side(q, q_lengths, q_mask), v.size(0), glimpses, v.size(2)};
}

// Rows that are the same for every entry of the batch.
inline Matrices shared_rows(const Tensor& h) {
  return {h, 0, h.stride(0)};
}

// Calls f(offset, count) for whole vectors and then for what is left.
template <class F>
VELM_INLINE void vectors(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, kLanes);
  if (i < size) f(i, static_cast<int>(size - i));
}

// raw (batch, glimpses, regions, words) = the scores with a bias, `masked` where a pair does not count.
void scores(const Problem& p, const Matrices& h, const Given& bias, float masked, float* raw);

// Weights of pairs, packed: that of the live region i, glimpse g and live word j of an entry of the batch at
// [i][g][j] of its room. Rows are a little apart: those of a power of two bytes fall into the same sets of a cache.
struct Weights {
  float* data;
  static int64_t stride(const Problem& p, int64_t words) { return padded(p.glimpses * words); }
  static int64_t room(const Problem& p) { return p.v.rows * stride(p, p.q.rows); }
  float* of(const Problem& p, int64_t batch) const { return data + batch * room(p); }
};

// to[i][j] = the weight of the i-th live region and the j-th live word.
inline void gather(const Problem& p, const Live& live, const Matrices& from, int64_t b, int64_t g, float* line,
                   float* to) {
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
  std::optional<Matrices> v, q;
  // For every entry of the batch, or summed over them into fp32 (glimpses, k).
  std::optional<Matrices> h;
  float* h_sum = nullptr;

  Gradients() = default;
  Gradients(const Given& grad_v, const Given& grad_q, float* h_sum) : h_sum(h_sum) {
    if (grad_v) v.emplace(*grad_v);
    if (grad_q) q.emplace(*grad_q);
  }
};

// h is all ones where it is not given.
void contract(const Problem& p, const Matrices* h, const Weights& weights, const Gradients& to);

}  // namespace velm::pairs
