// What the pairs of a job of the backward pass have in common: where a bias or a mask is the same for all of them, its
// tiles are transposed once and not for every pair, and the gradients of a bias are summed over the pairs before they
// are transposed back.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/cross_attention/cpu_backward_plan.h"
#include "attention/cross_attention/cpu_bias_gradient.h"
#include "attention/cross_attention/cpu_scores.h"

namespace velm::attention {

template <class Format>
class SharedTiles {
 public:
  // `additive` is memory for what is added to the products of one tile, null where nothing is.
  SharedTiles(const Problem& p, const Gradients& g, const Plan& plan, simd::Scratch& memory, float* additive)
      : p_(p), g_(g), plan_(plan), memory_(memory), additive_(additive) {}

  // Decides which tiles the pairs of a job share.
  void begin(const Job& job) {
    shared_ = sums_ = nullptr;
    if (job.pairs.size() < 2) return;
    const int64_t chunks = (p_.keys + kChunk - 1) / kChunk, panels = panel_count(p_, job.pairs[0].b);
    first_chunk_ = job.split * chunks / plan_.splits;
    const int64_t tiles = ((job.split + 1) * chunks / plan_.splits - first_chunk_) * panels;
    if (tiles * kChunk * kPanel > kTileFloats) return;
    tiles_.assign(static_cast<size_t>(tiles), Tile{});
    bool batches = false, heads = false;
    for (const Pair& pair : job.pairs) {
      batches = batches || pair.b != job.pairs[0].b;
      heads = heads || pair.kv_head != job.pairs[0].kv_head;
    }
    const auto differs = [&](const Scores& x) {
      return x && ((batches && x.stride[0] != 0) || (heads && x.stride[1] != 0));
    };
    if (additive_ && !differs(p_.bias) && !differs(p_.mask)) {
      if (!shared_memory_) shared_memory_ = memory_.take(kTileFloats);
      shared_ = shared_memory_;
    }
    if (job.grad_bias && g_.bias_size[3] > 1) {
      if (!sums_memory_) sums_memory_ = memory_.take(kTileFloats);
      sums_ = sums_memory_;
    }
  }

  // The number of the tile of a chunk of keys and one of `panels` panels.
  int64_t number(int64_t chunk, int64_t panels, int64_t panel) const { return (chunk - first_chunk_) * panels + panel; }

  // What is added to the products of keys [from, to) of the block, if anything; false where it hides them all.
  template <int V>
  bool find_additive(const float*& additive, const Panel& panel, const KeyBlockOf<Format>& block, int64_t from,
                     int64_t to, int64_t tile) {
    additive = additive_;
    if (!additive) return true;
    if (!shared_) return additive_tile<V>(additive_, p_, panel, block.first + from, block.first + to);
    float* values = shared_ + tile * kChunk * kPanel;
    if (!tiles_[tile].known)
      tiles_[tile].visible = additive_tile<V>(values, p_, panel, block.first, block.first + block.count);
    tiles_[tile].known = true;
    additive = values + from * V * kLanes;
    return tiles_[tile].visible;
  }

  // Whether the gradients of scores are summed here, and not added to that of the bias at once.
  bool sums() const { return sums_ != nullptr; }

  // The gradients of scores of keys [from, from + n) of the block go into the sum of their tile.
  template <int V>
  void add(int64_t tile, int64_t from, int64_t n, const float* ds) {
    float* sum = sums_ + tile * kChunk * kPanel;
    if (!tiles_[tile].summed) std::fill_n(sum, kChunk * kPanel, 0.0f);
    tiles_[tile].summed = true;
    sum += from * V * kLanes;
    for (int64_t at = 0; at < n * V * kLanes; at += kLanes)
      simd::store(sum + at, simd::load(sum + at) + simd::load(ds + at));
  }

  // The sums, after the last pair of the job, whose panels these are.
  void add_to_bias_gradient(const Job& job, const std::vector<Panel>& panels) const {
    if (!sums_) return;
    for (size_t i = 0; i < tiles_.size(); ++i) {
      if (!tiles_[i].summed) continue;
      const Panel& panel = panels[i % panels.size()];
      const int64_t first = (first_chunk_ + static_cast<int64_t>(i / panels.size())) * kChunk;
      const int64_t count = std::min(kChunk, p_.keys - first);
      const float* sum = sums_ + static_cast<int64_t>(i) * kChunk * kPanel;
      if (panel.vectors == 2)
        add_bias_gradient<2>(job.grad_bias, g_.bias_size, panel, sum, first, count);
      else
        add_bias_gradient<1>(job.grad_bias, g_.bias_size, panel, sum, first, count);
    }
  }

 private:
  // Floats of tiles that a job may keep from one of its pairs to the next.
  static constexpr int64_t kTileFloats = 1 << 18;

  struct Tile {
    bool known = false, visible = true, summed = false;
  };

  const Problem& p_;
  const Gradients& g_;
  const Plan& plan_;
  simd::Scratch& memory_;
  float* additive_;
  // What is added to products, and the sums of the gradients of scores; null where pairs do not share them.
  float *shared_memory_ = nullptr, *sums_memory_ = nullptr, *shared_ = nullptr, *sums_ = nullptr;
  int64_t first_chunk_ = 0;
  std::vector<Tile> tiles_;  // [chunk][panel]
};

}  // namespace velm::attention
