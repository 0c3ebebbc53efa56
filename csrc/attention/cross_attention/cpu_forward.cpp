// Attention forward: for every panel of queries, one pass over the keys with running softmax
// statistics, everything in the transposed orientation (keys by rows, queries by lanes), so that
// maxima and sums are plain vertical operations.
#include "attention/cross_attention/cpu_forward.h"

#include <cmath>
#include <vector>

#include "attention/cross_attention/cpu_decode.h"
#include "attention/cross_attention/cpu_scores.h"
#include "attention/cross_attention/cpu_weights.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm::attention {

namespace {

// Keys in a block: its K and V rows stay in the second-level cache for all panels of an item.
constexpr int64_t kBlock = 96;
// Panels that go over the same blocks together.
constexpr int64_t kPanelsPerItem = 16;

// Memory in which an item may keep its weights until the key mass can be summed from them.
constexpr int64_t kKeptBytes = 4 << 20;

// Floats of the biases of a grid that an item may hold for its panels, or one of them if it has more.
constexpr int64_t kGridFloats = 1 << 18;

// Panels of an item that share a key head: part number `part` of its rows.
struct Group {
  int64_t b, kv_head, first, rows, part;
};

// Groups that go over the blocks of keys together: several heads of a batch entry, whose keys lie side by side in
// memory, or several batch entries, which share the bias or mask of a block.
using Item = std::vector<Group>;

// State of one panel between blocks.
template <class Format>
struct Running {
  typename Format::Word* qt;  // [words of head_dim][width]
  float* ot;                  // [value_dim][width]
  float* grid = nullptr;      // [biases of the grid][width]
  alignas(64) float max[kPanel], sum[kPanel];
};

// Weights of a panel over a run of keys, relative to what was the highest score by then.
struct Kept {
  const float* weights;
  int64_t first, count;
  alignas(64) float max[kPanel];
};

// One block of keys into a panel's state. Leaves the weights in s, those after dropout in `dropped` (which may be s);
// words is memory for a tile of them.
template <int V, class Format>
void attend(const Problem& p, Panel& panel, const KeyBlockOf<Format>& block, int64_t from, int64_t to,
            Running<Format>& state, float* s, const float* additive, float* dropped, typename Format::Word* words) {
  constexpr int kWidth = V * kLanes;
  const int64_t n = to - from;
  multiply_queries<V>(s, p, block, from, to, state.qt, kWidth);
  // Biases alone are added on the way to the maximum.
  const bool adds = (additive || state.grid) && only_adds(p, panel, block, from, to);
  if (!adds) products_to_scores<V>(s, p, panel, block, from, to, state.grid, additive, nullptr);

  Vec top[V], base[V];
  alignas(64) float alpha[kWidth];
  simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA { top[v] = simd::load(state.max + v * kLanes); });
  const auto find_top = [&](auto&& score) VELM_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i) {
      // Of NaN the earlier maximum stays, so that hidden keys keep the weight 0; it comes out of the exponentials.
      simd::unroll<V>([&](auto v)
                          VELM_INLINE_LAMBDA { top[v] = simd::maximum(score(i * kWidth + v * kLanes), top[v]); });
    }
  };
  if (adds && state.grid) {
    OnGrid<V> bias(p, state.grid, block.first + from);
    for (int64_t i = 0; i < n; ++i, bias.next()) {
      simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
        const int64_t at = i * kWidth + v * kLanes;
        Vec x = simd::load(s + at) + bias(v);
        if (additive) x = add_to_score(x, simd::load(additive + at));
        simd::store(s + at, x);
        top[v] = simd::maximum(x, top[v]);
      });
    }
  } else if (adds) {
    find_top([&](int64_t at) VELM_INLINE_LAMBDA {
      const Vec x = add_to_score(simd::load(s + at), simd::load(additive + at));
      simd::store(s + at, x);
      return x;
    });
  } else {
    find_top([&](int64_t at) VELM_INLINE_LAMBDA { return simd::load(s + at); });
  }
  Vec sum[V];
  simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
    // A row that has seen nothing yet keeps -inf as its maximum.
    base[v] = simd::base_of(top[v]);
    const Vec a = simd::exp(simd::load(state.max + v * kLanes) - base[v]);
    simd::store(alpha + v * kLanes, a);
    simd::store(state.max + v * kLanes, top[v]);
    sum[v] = simd::zero();
  });
  for (int64_t i = 0; i < n; ++i) {
    simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
      float* at = s + i * kWidth + v * kLanes;
      const Vec e = simd::exp(simd::load(at) - base[v]);
      sum[v] += e;
      simd::store(at, e);
    });
  }
  simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
    // Blocks are summed on their own: one running sum would lose bits over tens of thousands of keys.
    float* total = state.sum + v * kLanes;
    simd::store(total, simd::fma(simd::load(total), simd::load(alpha + v * kLanes), sum[v]));
  });

  if (p.dropout) {
    for_dropout<V>(p, panel, block.first + from, n, [&](int64_t i, int v, simd::VecMask keep) {
      const int64_t at = i * kWidth + v * kLanes;
      simd::store(dropped + at, simd::select(keep, simd::load(s + at) * p.dropout_scale, simd::zero()));
    });
  }
  const int64_t depth = key_words<Format>(from, to), ldv = block.ldv_together;
  const typename Format::Word* weights = weights_over_keys<Format, V>(words, p.dropout ? dropped : s, from, to);
  const typename Format::Word* values = block.v_together + from / Format::kDepth * ldv;
  if (block.v_finite) {
    simd::product<V, true, simd::Start::scale>(state.ot, kWidth, p.value_dim, values, ldv, depth, weights, kWidth,
                                               alpha);
  } else {
    const Sight<V, Format> sight(panel, block, from, additive, [](int) { return true; });
    const int64_t before = from % Format::kDepth;
    simd::product_of_some(
        state.ot, kWidth, p.value_dim, kWidth, values, 1, ldv, depth, weights, kWidth, alpha,
        [&](int64_t, int64_t k, int64_t l) { return k >= before && k - before < n && sight(k - before, l); });
  }
}

// Whether the bias and mask of a block of keys are the same for every batch entry.
bool shares_additive(const Problem& p) {
  return p.batch > 1 && (p.bias || p.mask) && !(p.bias && p.bias.stride[0]) && !(p.mask && p.mask.stride[0]);
}

// Sizes of even parts of at most `limit`, and at least one, that n is cut into.
int64_t even_part(int64_t n, int64_t limit) {
  const int64_t parts = (n + limit - 1) / limit;
  return (n + parts - 1) / parts;
}

// What the weights of one panel take.
int64_t kept_floats(const Problem& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) longest = std::max(longest, p.key_count(b));
  return longest * kPanel;
}

std::vector<Item> make_items(const Problem& p, bool keeps) {
  std::vector<Item> items;
  const auto panels_of = [&](int64_t b) {
    return decodes(p, b) ? 0 : (p.group * p.query_count(b) + kPanel - 1) / kPanel;
  };
  int64_t panels = 0;
  for (int64_t b = 0; b < p.batch; ++b) panels += panels_of(b) * p.kv_heads;
  // Fewer panels an item where there would be too few items to share out.
  int64_t room =
      keeps ? kKeptBytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, kept_floats(p)) : kPanelsPerItem;
  if (p.on_grid) room = std::min(room, std::max<int64_t>(1, kGridFloats / (kPanel * std::max<int64_t>(1, p.grid()))));
  const int64_t per_item = std::clamp<int64_t>(panels / 16, 1, std::min(room, kPanelsPerItem));
  const bool across_batch = shares_additive(p);
  const int64_t batches = across_batch ? 1 : p.batch;
  for (int64_t b = 0; b < batches; ++b) {
    const int64_t rows = p.group * p.query_count(b);
    if (panels_of(b) == 0) continue;
    const int64_t rows_at_once = even_part(panels_of(b), per_item) * kPanel;
    const int64_t others = across_batch ? p.batch : p.kv_heads, lines = across_batch ? p.kv_heads : 1;
    const int64_t columns_at_once = even_part(others, std::max<int64_t>(1, per_item * kPanel / rows_at_once));
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t at = 0; at < others; at += columns_at_once) {
        for (int64_t r = 0; r < rows; r += rows_at_once) {
          Item& item = items.emplace_back();
          for (int64_t i = at; i < std::min(others, at + columns_at_once); ++i)
            item.push_back(
                {across_batch ? i : b, across_batch ? line : i, r, std::min(rows - r, rows_at_once), r / rows_at_once});
        }
      }
    }
  }
  return items;
}

// Whether rows of this tensor can be read where they are as words of neighbours: of the right type and whole words, and
// close enough together that a block of them spreads over the sets of the first-level cache and over few pages.
template <class Format>
bool readable_in_place(const Rows& rows, int64_t columns) {
  constexpr int64_t kDepth = Format::kDepth;
  if (rows.dtype != (kDepth == 1 ? ScalarType::Float : ScalarType::BFloat16)) return false;
  if ((columns | rows.row | rows.head | rows.batch) % kDepth != 0) return false;
  if (reinterpret_cast<uintptr_t>(rows.data) % sizeof(typename Format::Word) != 0) return false;
  return rows.row <= 320 * kDepth && rows.row % (128 * kDepth) != 0;
}

template <class Format>
class Worker {
 public:
  using Word = typename Format::Word;

  // key_mass, if given, has a copy of the whole for every part of the rows.
  Worker(const Problem& p, const Rows& out, float* logsumexp, float* key_mass)
      : p_(p), out_(out), logsumexp_(logsumexp), key_mass_(key_mass), shares_additive_(shares_additive(p)) {
    // Masked rows may hold anything, so they are replaced by zeros in a copy.
    in_place_k_ = readable_in_place<Format>(p.k, p.head_dim);
    in_place_v_ = Format::kDepth == 1 && readable_in_place<Format>(p.v, p.value_dim) && !p.masked_by_row();
    ldk_ = padded(words_of<Format>(p.head_dim));
    ldv_ = padded(p.value_dim);
    s_ = memory_.take(kBlock * kPanel);
    if (key_mass) weights_ = memory_.take(kKeptBytes / static_cast<int64_t>(sizeof(float)));
    words_ = memory_.take<Word>(words_of<Format>(kBlock + 1) * kPanel);
    for (int64_t i = 0; i < kPanelsPerItem; ++i) {
      states_[i].qt = memory_.take<Word>(words_of<Format>(p.head_dim) * kPanel);
      states_[i].ot = memory_.take(p.value_dim * kPanel);
      if ((p.mask || p.bias) && (shares_additive_ || i == 0)) additive_[i].values = memory_.take(kBlock * kPanel);
    }
  }

  void run(const Item& item) {
    panels_.clear();
    kept_.clear();
    int64_t lo = INT64_MAX, hi = 0;
    for (const Group& group : item) {
      for (int64_t r = 0; r < group.rows; r += kPanel) {
        panels_.emplace_back(p_, group.b, group.kv_head, group.first + r, group.rows - r);
        const Panel& panel = panels_.back();
        if (panel.hi > panel.lo) {
          lo = std::min(lo, panel.lo);
          hi = std::max(hi, panel.hi);
        }
        begin(panel, states_[panels_.size() - 1]);
        kept_.emplace_back();
      }
    }
    for (int64_t first = lo / kBlock * kBlock; first < hi; first += kBlock) {
      const int64_t from = std::max(lo, first), to = std::min(hi, first + kBlock);
      for (Additive& additive : additive_) additive.known = false;
      size_t next = 0;
      for (const Group& group : item) {
        const size_t begin = next;
        next += static_cast<size_t>((group.rows + kPanel - 1) / kPanel);
        run_block(group, begin, next, from, to);
      }
    }
    size_t i = 0;
    for (const Group& group : item) {
      for (int64_t r = 0; r < group.rows; r += kPanel, ++i) finish(panels_[i], states_[i], group.part, kept_[i]);
    }
  }

 private:
  void begin(const Panel& panel, Running<Format>& state) {
    const int width = panel.vectors * kLanes;
    if (p_.on_grid) {
      if (!state.grid) state.grid = memory_.take(p_.grid() * kPanel);
      pack_grid(state.grid, p_, panel, [](int) { return true; });
    }
    pack_transposed(state.qt, width, p_, panel, p_.q, p_.head_dim, query_factor(p_), [](int) { return true; });
    std::fill_n(state.ot, p_.value_dim * width, 0.0f);
    std::fill_n(state.max, kPanel, -kInfinity);
    std::fill_n(state.sum, kPanel, 0.0f);
  }

  // What is added to the scores of a block of keys.
  struct Additive {
    float* values = nullptr;
    bool known = false, visible = true;
  };

  // Keys [from, to) into the panels [begin, end) of a group.
  void run_block(const Group& group, size_t begin, size_t end, int64_t from, int64_t to) {
    KeyBlockOf<Format> block;
    block.first = to;
    int64_t stop = from;
    for (size_t i = begin; i < end; ++i) {
      if (panels_[i].hi <= panels_[i].lo) continue;
      block.first = std::min(block.first, std::max(from, panels_[i].lo));
      stop = std::max(stop, std::min(to, panels_[i].hi));
    }
    if (block.first >= stop) return;
    block.count = stop - block.first;
    if (const bool* holes = p_.holes(group.b)) {
      block.holes = holes + block.first;
      if (std::find(block.holes, block.holes + block.count, true) == block.holes + block.count) return;
    }
    bool packed = false;
    for (size_t i = begin; i < end; ++i) {
      Panel& panel = panels_[i];
      const int64_t a = std::max(panel.lo, from), z = std::min(panel.hi, to);
      if (a >= z) continue;
      const float* additive = nullptr;
      if (additive_[0].values) {
        Additive& tile = additive_[shares_additive_ ? i - begin : 0];
        const int64_t first = shares_additive_ ? from : a;
        if (!shares_additive_ || !tile.known) {
          const int64_t last = shares_additive_ ? to : z;
          tile.visible = panel.vectors == 2 ? additive_tile<2>(tile.values, p_, panel, first, last)
                                            : additive_tile<1>(tile.values, p_, panel, first, last);
          tile.known = true;
        }
        if (!tile.visible) continue;
        additive = tile.values + (a - first) * panel.vectors * kLanes;
      }
      if (!packed) pack(group, block);
      packed = true;
      float* s = key_mass_ ? room_for(i) : s_;
      if (panel.vectors == 2) {
        attend<2>(p_, panel, block, a - block.first, z - block.first, states_[i], s, additive, s_, words_);
      } else {
        attend<1>(p_, panel, block, a - block.first, z - block.first, states_[i], s, additive, s_, words_);
      }
      if (key_mass_) {
        Kept& kept = kept_[i].emplace_back();
        kept.weights = s;
        kept.first = a;
        kept.count = z - a;
        std::copy_n(states_[i].max, kPanel, kept.max);
      }
    }
  }

  // Where the weights of the next block of panel i are kept.
  float* room_for(size_t i) const {
    const int64_t used = kept_[i].empty() ? 0 : kept_[i].back().first + kept_[i].back().count - kept_[i].front().first;
    return weights_ + static_cast<int64_t>(i) * kept_floats_ + used * kPanel;
  }

  void pack(const Group& group, KeyBlockOf<Format>& block) {
    const int64_t at = p_.first_key(group.b) + block.first, b = p_.varlen ? 0 : group.b;
    if (in_place_k_ && !block.holes) {
      block.k = reinterpret_cast<const Word*>(p_.k.at(b, group.kv_head, at));
      block.ldk = p_.k.row / Format::kDepth;
    } else {
      if (!k_) k_ = memory_.take<Word>(kBlock * ldk_);
      block.k = k_;
      block.ldk = ldk_;
      pack_key_rows(k_, ldk_, p_, p_.k, group.b, group.kv_head, block.first, block.count, p_.head_dim, block.holes);
    }
    if (in_place_v_ && !block.holes) {
      block.v_together = reinterpret_cast<const Word*>(p_.v.at(b, group.kv_head, at));
      block.ldv_together = p_.v.row;
    } else {
      if (!v_) v_ = memory_.take<Word>(words_of<Format>(kBlock) * ldv_);
      block.v_together = v_;
      block.ldv_together = ldv_;
      const bool finite = pack_keys_together(v_, ldv_, p_, p_.v, group.b, group.kv_head, block.first, block.count,
                                             p_.value_dim, block.holes);
      block.v_finite = finite || !p_.masked_by_row();
    }
  }

  // Adds the weights that the rows of one panel gave to every key.
  template <int V>
  void add_key_mass(const Panel& panel, const Running<Format>& state, const float* inverse, int64_t part,
                    const std::vector<Kept>& all_kept) {
    constexpr int kWidth = V * kLanes;
    float* copy = key_mass_ + part * p_.mass_size();
    // Rows of a panel may belong to several heads, one behind the other.
    for (int first = 0, last; first < panel.count; first = last) {
      for (last = first + 1; last < panel.count && panel.head[last] == panel.head[first]; ++last) {
      }
      float* to = copy + p_.mass_index(panel.b, panel.head[first], 0);
      for (const Kept& kept : all_kept) {
        Vec factor[V];
        simd::VecMask counts[V];
        for (int v = 0; v < V; ++v) {
          const Vec lane = simd::stdx::static_simd_cast<Vec>(simd::lane_index()) + static_cast<float>(v * kLanes);
          const Vec scale = simd::load(inverse + v * kLanes);
          counts[v] =
              lane >= Vec(static_cast<float>(first)) && lane < Vec(static_cast<float>(last)) && scale != simd::zero();
          factor[v] = scale * simd::exp(simd::load(kept.max + v * kLanes) - simd::load(state.max + v * kLanes));
        }
        for (int64_t j = 0; j < kept.count; j += kLanes) {
          const int lanes_kept = static_cast<int>(std::min<int64_t>(kept.count - j, kLanes));
          Vec block[kLanes];
          for (int i = 0; i < kLanes; ++i) {
            block[i] = simd::zero();
            for (int v = 0; v < V && i < lanes_kept; ++v) {
              const Vec weight = simd::load(kept.weights + (j + i) * kWidth + v * kLanes);
              block[i] += simd::select(counts[v], weight * factor[v], simd::zero());
            }
          }
          simd::transpose(block);
          Vec sum = simd::load_first(to + kept.first + j, lanes_kept);
          for (int i = 0; i < kLanes; ++i) sum += block[i];
          simd::store_first(to + kept.first + j, sum, lanes_kept);
        }
      }
    }
  }

  void finish(const Panel& panel, const Running<Format>& state, int64_t part, const std::vector<Kept>& kept) {
    alignas(64) float inverse[kPanel];
    bool is_nan[kPanel] = {};
    for (int l = 0; l < panel.vectors * kLanes; ++l) {
      const float sum = state.sum[l];
      const bool empty = sum == 0.0f;
      inverse[l] = empty ? 0.0f : 1.0f / sum;
      if (l >= panel.count) continue;
      // Where all that a row sees has the score -inf, softmax divides 0 by 0.
      if (empty && p_.sees_any(panel.b, panel.head[l], panel.query[l])) inverse[l] = kNaN;
      is_nan[l] = !(inverse[l] < kInfinity) || sum == kInfinity;
      logsumexp_[p_.row_index(panel.b, panel.head[l], panel.query[l])] =
          empty ? -kInfinity : state.max[l] + std::log(sum);
    }
    unpack_transposed(out_, p_, panel, state.ot, panel.vectors * kLanes, p_.value_dim, inverse);
    if (!key_mass_) return;
    for (int l = 0; l < panel.count; ++l) {
      if (!is_nan[l]) continue;
      // All weights of the row are NaN, but those of the keys that it does not see.
      float* to = key_mass_ + part * p_.mass_size() + p_.mass_index(panel.b, panel.head[l], 0);
      p_.any_seen(panel.b, panel.head[l], panel.query[l], [&](int64_t j) {
        to[j] = kNaN;
        return false;
      });
      inverse[l] = 0.0f;
    }
    if (panel.vectors == 2) {
      add_key_mass<2>(panel, state, inverse, part, kept);
    } else {
      add_key_mass<1>(panel, state, inverse, part, kept);
    }
  }

  const Problem& p_;
  const Rows& out_;
  float *logsumexp_, *key_mass_;
  const int64_t kept_floats_ = kept_floats(p_);
  simd::FlushSubnormals flush_;
  simd::Scratch memory_;
  const bool shares_additive_;
  bool in_place_k_, in_place_v_;
  int64_t ldk_, ldv_;
  float *s_, *weights_ = nullptr;
  Word *words_, *k_ = nullptr, *v_ = nullptr;
  Running<Format> states_[kPanelsPerItem];
  Additive additive_[kPanelsPerItem];
  std::vector<Panel> panels_;
  std::vector<std::vector<Kept>> kept_;  // of every panel
};

}  // namespace

void forward(const Problem& p, const Rows& out, float* logsumexp, float* key_mass) {
  decode(p, out, logsumexp);
  const bool keeps = key_mass && kept_floats(p) * static_cast<int64_t>(sizeof(float)) <= kKeptBytes;
  const std::vector<Item> items = make_items(p, keeps);
  int64_t parts = 1;
  for (const Item& item : items) parts = std::max(parts, item.front().part + 1);
  const int64_t size = p.mass_size();
  simd::Scratch memory;
  float* masses = keeps && parts > 1 ? memory.take(parts * size) : key_mass;
  if (keeps) std::fill_n(masses, parts * size, 0.0f);
  with_format(p, [&](auto format) {
    using FormatWorker = Worker<decltype(format)>;
    simd::parallel_workers(
        static_cast<int64_t>(items.size()), [&] { return FormatWorker(p, out, logsumexp, keeps ? masses : nullptr); },
        [&](FormatWorker& worker, int64_t i) { worker.run(items[i]); });
  });
  if (!key_mass) return;
  // Rows of one head that went to several items are added up in order.
  if (masses != key_mass) {
    simd::parallel_ranges(size, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float sum = masses[i];
        for (int64_t part = 1; part < parts; ++part) sum += masses[part * size + i];
        key_mass[i] = sum;
      }
    });
  }
  sum_key_mass(p, logsumexp, key_mass, [&](int64_t b) { return !keeps || decodes(p, b); });
}

}  // namespace velm::attention
