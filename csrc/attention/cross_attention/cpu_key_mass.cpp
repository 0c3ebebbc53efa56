// The attention every key receives, by a second pass over the scores once logsumexp is known: where the weights of
// the first pass were too many to be kept, or computed by decode.
#include <cmath>

#include "attention/cross_attention/cpu_forward.h"
#include "attention/cross_attention/cpu_scores.h"
#include "simd/parallel.h"

namespace velm::attention {

namespace {

constexpr int64_t kBlock = 96;

struct Item {
  int64_t b, kv_head, first;
};

class Worker {
 public:
  Worker(const Problem& p, const float* logsumexp, float* key_mass)
      : p_(p), logsumexp_(logsumexp), key_mass_(key_mass), scratch_(memory_, p, kBlock, false) {
    ldk_ = padded(p.head_dim);
    k_ = memory_.take(kBlock * ldk_);
    qt_ = memory_.take(p.head_dim * kPanel);
    s_ = memory_.take(kBlock * kPanel);
    sums_ = memory_.take(kBlock * kLanes);
  }

  void run(const Item& item) {
    KeyBlock block;
    block.first = item.first;
    block.count = std::min(kBlock, p_.key_count(item.b) - item.first);
    block.k = k_;
    block.ldk = ldk_;
    const bool* holes = p_.holes(item.b);
    block.holes = holes ? holes + item.first : nullptr;
    pack_key_rows(k_, ldk_, p_, p_.k, item.b, item.kv_head, item.first, block.count, p_.head_dim, block.holes);
    const int64_t queries = p_.query_count(item.b);
    for (int64_t g = 0; g < p_.group; ++g) {
      std::fill_n(sums_, kBlock * kLanes, 0.0f);
      // Panels of one head at a time: what keys receive is counted by head.
      for (int64_t i = 0; i < queries; i += kPanel) {
        Panel panel(p_, item.b, item.kv_head, g * queries + i, queries - i);
        const int64_t from = std::max(panel.lo, block.first) - block.first;
        const int64_t to = std::min(panel.hi, block.first + block.count) - block.first;
        if (from >= to) continue;
        if (panel.vectors == 2) {
          add<2>(panel, block, from, to);
        } else {
          add<1>(panel, block, from, to);
        }
      }
      for (int64_t j = 0; j < block.count; ++j) {
        key_mass_[p_.mass_index(item.b, item.kv_head * p_.group + g, block.first + j)] =
            simd::sum_lanes(simd::load(sums_ + j * kLanes));
      }
    }
  }

 private:
  template <int V>
  void add(Panel& panel, const KeyBlock& block, int64_t from, int64_t to) {
    constexpr int kWidth = V * kLanes;
    pack_transposed(qt_, kWidth, p_, panel, p_.q, p_.head_dim, query_factor(p_), [](int) { return true; });
    if (!score_tile<V>(s_, p_, panel, block, from, to, qt_, kWidth, scratch_)) return;
    alignas(64) float lse[kPanel];
    bool special = false;
    for (int l = 0; l < kPanel; ++l) {
      lse[l] = l < panel.count ? lse_for_weights(p_, panel, l, logsumexp_) : kInfinity;
      special = special || lse[l] != lse[l];
    }
    const Sight<V, simd::Words32> sight(panel, block, from, scratch_.additive,
                                        [&](int l) { return lse[l] != kInfinity; });
    for (int64_t i = 0; i < to - from; ++i) {
      float* sum = sums_ + (from + i) * kLanes;
      Vec total = simd::load(sum);
      for (int v = 0; v < V; ++v) {
        const Vec score = simd::load(s_ + i * kWidth + v * kLanes), base = simd::load(lse + v * kLanes);
        const Vec weight = simd::exp(score - base);
        // A score of NaN in a lane of no row is none.
        total += special || simd::stdx::any_of(weight != weight) ? simd::select(sight.lanes(i, v), weight, simd::zero())
                                                                 : weight;
      }
      simd::store(sum, total);
    }
  }

  const Problem& p_;
  const float* logsumexp_;
  float* key_mass_;
  simd::FlushSubnormals flush_;
  simd::Scratch memory_;
  ScoreScratch scratch_;
  int64_t ldk_;
  float *k_, *qt_, *s_, *sums_;
};

}  // namespace

void sum_key_mass(const Problem& p, const float* logsumexp, float* key_mass,
                  const std::function<bool(int64_t)>& wanted) {
  std::vector<Item> items;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; wanted(b) && h < p.kv_heads; ++h) {
      for (int64_t j = 0; j < p.key_count(b); j += kBlock) items.push_back({b, h, j});
    }
  }
  simd::parallel_workers(
      static_cast<int64_t>(items.size()), [&] { return Worker(p, logsumexp, key_mass); },
      [&](Worker& worker, int64_t i) { worker.run(items[i]); });
}

}  // namespace velm::attention
