// The attention every key receives, by a second pass over the scores once logsumexp is known: where the weights of
// the first pass were too many to be kept, or computed by decode.
#include <cmath>

#include "attention/cross_attention/cpu_forward.h"
#include "attention/cross_attention/cpu_scores.h"
#include "simd/parallel.h"

namespace velm::attention {

namespace {

constexpr int64_t kBlock = 96;
// The last place of a logsumexp of this size is 2^-11. A bias makes such rows, as do masks of large negative numbers.
constexpr float kFarRow = 4096.0f;

bool is_far(float logsumexp) {
  return std::abs(logsumexp) >= kFarRow && std::abs(logsumexp) < kInfinity;
}

struct Item {
  int64_t b, kv_head, first;
};

class Worker {
 public:
  // `inverse` is one over the sum of what exp(score - logsumexp) gives for each row, or null where that is 1.
  Worker(const Problem& p, const float* logsumexp, const float* inverse, float* key_mass)
      : p_(p), logsumexp_(logsumexp), inverse_(inverse), key_mass_(key_mass), scratch_(memory_, p, kBlock, false) {
    ldk_ = padded(p.head_dim);
    k_ = memory_.take(kBlock * ldk_);
    qt_ = memory_.take(p.head_dim * kPanel);
    s_ = memory_.take(kBlock * kPanel);
    sums_ = memory_.take(kBlock * kLanes);
    if (p.on_grid) grid_ = memory_.take(p.grid() * kPanel);
  }

  void run(const Item& item) {
    const KeyBlock block = pack_keys(item);
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
          add<2>(panel, block, from, to, nullptr);
        } else {
          add<1>(panel, block, from, to, nullptr);
        }
      }
      for (int64_t j = 0; j < block.count; ++j) {
        key_mass_[p_.mass_index(item.b, item.kv_head * p_.group + g, block.first + j)] =
            simd::sum_lanes(simd::load(sums_ + j * kLanes));
      }
    }
  }

  // For the rows of a panel whose first one is item.first: into `inverse`, where one of them is far.
  void sum_rows(const Item& item, float* inverse) {
    Panel panel(p_, item.b, item.kv_head, item.first, p_.query_count(item.b) * p_.group - item.first);
    const auto index = [&](int l) { return p_.row_index(panel.b, panel.head[l], panel.query[l]); };
    bool any = false;
    for (int l = 0; l < panel.count; ++l) any = any || is_far(logsumexp_[index(l)]);
    if (!any) return;
    alignas(64) float sums[kPanel] = {};
    for (int64_t j = panel.lo / kBlock * kBlock; j < panel.hi; j += kBlock) {
      const KeyBlock block = pack_keys({item.b, item.kv_head, j});
      const int64_t from = std::max(panel.lo, j) - j, to = std::min(panel.hi, j + block.count) - j;
      if (from >= to) continue;
      if (panel.vectors == 2) {
        add<2>(panel, block, from, to, sums);
      } else {
        add<1>(panel, block, from, to, sums);
      }
    }
    for (int l = 0; l < panel.count; ++l)
      if (is_far(logsumexp_[index(l)])) inverse[index(l)] = 1.0f / sums[l];
  }

 private:
  KeyBlock pack_keys(const Item& item) {
    KeyBlock block;
    block.first = item.first;
    block.count = std::min(kBlock, p_.key_count(item.b) - item.first);
    block.k = k_;
    block.ldk = ldk_;
    const bool* holes = p_.holes(item.b);
    block.holes = holes ? holes + item.first : nullptr;
    pack_key_rows(k_, ldk_, p_, p_.k, item.b, item.kv_head, item.first, block.count, p_.head_dim, block.holes);
    return block;
  }

  // The weights of a tile: to what the keys receive, or to the sums of the rows where `rows` is given.
  template <int V>
  void add(Panel& panel, const KeyBlock& block, int64_t from, int64_t to, float* rows) {
    constexpr int kWidth = V * kLanes;
    pack_transposed(qt_, kWidth, p_, panel, p_.q, p_.head_dim, query_factor(p_), [](int) { return true; });
    if (p_.on_grid) pack_grid(grid_, p_, panel, [](int) { return true; });
    if (!score_tile<V>(s_, p_, panel, block, from, to, qt_, kWidth, grid_, scratch_)) return;
    alignas(64) float lse[kPanel], inverse[kPanel];
    const bool scales = inverse_ && !rows;
    bool special = false;
    for (int l = 0; l < kPanel; ++l) {
      lse[l] = l < panel.count ? lse_for_weights(p_, panel, l, logsumexp_) : kInfinity;
      special = special || lse[l] != lse[l];
      inverse[l] = scales && l < panel.count ? inverse_[p_.row_index(panel.b, panel.head[l], panel.query[l])] : 1.0f;
    }
    const Sight<V, simd::Words32> sight(panel, block, from, scratch_.additive,
                                        [&](int l) { return lse[l] != kInfinity; });
    for (int64_t i = 0; i < to - from; ++i) {
      float* sum = sums_ + (from + i) * kLanes;
      Vec total = simd::load(sum);
      for (int v = 0; v < V; ++v) {
        const Vec score = simd::load(s_ + i * kWidth + v * kLanes), base = simd::load(lse + v * kLanes);
        Vec weight = simd::exp(score - base);
        if (scales) weight *= simd::load(inverse + v * kLanes);
        // A score of NaN in a lane of no row is none.
        if (special || simd::stdx::any_of(weight != weight))
          weight = simd::select(sight.lanes(i, v), weight, simd::zero());
        total += weight;
        if (rows) simd::store(rows + v * kLanes, simd::load(rows + v * kLanes) + weight);
      }
      simd::store(sum, total);
    }
  }

  const Problem& p_;
  const float* logsumexp_;
  const float* inverse_;
  float* key_mass_;
  simd::FlushSubnormals flush_;
  simd::Scratch memory_;
  ScoreScratch scratch_;
  int64_t ldk_;
  float *k_, *qt_, *s_, *sums_, *grid_ = nullptr;
};

}  // namespace

std::vector<float> inverse_sums(const Problem& p, const float* logsumexp, const std::function<bool(int64_t)>& wanted) {
  if (!p.bias && !p.on_grid) return {};
  std::vector<Item> items;
  bool any = false;
  int64_t rows = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t i = 0; i < p.query_count(b); ++i) {
        const int64_t at = p.row_index(b, h, i);
        rows = std::max(rows, at + 1);
        any = any || (wanted(b) && is_far(logsumexp[at]));
      }
    for (int64_t h = 0; wanted(b) && h < p.kv_heads; ++h)
      for (int64_t i = 0; i < p.query_count(b) * p.group; i += kPanel) items.push_back({b, h, i});
  }
  if (!any) return {};
  std::vector<float> inverse(rows, 1.0f);
  simd::parallel_workers(
      static_cast<int64_t>(items.size()), [&] { return Worker(p, logsumexp, nullptr, nullptr); },
      [&](Worker& worker, int64_t i) { worker.sum_rows(items[i], inverse.data()); });
  return inverse;
}

void sum_key_mass(const Problem& p, const float* logsumexp, float* key_mass,
                  const std::function<bool(int64_t)>& wanted) {
  std::vector<Item> items;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; wanted(b) && h < p.kv_heads; ++h) {
      for (int64_t j = 0; j < p.key_count(b); j += kBlock) items.push_back({b, h, j});
    }
  }
  const std::vector<float> inverse = inverse_sums(p, logsumexp, wanted);
  simd::parallel_workers(
      static_cast<int64_t>(items.size()),
      [&] { return Worker(p, logsumexp, inverse.empty() ? nullptr : inverse.data(), key_mass); },
      [&](Worker& worker, int64_t i) { worker.run(items[i]); });
}

}  // namespace velm::attention
