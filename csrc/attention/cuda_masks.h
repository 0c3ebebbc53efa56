// Which keys the rows of a block see, and what that makes of their scores.
#pragma once

#include "attention/cuda_arguments.h"
#include "attention/cuda_backward.h"
#include "device/philox.h"
#include "device/predicated.h"

namespace velm::cuda {

constexpr int kNoTile = 0x7fffffff;

// The rows of a block: queries of one head, or of all heads that share a key head, one head behind the other. They see
// no keys but those from lo to hi. A row past the end is query -1.
template <int kCount>
struct RowsOfBlock {
  SharedArray<int, kCount> query, head, lo, hi;
};
using RowTable = RowsOfBlock<kRows>;

// Threads of a block take part; a barrier must follow.
template <class T, int kCount>
DEVICE_INLINE void fill_rows(RowsOfBlock<kCount>& rows, const Inputs<T>& a, const Sequence& s, int index,
                             int first_head, int first_row, int total) {
  const int i = static_cast<int>(threadIdx.x), row = first_row + i;
  if (i >= kCount) return;
  const bool is_row = row < total;
  const int query = is_row ? row % s.queries : -1;
  int lo = 0, hi = is_row ? s.keys : 0;
  if (a.lengths) hi = min(hi, int{a.lengths[index]});
  if (a.causal) hi = min(hi, query + 1);
  if (a.range_start && is_row) {
    const int64_t at = s.query_number(a, query);
    lo = max(int{a.range_start[at]}, 0);
    hi = min(hi, int{a.range_stop[at]});
  }
  if (lo >= hi) lo = hi = 0;
  rows.query[i] = query;
  rows.head[i] = first_head + (is_row ? row / s.queries : 0);
  rows.lo[i] = lo;
  rows.hi[i] = hi;
}

// Which keys any row of a block sees, the same in every lane, and which ones all rows of a warp see.
template <int kCount>
class HorizonOf {
 public:
  DEVICE_INLINE explicit HorizonOf(RowsOfBlock<kCount>& rows) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    int last = 0;
#pragma unroll
    for (int i = 0; i < kCount / 32; ++i) {
      lo_[i] = rows.lo[lane + 32 * i];
      hi_[i] = rows.hi[lane + 32 * i];
      last = max(last, hi_[i]);
    }
    end = __reduce_max_sync(kAll, last);
    // Rows past the end may see everything: nothing becomes of their results.
    const int row = thread / 32 * 16 + lane % 16, query = rows.query[row], lo = rows.lo[row], hi = rows.hi[row];
    full_lo_ = __reduce_max_sync(kAll, lo);
    full_hi_ = __reduce_min_sync(kAll, query < 0 ? kNoTile : hi);
  }

  // The first tile of kKeys keys, from number `tile` on, of which some row sees a key; or kNoTile.
  template <int kKeys>
  DEVICE_INLINE int next(int tile) const {
    int first = kNoTile;
#pragma unroll
    for (int i = 0; i < kCount / 32; ++i)
      if (hi_[i] > tile * kKeys) first = min(first, max(tile, lo_[i] / kKeys));
    return __reduce_min_sync(kAll, first);
  }

  DEVICE_INLINE bool all_see(int begin, int keys) const { return begin >= full_lo_ && begin + keys <= full_hi_; }

  // Behind the last key that any row sees.
  int end;

 private:
  int lo_[kCount / 32], hi_[kCount / 32], full_lo_, full_hi_;
};
using Horizon = HorizonOf<kRows>;

// Bits of the keys from `start` on: whether key_mask shows them. All lanes of a warp take part.
template <int kKeys, class T>
DEVICE_INLINE uint64_t open_keys(const Inputs<T>& a, int batch, int start, int end) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t open = 0;
#pragma unroll
  for (int i = 0; i < kKeys; i += 32) {
    const int key = start + i + lane;
    const bool is_open = key < end && i + lane < kKeys && a.key_mask[batch * int64_t{a.keys} + key] != 0;
    open |= uint64_t{__ballot_sync(kAll, is_open)} << i;
  }
  return open;
}

// The first tile of kKeys keys, from number `tile` on, of which some row sees a key that key_mask shows; or kNoTile.
template <int kKeys, class T, int kCount>
DEVICE_INLINE int next_tile(const HorizonOf<kCount>& horizon, const Inputs<T>& a, int batch, int tile) {
  tile = horizon.template next<kKeys>(tile);
  if (!a.key_mask) return tile;
  while (tile != kNoTile && open_keys<kKeys>(a, batch, tile * kKeys, horizon.end) == 0)
    tile = horizon.template next<kKeys>(tile + 1);
  return tile;
}

// What backward knows of rows: the logsumexp, its `shift` (cuda_backward.h) and delta. All weights of a row with an
// infinite score, or with nothing but -inf, are NaN: its shift is. A row that sees nothing has a logsumexp of -inf and
// a shift and a delta of 0.
struct RowStatistics {
  ReadOnly<float> logsumexp, shift, delta;
};

inline RowStatistics statistics_of(const AttentionBackward& p) {
  return {global<const float>(p.logsumexp), global<const float>(p.shift), global<const float>(p.delta)};
}

// The weight of a score as kernels keep it. `shift` is what the logsumexp, a float, is short of, in base 2.
DEVICE_INLINE float weight_of(float score, float unit, float logsumexp, float shift) {
  return exp2_approximate(fmaf(fmaf(score, unit, -logsumexp), kLog2E, shift));
}

// Of the two rows of a thread: infinity and 0 past the end. `first_row` is the row of the warp in the table.
template <class T, int kCount>
DEVICE_INLINE void read_rows(float (&logsumexp)[2], float (&shift)[2], float (&delta)[2], const Inputs<T>& a,
                             const Sequence& s, RowsOfBlock<kCount>& rows, int first_row, const RowStatistics& from) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    logsumexp[half] = kInfinity;
    shift[half] = delta[half] = 0.0f;
    const int row = first_row + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half, query = rows.query[row];
    if (query < 0) continue;
    const int64_t at = s.row_number(a, rows.head[row], query);
    logsumexp[half] = from.logsumexp[at];
    if (from.shift) shift[half] = from.shift[at];
    if (from.delta) delta[half] = from.delta[at];
  }
}

// To a few units in the last place, also near 0, without branches.
DEVICE_INLINE float tanh_smooth(float x) {
  const float z = x * x;
  float series = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
  series = fmaf(series, z, -5.37397155531e-2f);
  series = fmaf(series, z, 1.33314422036e-1f);
  series = fmaf(series, z, -3.33332819422e-1f);
  series = fmaf(series * z, x, x);
  const float far = 1.0f - __fdividef(2.0f, exp2_approximate(2.0f * kLog2E * x) + 1.0f);
  return fabsf(x) < 0.625f ? series : far;
}

// Products q . k to scores without their bias; where Inputs::scales.
template <int kTiles>
DEVICE_INLINE void scale_scores(float (&s)[kTiles][4], float product, float cap) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] *= product;
  if (cap == 0.0f) return;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = cap * tanh_smooth(s[j][i]);
}

// Bounds what scale_scores leaves by a softcap, and multiplies `slopes`, where wanted, by its derivative.
template <int kTiles>
DEVICE_INLINE void cap_scores(float (&s)[kTiles][4], float cap, float (&slopes)[kTiles][4], bool with_slopes) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float t = tanh_smooth(s[j][i]);
      if (with_slopes) slopes[j][i] *= 1.0f - t * t;
      s[j][i] = cap * t;
    }
}

constexpr unsigned char kShown = 1;

// In place of the score of what a row does not see: a number that no score is. -inf is the score of a key that is seen,
// and that takes part in whatever becomes of its row.
constexpr float kHidden = -0x1.fffffap127f;
// A bias below this leaves nothing of a score, and counts as the next power of two: in base 2 that is exact, so that a
// row of nothing else, as masks of the smallest number of a type make it, is the mean of all values.
constexpr float kFarBias = -0x1p31f;

// A score with its bias. That of what is hidden already is not read.
template <class B>
DEVICE_INLINE float biased(float x, const ReadOnly<B>& from) {
  const float bias = to_float(load_if(x != kHidden, from, from_float<B>(0.0f)));
  const float power = __uint_as_float(__float_as_uint(bias) & 0xff800000u);
  // Selected, as what -inf hides may be NaN.
  return bias == -kInfinity || x == kHidden ? kHidden : x + (bias < kFarBias ? power : bias);
}

// Adds the bias of one row, from the thread's first key on, to the scores `first` and the next of each tile.
template <int kTiles, class B>
DEVICE_INLINE void add_bias(float (&s)[kTiles][4], int first, ReadOnly<B> from, int64_t stride) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j, from = from + 8 * stride)
#pragma unroll
    for (int i = 0; i < 2; ++i) s[j][first + i] = biased(s[j][first + i], from + i * stride);
}

// kHidden where a row does not see a key, and the bias added elsewhere. `first_row` is the row of the warp in the
// table.
template <int kTiles, class T, int kCount>
DEVICE_INLINE void mask_scores(float (&s)[kTiles][4], const Inputs<T>& a, RowsOfBlock<kCount>& rows, int index,
                               int first_row, int start, uint64_t open) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  const int key = start + 2 * member;
  open >>= 2 * member;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + group + 8 * half;
    const int lo = rows.lo[row], hi = rows.hi[row];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = key + 8 * j + i;
        if (n < lo || n >= hi || !(open >> (8 * j + i) & 1)) s[j][2 * half + i] = kHidden;
      }
    const int query = rows.query[row], head = rows.head[row];
    if (a.mask.data) {
      ReadOnly<unsigned char> from = a.mask.data + (a.mask.row(index, head, query) + key * a.mask.stride[3]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j, from = from + 8 * a.mask.stride[3])
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[j][2 * half + i];
          if (!load_if(x != kHidden, from + i * a.mask.stride[3], kShown)) x = kHidden;
        }
    }
    if (a.bias.data)
      add_bias<kTiles, T>(s, 2 * half, a.bias.data + (a.bias.row(index, head, query) + key * a.bias.stride[3]),
                          a.bias.stride[3]);
    if (a.float_bias.data)
      add_bias<kTiles, float>(s, 2 * half,
                              a.float_bias.data + (a.float_bias.row(index, head, query) + key * a.float_bias.stride[3]),
                              a.float_bias.stride[3]);
  }
}

// Which of the two rows of a thread see one of its keys: bits 0 and 1.
template <int kTiles>
DEVICE_INLINE unsigned seeing_rows(const float (&s)[kTiles][4]) {
  unsigned seeing = 0;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) seeing |= unsigned{s[j][i] != kHidden} << i / 2;
  return seeing;
}

// Which keys of a tile some of the 16 rows of the warp see, in the bits that `multiply` takes.
template <int kTiles>
DEVICE_INLINE unsigned seen_keys(const float (&s)[kTiles][4]) {
  unsigned seen = 0;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) seen |= unsigned{s[j][i] != kHidden || s[j][2 + i] != kHidden} << (2 * j + i);
#pragma unroll
  for (int step = 4; step < 32; step *= 2) seen |= __shfl_xor_sync(kAll, seen, step);
  return seen;
}

// The generator's four words serve four neighbouring keys of a query, and so two lanes, each of which draws for one of
// their two rows: this one, of the 16 of a warp.
DEVICE_INLINE int drawn_row() {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return lane / 4 + 8 * (lane % 2);
}

// Which weights of a tile dropout keeps: bits 4 j + i of [half]. `head` and `query` are those of drawn_row().
template <int kTiles, class T>
DEVICE_INLINE void kept_weights(unsigned (&kept)[2], const Inputs<T>& a, int index, int head, int query, int start) {
  static_assert(kTiles <= 8, "four bits a tile in one word");
  const int member = static_cast<int>(threadIdx.x) % 4, mine = member % 2;
  const auto counter = static_cast<uint32_t>(index * a.heads + head);
  const auto seed = static_cast<uint64_t>(a.seed[0]);
  unsigned bits = 0;
  // Two generators at once hide each other's latency; all of them would be half of the code.
#pragma unroll 2
  for (int j = 0; j < kTiles; ++j) {
    uint32_t c[4] = {static_cast<uint32_t>(query), static_cast<uint32_t>(start / 4 + 2 * j + member / 2), counter,
                     a.direction};
    philox(c, seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) bits |= unsigned{c[w] >= a.drop_below} << (4 * j + w);
  }
  const unsigned other = __shfl_xor_sync(kAll, bits, 1);
  kept[0] = (mine ? other : bits) >> (2 * mine);
  kept[1] = (mine ? bits : other) >> (2 * mine);
}

template <int kTiles, class T, int kCount>
DEVICE_INLINE void kept_weights(unsigned (&kept)[2], const Inputs<T>& a, RowsOfBlock<kCount>& rows, int index,
                                int first_row, int start) {
  const int row = first_row + drawn_row();
  kept_weights<kTiles>(kept, a, index, int{rows.head[row]}, int{rows.query[row]}, start);
}

// Zeros what is dropped.
template <int kTiles>
DEVICE_INLINE void drop_weights(float (&p)[kTiles][4], const unsigned (&kept)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(kept[i / 2] >> (4 * j + i % 2) & 1)) p[j][i] = 0.0f;
}

}  // namespace velm::cuda
