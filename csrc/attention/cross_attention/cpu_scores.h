// Tiles of scores, keys by rows and query rows by lanes: the products, softcap, bias and masks.
//
// Scores stay in natural units: a row with one key has logsumexp equal to its score bit for bit, and thus weight 1.
// Powers of two would save two operations per element and lose that to the rounding of logsumexp.
#pragma once

#include <optional>

#include "attention/cross_attention/cpu_panel.h"
#include "common/philox.h"
#include "simd/math.h"
#include "simd/scratch.h"

namespace velm::attention {

using simd::Vec;

// What products of queries and keys are multiplied with: when fp32 queries are packed, since that costs nothing a
// score, but after the product where it would round the queries.
inline float query_factor(const Problem& p) {
  return p.softcap > 0 ? p.scale / p.softcap : p.scale;
}

// Up to kLanes keys from j on of one row of the bias.
template <class T>
VELM_INLINE Vec bias_of_row(const T* row, int64_t step, int64_t j, int width) {
  if (step == 1) return width == kLanes ? simd::load(row + j) : simd::load_first(row + j, width);
  if (step == 0) return Vec(simd::to_float(*row));
  float t[kLanes] = {};
  for (int i = 0; i < width; ++i) t[i] = simd::to_float(row[(j + i) * step]);
  return simd::load(t);
}

// x where the mask is true, -inf elsewhere, for up to kLanes keys from j on of one row.
VELM_INLINE Vec masked_by(const char* row, int64_t step, int64_t j, int width, Vec x) {
  float t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = i < width && row[(j + i) * step] ? 1.0f : 0.0f;
  return simd::select(simd::load(t) == simd::zero(), Vec(-kInfinity), x);
}

// e[(j - from) * V * kLanes + lane], the bias of keys [from, to) of the sequence, -inf where mask or bias hide them.
// Returns whether any is not -inf: NaN is a value like others.
template <int V, class T, bool Biased, bool Masked>
bool fill_additive(float* e, const Problem& p, const Panel& panel, int64_t from, int64_t to) {
  const T* bias[kPanel] = {};
  const char* mask[kPanel] = {};
  bool same = true;
  for (int l = 0; l < V * kLanes; ++l) {
    if (Biased) bias[l] = reinterpret_cast<const T*>(p.bias.row(panel.b, panel.head[l], panel.query[l]));
    if (Masked) mask[l] = p.mask.row(panel.b, panel.head[l], panel.query[l]);
    same = same && bias[l] == bias[0] && mask[l] == mask[0];
  }
  const int64_t bias_step = p.bias.stride[3], mask_step = p.mask.stride[3];
  simd::VecMask visible(false);
  const auto look_at = [&](Vec x) VELM_INLINE_LAMBDA { visible = visible || x != Vec(-kInfinity); };
  constexpr int kWidth = V * kLanes;
  const auto row = [&](int l, int64_t j, int width) VELM_INLINE_LAMBDA {
    Vec x = simd::zero();
    if constexpr (Biased) x = bias_of_row(bias[l], bias_step, j, width);
    if constexpr (Masked) x = masked_by(mask[l], mask_step, j, width, x);
    return x;
  };
  for (int64_t j = from; j < to; j += kLanes) {
    const int width = static_cast<int>(std::min<int64_t>(to - j, kLanes));
    float* out = e + (j - from) * kWidth;
    if (same) {
      float t[kLanes];
      simd::store(t, row(0, j, width));
      for (int i = 0; i < width; ++i) {
        const Vec x(t[i]);
        look_at(x);
        for (int v = 0; v < V; ++v) simd::store(out + i * kWidth + v * kLanes, x);
      }
      continue;
    }
    for (int v = 0; v < V; ++v) {
      Vec block[kLanes];
      if (!Masked && width == kLanes && bias_step == 1) {
        simd::unroll<kLanes>([&](auto l) VELM_INLINE_LAMBDA { block[l] = simd::load(bias[v * kLanes + l] + j); });
        simd::transpose(block);
        simd::unroll<kLanes>([&](auto i) VELM_INLINE_LAMBDA {
          look_at(block[i]);
          simd::store(out + i * kWidth + v * kLanes, block[i]);
        });
        continue;
      }
      for (int l = 0; l < kLanes; ++l) block[l] = row(v * kLanes + l, j, width);
      simd::transpose(block);
      for (int i = 0; i < width; ++i) {
        look_at(block[i]);
        simd::store(out + i * kWidth + v * kLanes, block[i]);
      }
    }
  }
  return simd::stdx::any_of(visible);
}

template <int V>
bool additive_tile(float* e, const Problem& p, const Panel& panel, int64_t from, int64_t to) {
  if (!p.bias) return fill_additive<V, float, false, true>(e, p, panel, from, to);
  return with_type(p.bias.dtype, [&](auto tag) {
    using T = decltype(tag);
    return p.mask ? fill_additive<V, T, true, true>(e, p, panel, from, to)
                  : fill_additive<V, T, true, false>(e, p, panel, from, to);
  });
}

// Scratch of a worker for score tiles of up to `keys` keys.
struct ScoreScratch {
  ScoreScratch(simd::Scratch& scratch, const Problem& p, int64_t keys, bool backward) {
    if (p.mask || p.bias) additive = scratch.take(keys * kPanel);
    if (backward && p.softcap > 0) tanh = scratch.take(keys * kPanel);
  }
  float* additive = nullptr;
  float* tanh = nullptr;  // of the capped scores, for the gradient
};

// The biases of a panel's keys, one after the other, from those that pack_grid left.
template <int V>
class OnGrid {
 public:
  OnGrid(const Problem& p, const float* grid, int64_t first)
      : columns_(grid + p.grid_height * kWidth),
        end_(columns_ + p.grid_width * kWidth),
        row_(grid + first / p.grid_width * kWidth),
        column_(columns_ + first % p.grid_width * kWidth) {}
  Vec operator()(int v) const { return simd::load(row_ + v * kLanes) + simd::load(column_ + v * kLanes); }
  VELM_INLINE void next() {
    column_ += kWidth;
    if (column_ != end_) return;
    column_ = columns_;
    row_ += kWidth;
  }

 private:
  static constexpr int kWidth = V * kLanes;
  const float *columns_, *end_, *row_, *column_;
};

// Adds ds[i * V * kLanes + lane], keys first + i, to the gradients of the biases of the grid, which lie as pack_grid
// leaves those.
template <int V>
void add_grid_gradient(float* grad, const Problem& p, const float* ds, int64_t first, int64_t n) {
  constexpr int kWidth = V * kLanes;
  float *row = grad + first / p.grid_width * kWidth, *columns = grad + p.grid_height * kWidth;
  int64_t column = first % p.grid_width;
  for (int64_t i = 0; i < n; column = 0, row += kWidth) {
    const int64_t end = std::min(n, i + p.grid_width - column);
    Vec sum[V];
    simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA { sum[v] = simd::zero(); });
    for (float* to = columns + column * kWidth; i < end; ++i, to += kWidth) {
      simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
        const Vec x = simd::load(ds + i * kWidth + v * kLanes);
        sum[v] += x;
        simd::store(to + v * kLanes, simd::load(to + v * kLanes) + x);
      });
    }
    simd::unroll<V>([&](auto v)
                        VELM_INLINE_LAMBDA { simd::store(row + v * kLanes, simd::load(row + v * kLanes) + sum[v]); });
  }
}

// Products s[(j - from) * V * kLanes + lane] of the panel's queries with keys [from, to) relative to the block, times
// query_factor.
template <int V, class Format>
void multiply_queries(float* s, const Problem& p, const KeyBlockOf<Format>& block, int64_t from, int64_t to,
                      const typename Format::Word* qt, int64_t ldq) {
  constexpr auto kStart = Format::kDepth == 1 ? simd::Start::zero : simd::Start::zero_scale_product;
  float factor[V * kLanes];
  std::fill_n(factor, V * kLanes, query_factor(p));
  simd::product<V, false, kStart>(s, V * kLanes, to - from, block.k + from * block.ldk, block.ldk,
                                  words_of<Format>(p.head_dim), qt, ldq, factor);
}

// A score with its bias or mask, which may be -inf beside any score.
VELM_INLINE Vec add_to_score(Vec score, Vec additive) {
  return simd::select(additive == Vec(-kInfinity), Vec(-kInfinity), score + additive);
}

// Whether products of keys [from, to) of the block become scores by adding `grid` and `additive` to them alone, if they
// are given.
template <class Format>
bool only_adds(const Problem& p, const Panel& panel, const KeyBlockOf<Format>& block, int64_t from, int64_t to) {
  return p.softcap <= 0 && !block.holes && panel.sees_all(block.first + from, block.first + to);
}

// Products s[(j - from) * V * kLanes + lane] for keys [from, to) relative to the block become scores, -inf where
// masked. `grid` is what pack_grid leaves, or null.
template <int V, class Format>
void products_to_scores(float* s, const Problem& p, Panel& panel, const KeyBlockOf<Format>& block, int64_t from,
                        int64_t to, const float* grid, const float* additive, float* tanh) {
  constexpr int kWidth = V * kLanes;
  const int64_t n = to - from;
  if (grid && p.softcap <= 0) {
    OnGrid<V> bias(p, grid, block.first + from);
    for (int64_t i = 0; i < n; ++i, bias.next()) {
      simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
        float* at = s + i * kWidth + v * kLanes;
        simd::store(at, simd::load(at) + bias(v));
      });
    }
  }
  if (only_adds(p, panel, block, from, to)) {
    for (int64_t at = 0; additive && at < n * kWidth; at += kLanes)
      simd::store(s + at, add_to_score(simd::load(s + at), simd::load(additive + at)));
    return;
  }
  const bool bounded = !panel.sees_all(block.first + from, block.first + to);
  Vec lo[V], hi[V];
  if (bounded) {
    panel.set_relative(block.first);
    for (int v = 0; v < V; ++v) {
      lo[v] = simd::load(panel.relative_lo + v * kLanes);
      hi[v] = simd::load(panel.relative_hi + v * kLanes);
    }
  }
  std::optional<OnGrid<V>> bias;
  if (grid && p.softcap > 0) bias.emplace(p, grid, block.first + from);
  for (int64_t i = 0; i < n; ++i) {
    const bool hole = block.holes && !block.holes[from + i];
    const Vec j(static_cast<float>(from + i));
    for (int v = 0; v < V; ++v) {
      const int64_t at = i * kWidth + v * kLanes;
      Vec x = simd::load(s + at);
      if (p.softcap > 0) {
        const Vec t = simd::tanh(x);
        if (tanh) simd::store(tanh + at, t);
        x = t * p.softcap;
        if (bias) x += (*bias)(v);
      }
      if (additive) x = add_to_score(x, simd::load(additive + at));
      if (bounded) x = simd::select((j >= lo[v]) && (j < hi[v]), x, Vec(-kInfinity));
      if (hole) x = Vec(-kInfinity);
      simd::store(s + at, x);
    }
    if (bias) bias->next();
  }
}

// What to take off the scores of a row, whose exponentials are its weights then: its logsumexp; +inf, which makes every
// weight 0, for a row that sees nothing; NaN for one whose weights are all NaN, those with a score of +inf or only of
// -inf.
inline float lse_for_weights(const Problem& p, const Panel& panel, int l, const float* logsumexp) {
  const float lse = logsumexp[p.row_index(panel.b, panel.head[l], panel.query[l])];
  if (lse == -kInfinity) return p.sees_any(panel.b, panel.head[l], panel.query[l]) ? kNaN : kInfinity;
  return lse == kInfinity ? kNaN : lse;
}

// Which lanes of a panel see which keys of [from, to) relative to the block. Scores alone do not tell: one may be -inf
// of itself, and a weight 0. Asked only where something is infinite or NaN, and what a row sees has to come out while
// what it does not see must not.
template <int V, class Format>
class Sight {
 public:
  // sees(l) says whether lane l sees anything at all; additive is that of the keys from `from` on, or null.
  template <class Sees>
  Sight(const Panel& panel, const KeyBlockOf<Format>& block, int64_t from, const float* additive, const Sees& sees)
      : holes_(block.holes ? block.holes + from : nullptr), additive_(additive) {
    for (int l = 0; l < V * kLanes; ++l) {
      const bool any = l < panel.count && sees(l);
      lo_[l] = any ? panel.range[l].lo - block.first - from : 0;
      hi_[l] = any ? panel.range[l].hi - block.first - from : 0;
    }
  }
  bool operator()(int64_t i, int64_t l) const {
    return i >= lo_[l] && i < hi_[l] && !(holes_ && !holes_[i]) &&
           !(additive_ && additive_[i * V * kLanes + l] == -kInfinity);
  }
  simd::VecMask lanes(int64_t i, int v) const {
    float t[kLanes];
    for (int l = 0; l < kLanes; ++l) t[l] = (*this)(i, v * kLanes + l) ? 1.0f : 0.0f;
    return simd::load(t) != simd::zero();
  }

 private:
  const bool* holes_;
  const float* additive_;
  int64_t lo_[V * kLanes], hi_[V * kLanes];
};

// Scores s[(j - from) * V * kLanes + lane] for keys [from, to) relative to the block, -inf where masked. Returns false,
// with s undefined, where mask and bias hide every key from every row.
template <int V, class Format>
bool score_tile(float* s, const Problem& p, Panel& panel, const KeyBlockOf<Format>& block, int64_t from, int64_t to,
                const typename Format::Word* qt, int64_t ldq, const float* grid, const ScoreScratch& scratch) {
  if (scratch.additive && !additive_tile<V>(scratch.additive, p, panel, block.first + from, block.first + to))
    return false;
  multiply_queries<V>(s, p, block, from, to, qt, ldq);
  products_to_scores<V>(s, p, panel, block, from, to, grid, scratch.additive, scratch.tanh);
  return true;
}

// Calls f(i, v, keep) for each of n keys from `first` of the sequence and each vector of the panel's rows, where
// keep is the mask of lanes that dropout keeps.
template <int V, class F>
void for_dropout(const Problem& p, const Panel& panel, int64_t first, int64_t n, F&& f) {
  simd::VecUint query[V], head[V];
  for (int v = 0; v < V; ++v) {
    query[v] = simd::VecUint([&](auto l) { return static_cast<uint32_t>(panel.query[v * kLanes + l]); });
    head[v] =
        simd::VecUint([&](auto l) { return static_cast<uint32_t>(panel.b * p.heads + panel.head[v * kLanes + l]); });
  }
  for (int64_t quad = first / 4; quad * 4 < first + n; ++quad) {
    for (int v = 0; v < V; ++v) {
      simd::VecUint word[4] = {query[v], simd::VecUint(static_cast<uint32_t>(quad)), head[v], simd::VecUint(0u)};
      simd::philox(word, p.seed);
      for (int w = 0; w < 4; ++w) {
        const int64_t i = quad * 4 + w - first;
        if (i >= 0 && i < n) f(i, v, simd::at_least(word[w], p.dropout_below));
      }
    }
  }
}

}  // namespace velm::attention
