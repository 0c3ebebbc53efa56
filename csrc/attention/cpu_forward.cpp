// Attention forward: for every panel of queries, one pass over the keys with running softmax
// statistics, everything in the transposed orientation (keys by rows, queries by lanes), so that
// maxima and sums are plain vertical operations.
#include "attention/cpu_forward.h"

#include <cmath>
#include <vector>

#include "attention/cpu_decode.h"
#include "attention/cpu_scores.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm::attention {

namespace {

// Keys in a block: its K and V rows stay in the second-level cache for all panels of an item.
constexpr int64_t kBlock = 96;
// Panels that go over the same blocks together.
constexpr int64_t kPanelsPerItem = 16;

struct Item {
  int64_t b, kv_head, first, rows;
};

// State of one panel between blocks.
struct Running {
  float *qt, *ot;  // [head_dim][width], [value_dim][width]
  alignas(64) float max[kPanel], sum[kPanel];
};

// One block of keys into a panel's state.
template <int V>
void attend(const Problem& p, Panel& panel, const KeyBlock& block, int64_t from, int64_t to, Running& state, float* s,
            const ScoreScratch& scratch) {
  constexpr int kWidth = V * kLanes;
  if (!score_tile<V>(s, p, panel, block, from, to, state.qt, kWidth, scratch)) return;
  const int64_t n = to - from;

  Vec top[V], base[V];
  alignas(64) float alpha[kWidth];
  simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA { top[v] = simd::load(state.max + v * kLanes); });
  for (int64_t i = 0; i < n; ++i) {
    // A NaN may get lost here, but not in the exponentials.
    simd::unroll<V>(
        [&](auto v) VELM_INLINE_LAMBDA { top[v] = simd::maximum(top[v], simd::load(s + i * kWidth + v * kLanes)); });
  }
  Vec sum[V];
  simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
    // A row that has seen nothing yet keeps -inf as its maximum and subtracts 0 instead.
    base[v] = simd::select(top[v] == Vec(-kInfinity), simd::zero(), top[v]);
    const Vec a = simd::exp(simd::load(state.max + v * kLanes) - base[v]);
    simd::store(alpha + v * kLanes, a);
    simd::store(state.max + v * kLanes, top[v]);
    sum[v] = simd::load(state.sum + v * kLanes) * a;
  });
  for (int64_t i = 0; i < n; ++i) {
    simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
      float* at = s + i * kWidth + v * kLanes;
      const Vec e = simd::exp(simd::load(at) - base[v]);
      sum[v] += e;
      simd::store(at, e);
    });
  }
  simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA { simd::store(state.sum + v * kLanes, sum[v]); });

  if (p.dropout) {
    for_dropout<V>(p, panel, block.first + from, n, [&](int64_t i, int v, simd::VecMask keep) {
      float* at = s + i * kWidth + v * kLanes;
      simd::store(at, simd::select(keep, simd::load(at) * p.dropout_scale, simd::zero()));
    });
  }
  const float* values = block.v + from * block.ldv;
  if (block.v_finite) {
    simd::product<V, true, simd::Start::scale>(state.ot, kWidth, p.value_dim, values, block.ldv, n, s, kWidth, alpha);
  } else {
    for (int64_t d = 0; d < p.value_dim; ++d) {
      for (int l = 0; l < kWidth; ++l) state.ot[d * kWidth + l] *= alpha[l];
    }
    product_without_zeros<false>(state.ot, kWidth, p.value_dim, kWidth, values, 1, block.ldv, n, s, kWidth);
  }
}

std::vector<Item> make_items(const Problem& p) {
  std::vector<Item> items;
  int64_t panels = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (!decodes(p, b)) panels += (p.group * p.query_count(b) + kPanel - 1) / kPanel * p.kv_heads;
  }
  // Fewer panels an item where there would be too few items to share out.
  const int64_t per_item = std::clamp<int64_t>(panels / 16, 1, kPanelsPerItem);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (decodes(p, b)) continue;
    const int64_t rows = p.group * p.query_count(b);
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      for (int64_t r = 0; r < rows; r += per_item * kPanel)
        items.push_back({b, h, r, std::min(rows - r, per_item * kPanel)});
    }
  }
  return items;
}

// Whether rows of this tensor can be read where they are: fp32, and close enough together that a block of them
// spreads over the sets of the first-level cache and over few pages.
bool readable_in_place(const Rows& rows) {
  return rows.dtype == Dtype::f32 && rows.row <= 320 && rows.row % 128 != 0;
}

class Worker {
 public:
  Worker(const Problem& p, const Rows& out, float* logsumexp)
      : p_(p), out_(out), logsumexp_(logsumexp), scratch_(memory_, p, kBlock, false) {
    // Masked rows may hold anything, so they are replaced by zeros in a copy.
    in_place_k_ = readable_in_place(p.k);
    in_place_v_ = readable_in_place(p.v) && !p.masked_by_row();
    ldk_ = padded(p.head_dim);
    ldv_ = padded(p.value_dim);
    s_ = memory_.take(kBlock * kPanel);
    for (int64_t i = 0; i < kPanelsPerItem; ++i) {
      states_[i].qt = memory_.take(p.head_dim * kPanel);
      states_[i].ot = memory_.take(p.value_dim * kPanel);
    }
  }

  void run(const Item& item) {
    std::vector<Panel> panels;
    int64_t lo = INT64_MAX, hi = 0;
    for (int64_t r = 0; r < item.rows; r += kPanel) {
      panels.emplace_back(p_, item.b, item.kv_head, item.first + r, item.rows - r);
      Panel& panel = panels.back();
      if (panel.hi > panel.lo) {
        lo = std::min(lo, panel.lo);
        hi = std::max(hi, panel.hi);
      }
      begin(panel, states_[panels.size() - 1]);
    }
    const bool* holes = p_.holes(item.b);
    for (int64_t first = lo / kBlock * kBlock; first < hi; first += kBlock) {
      const int64_t from = std::max(lo, first), to = std::min(hi, first + kBlock);
      if (holes && std::find(holes + from, holes + to, true) == holes + to) continue;
      KeyBlock block;
      block.first = from;
      block.count = to - from;
      block.holes = holes ? holes + from : nullptr;
      bool packed = false;
      for (size_t i = 0; i < panels.size(); ++i) {
        Panel& panel = panels[i];
        const int64_t a = std::max(panel.lo, from), z = std::min(panel.hi, to);
        if (a >= z) continue;
        if (!packed) pack(item, block);
        packed = true;
        if (panel.vectors == 2) {
          attend<2>(p_, panel, block, a - from, z - from, states_[i], s_, scratch_);
        } else {
          attend<1>(p_, panel, block, a - from, z - from, states_[i], s_, scratch_);
        }
      }
    }
    for (size_t i = 0; i < panels.size(); ++i) finish(panels[i], states_[i]);
  }

 private:
  void begin(const Panel& panel, Running& state) {
    const int width = panel.vectors * kLanes;
    pack_transposed(state.qt, width, p_, panel, p_.q, p_.head_dim, query_factor(p_), [](int) { return true; });
    std::fill_n(state.ot, p_.value_dim * width, 0.0f);
    std::fill_n(state.max, kPanel, -kInfinity);
    std::fill_n(state.sum, kPanel, 0.0f);
  }

  void pack(const Item& item, KeyBlock& block) {
    const int64_t at = p_.first_key(item.b) + block.first, b = p_.varlen ? 0 : item.b;
    if (in_place_k_ && !block.holes) {
      block.k = reinterpret_cast<const float*>(p_.k.at(b, item.kv_head, at));
      block.ldk = p_.k.row;
    } else {
      if (!k_) k_ = memory_.take(kBlock * ldk_);
      block.k = k_;
      block.ldk = ldk_;
      pack_key_rows(k_, ldk_, p_, p_.k, item.b, item.kv_head, block.first, block.count, p_.head_dim, block.holes);
    }
    if (in_place_v_ && !block.holes) {
      block.v = reinterpret_cast<const float*>(p_.v.at(b, item.kv_head, at));
      block.ldv = p_.v.row;
    } else {
      if (!v_) v_ = memory_.take(kBlock * ldv_);
      block.v = v_;
      block.ldv = ldv_;
      const bool finite =
          pack_key_rows(v_, ldv_, p_, p_.v, item.b, item.kv_head, block.first, block.count, p_.value_dim, block.holes);
      block.v_finite = finite || !p_.masked_by_row();
    }
  }

  void finish(const Panel& panel, const Running& state) {
    alignas(64) float inverse[kPanel];
    for (int l = 0; l < panel.vectors * kLanes; ++l) {
      const bool empty = state.sum[l] == 0.0f;
      inverse[l] = empty ? 0.0f : 1.0f / state.sum[l];
      if (l < panel.count) {
        logsumexp_[p_.row_index(panel.b, panel.head[l], panel.query[l])] =
            empty ? -kInfinity : state.max[l] + std::log(state.sum[l]);
      }
    }
    unpack_transposed(out_, p_, panel, state.ot, panel.vectors * kLanes, p_.value_dim, inverse);
  }

  const Problem& p_;
  const Rows& out_;
  float* logsumexp_;
  simd::FlushSubnormals flush_;
  simd::Scratch memory_;
  ScoreScratch scratch_;
  bool in_place_k_, in_place_v_;
  int64_t ldk_, ldv_;
  float *s_, *k_ = nullptr, *v_ = nullptr;
  Running states_[kPanelsPerItem];
};

}  // namespace

void forward(const Problem& p, const Rows& out, float* logsumexp) {
  decode(p, out, logsumexp);
  const std::vector<Item> items = make_items(p);
  simd::parallel_workers(
      static_cast<int64_t>(items.size()), [&] { return Worker(p, out, logsumexp); },
      [&](Worker& worker, int64_t i) { worker.run(items[i]); });
}

}  // namespace velm::attention
