// Tiles of scores, keys by rows and query rows by lanes: the products, softcap, bias and masks.
//
// Scores stay in natural units: a row with one key has logsumexp equal to its score bit for bit, and thus weight 1.
// Powers of two would save two operations an element and lose that to the rounding of logsumexp.
#pragma once

#include "attention/cpu_panel.h"
#include "attention/cpu_philox.h"
#include "simd/math.h"
#include "simd/scratch.h"

namespace velm::attention {

using simd::Vec;

// What a query is multiplied with when it is packed.
inline float query_factor(const Problem& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale; }

// Bias of kLanes keys of one row, -inf where mask or bias hide them.
VELM_INLINE Vec additive_of_row(const Problem& p, const char* bias, const char* mask, int64_t j, int wide) {
  Vec x = simd::zero();
  if (bias) {
    const int64_t step = p.bias.stride[3];
    x = with_type(p.bias.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      const T* from = reinterpret_cast<const T*>(bias) + j * step;
      if (step == 1) return simd::load_first(from, wide);
      if (step == 0) return Vec(simd::to_float(*from));
      float t[kLanes] = {};
      for (int i = 0; i < wide; ++i) t[i] = simd::to_float(from[i * step]);
      return simd::load(t);
    });
  }
  if (mask) {
    const int64_t step = p.mask.stride[3];
    const char* from = mask + j * step;
    float t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = i < wide && from[i * step] ? 1.0f : 0.0f;
    x = simd::select(simd::load(t) == simd::zero(), Vec(-kInfinity), x);
  }
  return x;
}

// e[(j - from) * V * kLanes + lane] for keys [from, to) of the sequence. Returns whether any is not -inf.
template <int V>
bool additive_tile(float* e, const Problem& p, const Panel& panel, int64_t from, int64_t to) {
  const char *bias[kPanel], *mask[kPanel];
  bool same = true;
  for (int l = 0; l < V * kLanes; ++l) {
    bias[l] = p.bias ? p.bias.row(panel.b, panel.head[l], panel.query[l]) : nullptr;
    mask[l] = p.mask ? p.mask.row(panel.b, panel.head[l], panel.query[l]) : nullptr;
    same = same && bias[l] == bias[0] && mask[l] == mask[0];
  }
  Vec highest(-kInfinity);
  constexpr int kWidth = V * kLanes;
  for (int64_t j = from; j < to; j += kLanes) {
    const int wide = static_cast<int>(std::min<int64_t>(to - j, kLanes));
    float* out = e + (j - from) * kWidth;
    if (same) {
      float t[kLanes];
      simd::store(t, additive_of_row(p, bias[0], mask[0], j, wide));
      for (int i = 0; i < wide; ++i) {
        const Vec x(t[i]);
        highest = simd::maximum(highest, x);
        for (int v = 0; v < V; ++v) simd::store(out + i * kWidth + v * kLanes, x);
      }
      continue;
    }
    for (int v = 0; v < V; ++v) {
      Vec block[kLanes];
      for (int l = 0; l < kLanes; ++l)
        block[l] = additive_of_row(p, bias[v * kLanes + l], mask[v * kLanes + l], j, wide);
      simd::transpose(block);
      for (int i = 0; i < wide; ++i) {
        highest = simd::maximum(highest, block[i]);
        simd::store(out + i * kWidth + v * kLanes, block[i]);
      }
    }
  }
  return simd::max_lanes(highest) > -kInfinity;
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

// s[(j - from) * V * kLanes + lane] for keys [from, to) relative to the block, -inf where masked. Returns false,
// with s undefined, where mask and bias hide every key from every row.
template <int V>
bool score_tile(float* s, const Problem& p, Panel& panel, const KeyBlock& block, int64_t from, int64_t to,
                const float* qt, int64_t ldq, const ScoreScratch& scratch) {
  constexpr int kWidth = V * kLanes;
  const int64_t n = to - from;
  if (scratch.additive && !additive_tile<V>(scratch.additive, p, panel, block.first + from, block.first + to))
    return false;
  simd::product<V, false, simd::Start::zero>(s, kWidth, n, block.k + from * block.ldk, block.ldk, p.head_dim, qt, ldq);

  const bool bounded = !panel.sees_all(block.first + from, block.first + to);
  if (!bounded && !scratch.additive && p.softcap <= 0 && !block.holes) return true;
  Vec lo[V], hi[V];
  if (bounded) {
    panel.set_relative(block.first);
    for (int v = 0; v < V; ++v) {
      lo[v] = simd::load(panel.relative_lo + v * kLanes);
      hi[v] = simd::load(panel.relative_hi + v * kLanes);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool hole = block.holes && !block.holes[from + i];
    const Vec j(static_cast<float>(from + i));
    for (int v = 0; v < V; ++v) {
      const int64_t at = i * kWidth + v * kLanes;
      Vec x = simd::load(s + at);
      if (p.softcap > 0) {
        const Vec t = simd::tanh(x);
        if (scratch.tanh) simd::store(scratch.tanh + at, t);
        x = t * p.softcap;
      }
      if (scratch.additive) {
        const Vec e = simd::load(scratch.additive + at);
        x = simd::select(e == Vec(-kInfinity), Vec(-kInfinity), x + e);
      }
      if (bounded) x = simd::select((j >= lo[v]) && (j < hi[v]), x, Vec(-kInfinity));
      if (hole) x = Vec(-kInfinity);
      simd::store(s + at, x);
    }
  }
  return true;
}

// Calls f(i, v, keep) for each of n keys from `first` of the sequence and each vector of the panel's rows, where
// keep is the mask of lanes that dropout keeps.
template <int V, class F>
void for_dropout(const Problem& p, const Panel& panel, int64_t first, int64_t n, F&& f) {
  simd::VecUint query[V], head[V];
  for (int v = 0; v < V; ++v) {
    query[v] = simd::VecUint([&](auto l) { return static_cast<uint32_t>(panel.query[v * kLanes + l]); });
    head[v] = simd::VecUint(
        [&](auto l) { return static_cast<uint32_t>(panel.b * p.heads + panel.head[v * kLanes + l]); });
  }
  for (int64_t quad = first / 4; quad * 4 < first + n; ++quad) {
    for (int v = 0; v < V; ++v) {
      simd::VecUint word[4] = {query[v], simd::VecUint(static_cast<uint32_t>(quad)), head[v], simd::VecUint(0u)};
      philox(word, p.seed);
      for (int w = 0; w < 4; ++w) {
        const int64_t i = quad * 4 + w - first;
        if (i >= 0 && i < n) f(i, v, at_least(word[w], p.dropout_below));
      }
    }
  }
}

}  // namespace velm::attention
