// What numbers that are not finite leave in rows that do not see them. A row of a tile multiplies what it does not see,
// but others of the tile do, by 0, and 0 times NaN or infinity is NaN. To look for them in every tile would cost more
// than all masks together; so nobody does, and where a row of results has NaN without one of its weights being NaN,
// what is NaN in it is computed anew: pair by pair, from what the row sees and nothing else. That takes as long as a
// hundred tiles, and happens where there is NaN or infinity in keys, values, queries or gradients alone.
#pragma once

#include "attention/cuda_masks.h"
#include "device/reduce.h"

namespace velm::cuda {

// Whether a row may see what another one of its batch entry and head does not.
template <class T>
DEVICE_INLINE bool hides_from_some(const Inputs<T>& a) {
  return a.causal || a.range_start || a.mask.data || a.bias.data || a.float_bias.data;
}

// Which of the 16 rows of a warp, as matrix instructions lay them out, have NaN in their results and are to be computed
// anew, of a thread's two rows those that `may_be` says.
class SpoiledRows {
 public:
  template <int kTiles>
  DEVICE_INLINE SpoiledRows(const float (&results)[kTiles][4], const bool (&may_be)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool has_nan = false;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) has_nan |= results[j][i] != results[j][i];
      lanes_[half] = __ballot_sync(kAll, has_nan && may_be[half]);
    }
  }
  DEVICE_INLINE bool any() const { return lanes_[0] || lanes_[1]; }
  DEVICE_INLINE bool has(int row) const { return ((row < 8 ? lanes_[0] : lanes_[1]) >> 4 * (row % 8) & 15) != 0; }

 private:
  unsigned lanes_[2];
};

// A score, kHidden where the query does not see the key, and the derivative of its softcap.
struct PairScore {
  float score, slope;
};

// What follows is done by a whole warp, with the same arguments in every lane.

template <class T>
DEVICE_INLINE float product_of_rows(const Global<const T>& x, const Global<const T>& y, int dim) {
  float sum = 0.0f;
#pragma unroll 1
  for (int d = static_cast<int>(threadIdx.x) % 32; d < dim; d += 32) sum = fmaf(to_float(x[d]), to_float(y[d]), sum);
  return warp_sum(sum);
}

template <class T>
DEVICE_INLINE PairScore score_of(const Inputs<T>& a, const Sequence& s, int index, int head, int query, int key) {
  int lo = 0, hi = s.keys;
  if (a.lengths) hi = min(hi, int{a.lengths[index]});
  if (a.causal) hi = min(hi, query + 1);
  if (a.range_start) {
    const int64_t at = s.query_number(a, query);
    lo = max(lo, int{a.range_start[at]});
    hi = min(hi, int{a.range_stop[at]});
  }
  PairScore found{kHidden, 1.0f};
  if (key < lo || key >= hi) return found;
  if (a.key_mask && !a.key_mask[index * int64_t{a.keys} + key]) return found;
  if (a.mask.data && !a.mask.data[a.mask.row(index, head, query) + key * a.mask.stride[3]]) return found;
  found.score = product_of_rows<T>(a.query.at(s.batch, head, s.first_query + query),
                                   a.key.at(s.batch, head / a.group, s.first_key + key), a.head_dim);
  if (a.scales) found.score *= a.product;
  if (a.cap != 0.0f) {
    const float t = tanh_smooth(found.score);
    found.slope = 1.0f - t * t;
    found.score = a.cap * t;
  }
  if (a.bias.data)
    found.score = biased(found.score, a.bias.data + (a.bias.row(index, head, query) + key * a.bias.stride[3]));
  if (a.float_bias.data)
    found.score =
        biased(found.score, a.float_bias.data + (a.float_bias.row(index, head, query) + key * a.float_bias.stride[3]));
  return found;
}

// Whether dropout keeps a weight.
template <class T>
DEVICE_INLINE bool keeps(const Inputs<T>& a, int index, int head, int query, int key) {
  if (!a.seed) return true;
  uint32_t c[4] = {static_cast<uint32_t>(query), static_cast<uint32_t>(key / 4),
                   static_cast<uint32_t>(index * a.heads + head), a.direction};
  philox(c, static_cast<uint64_t>(a.seed[0]));
  const int word = key % 4;
  return (word == 0 ? c[0] : word == 1 ? c[1] : word == 2 ? c[2] : c[3]) >= a.drop_below;
}

// The gradient of a score that is not hidden, before the softcap and without the scale.
template <class T>
DEVICE_INLINE float grad_of_score(const Inputs<T>& a, const Sequence& s, int index, int head, int query, int key,
                                  const PairScore& pair, const Rows<const T>& grad_out, const RowStatistics& of_rows) {
  const int64_t at = s.row_number(a, head, query);
  float dp = product_of_rows<T>(grad_out.at(s.batch, head, s.first_query + query),
                                a.value.at(s.batch, head / a.group, s.first_key + key), a.value_dim);
  dp = keeps(a, index, head, query, key) ? dp * a.keep_scale : 0.0f;
  return weight_of(pair.score, a.unit, of_rows.logsumexp[at], of_rows.shift[at]) * (dp - of_rows.delta[at]) *
         pair.slope;
}

// A sum of weighted rows of up to kDim columns, lane by lane.
template <int kDim>
class RowSum {
 public:
  template <class T>
  DEVICE_INLINE void add(float weight, const Global<const T>& row, int dim) {
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {
      const int column = 32 * c + static_cast<int>(threadIdx.x) % 32;
      if (column < dim) sum_[c] = fmaf(weight, to_float(row[column]), sum_[c]);
    }
  }
  // Whether nothing that is added changes it any more.
  DEVICE_INLINE bool is_nan(int dim) const {
    bool all = true;
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c)
      all = all && (32 * c + static_cast<int>(threadIdx.x) % 32 >= dim || sum_[c] != sum_[c]);
    return __all_sync(kAll, all);
  }
  // Replaces what is NaN.
  template <class R>
  DEVICE_INLINE void put(const Global<R>& to, int dim, float scale) const {
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {
      const int column = 32 * c + static_cast<int>(threadIdx.x) % 32;
      if (column >= dim) continue;
      const float before = to_float(to[column]);
      if (before != before) to[column] = from_float<R>(sum_[c] * scale);
    }
  }

 private:
  float sum_[kDim / 32] = {};
};

}  // namespace velm::cuda
