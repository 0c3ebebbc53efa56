// Attention backward: one pass with five matrix products per tile, probabilities recomputed from the
// saved logsumexp.
//
// A job owns a run of keys of some key heads, so the gradients of keys and values are written by
// it alone. Where keys are split between jobs, each leaves a partial gradient of the queries, and
// these are added up in order; how keys are split depends on sizes only, never on threads.
#include "attention/cross_attention/cpu_backward.h"

#include <cmath>

#include "attention/cross_attention/cpu_backward_plan.h"
#include "attention/cross_attention/cpu_backward_tiles.h"
#include "attention/cross_attention/cpu_bias_gradient.h"
#include "attention/cross_attention/cpu_forward.h"
#include "attention/cross_attention/cpu_scores.h"
#include "attention/cross_attention/cpu_weights.h"
#include "simd/parallel.h"

namespace velm::attention {

namespace {

// Floats of tiles of weights and their gradients that a worker may keep from one pass over the keys for the next: they
// come back from the caches in less time than the products they spare would take.
constexpr int64_t kKeptTiles = 1 << 20;
// Rows of a key head that are few: reading their keys takes longer than the products.
constexpr int64_t kFewRows = 64;

// Columns of what is summed over the keys for each query: the gradient of the query, then those of its biases.
int64_t summed_columns(const Problem& p, const Gradients& g) {
  const bool on_grid = g.grad_rel_pos_height.data || g.grad_rel_pos_width.data;
  return g.grad_query.data || on_grid ? p.head_dim + (on_grid ? p.grid() : 0) : 0;
}

void write_sums(const Problem& p, const Gradients& g, const Panel& panel, const float* sums) {
  alignas(64) float factor[kPanel];
  const int64_t width = panel.vectors * kLanes;
  const auto write = [&](const Rows& rows, int64_t first, int64_t columns, float scale) {
    std::fill_n(factor, kPanel, scale);
    if (rows.data) unpack_transposed(rows, p, panel, sums + first * width, width, columns, factor);
  };
  write(g.grad_query, 0, p.head_dim, p.scale);
  write(g.grad_rel_pos_height, p.head_dim, p.grid_height, 1.0f);
  write(g.grad_rel_pos_width, p.head_dim + p.grid_height, p.grid_width, 1.0f);
}

template <class Format>
class Worker {
 public:
  using Word = typename Format::Word;

  Worker(const Problem& p, const Gradients& g, const Plan& plan, const std::vector<int64_t>& offsets,
         const std::vector<float>& inverse, float* partial)
      : p_(p),
        g_(g),
        plan_(plan),
        offsets_(offsets),
        inverse_(inverse),
        partial_(partial),
        scratch_(memory_, p, kChunk, true),
        tiles_(p, g, plan, memory_, scratch_.additive) {
    columns_ = summed_columns(p, g);
    want_scores_ = columns_ || g.grad_key.data || g.grad_bias;
    head_words_ = words_of<Format>(p.head_dim);
    value_words_ = words_of<Format>(p.value_dim);
    ldk_ = padded(p.head_dim);
    ldv_ = padded(p.value_dim);
    ldk_words_ = padded(head_words_);
    ldv_words_ = padded(value_words_);
    k_ = memory_.take<Word>(kChunk * ldk_words_);
    v_ = memory_.take<Word>(kChunk * ldv_words_);
    // One key a word is the same in both orders.
    k_together_ = Format::kDepth == 1 ? k_ : memory_.take<Word>(words_of<Format>(kChunk) * ldk_);
    dk_ = memory_.take(kChunk * ldk_);
    dv_ = memory_.take(kChunk * ldv_);
    weights_ = memory_.take(kChunk * kPanel);
    ds_ = memory_.take(kChunk * kPanel);
    if (p.dropout) dropped_ = memory_.take(kChunk * kPanel);
    words_ = memory_.take<Word>(words_of<Format>(kChunk + 1) * kPanel + kLanes);
    int64_t most = 0;
    for (int64_t b = 0; b < p.batch; ++b) most = std::max(most, panel_count(p, b));
    // Packed queries are kept for all chunks of keys unless there are very many.
    kept_ = std::min<int64_t>(most, kKeptPanels);
    keep_all_ = most <= kKeptPanels;
    qt_ = memory_.take<Word>(kept_ * kPanel * head_words_);
    dot_ = memory_.take<Word>(kept_ * kPanel * value_words_);
    ot_ = memory_.take<Word>(kPanel * value_words_);
    q_ = memory_.take<Word>(kept_ * kPanelWords * ldk_);
    do_ = memory_.take<Word>(kept_ * kPanelWords * ldv_);
    if (p.on_grid) grid_ = memory_.take(kept_ * kPanel * p.grid());
    if (columns_ && !partial) dq_ = memory_.take(most * kPanel * columns_);
  }

  void run(const Job& job) {
    tiles_.begin(job);
    for (const Pair& pair : job.pairs) run_pair(job, pair);
    tiles_.add_to_bias_gradient(job, panels_);
  }

 private:
  static constexpr int64_t kKeptPanels = 128;
  static constexpr int64_t kPanelWords = kPanel / Format::kDepth;

  // What is known of a panel before the keys are gone through.
  struct Prepared {
    // inverse is one over the sum of the weights that exp(score - lse) gives, where it was found.
    alignas(64) float lse[kPanel], delta[kPanel], grad_lse[kPanel], inverse[kPanel];
    bool q_finite = true, do_finite = true, lse_finite = true;
  };

  // A panel and keys [from, to) of a block, and where its tiles are.
  struct Piece {
    int64_t from, to;
    size_t slot;            // of the packed panel
    float *weights, *ds;    // [i][lane]: weights before dropout; gradients of them, then of the scores
    float *dropped, *tanh;  // weights after dropout, which may be `weights`; of the capped scores
    bool scores = false;    // `weights` still holds scores
  };

  // What a pass over the keys is for.
  enum class Pass { sum, differentiate };

  void run_pair(const Job& job, const Pair& pair) {
    const int64_t rows = p_.group * p_.query_count(pair.b);
    const int64_t keys = p_.key_count(pair.b), chunks = (keys + kChunk - 1) / kChunk;
    choose_sums(rows, chunks);
    v_finite_.assign(static_cast<size_t>(chunks), 1);
    panels_.clear();
    prepared_.clear();
    for (int64_t r = 0; r < rows; r += kPanel) {
      panels_.emplace_back(p_, pair.b, pair.kv_head, r, rows - r);
      prepared_.emplace_back();
      prepare(panels_.size() - 1, keep_all_ ? panels_.size() - 1 : 0);
    }
    float* dq = dq_;
    const int64_t dq_size = static_cast<int64_t>(panels_.size()) * kPanel * columns_;
    if (partial_) {
      const int64_t at = offsets_[pair.b * p_.kv_heads + pair.kv_head];
      dq = partial_ + (job.split * offsets_.back() + at) * kPanel * columns_;
    }
    if (columns_) std::fill_n(dq, dq_size, 0.0f);

    if (sums_first_) {
      for (int64_t c = 0; c < chunks; ++c)
        run_chunk(Pass::sum, job, pair, c * kChunk, std::min(keys, (c + 1) * kChunk), dq);
      for (Prepared& state : prepared_) finish_sums(state);
    }
    for (int64_t c = job.split * chunks / plan_.splits; c < (job.split + 1) * chunks / plan_.splits; ++c)
      run_chunk(Pass::differentiate, job, pair, c * kChunk, std::min(keys, (c + 1) * kChunk), dq);

    if (columns_ && !partial_) {
      for (size_t i = 0; i < panels_.size(); ++i)
        write_sums(p_, g_, panels_[i], dq + static_cast<int64_t>(i) * kPanel * columns_);
    }
  }

  // Where a row's sum of out times its gradient comes from, delta. out was rounded, to 16 bits perhaps; in a row whose
  // attention is nearly one key the gradient of that weight and delta cancel but for what the other keys have, and of
  // that the rounding would leave nothing. And a logsumexp of 30 was rounded by as much as its last place, by which all
  // weights of the row are off. So, for few rows, delta is the sum of the weights times their gradients, from the very
  // products that it is taken off, and both are divided by the sum of the weights: a pass over the keys before the
  // other one, which keeps its tiles for it where they fit. In many rows the few of that kind are nothing beside the
  // others; in 16 bits the pass is made all the same where the tiles fit, and where not, two products more would not be
  // free.
  void choose_sums(int64_t rows, int64_t chunks) {
    const int64_t floats = (rows + kPanel - 1) / kPanel * chunks * tile_parts() * kChunk * kPanel;
    const bool fits = floats <= kKeptTiles, rounded = g_.out.dtype != ScalarType::Float;
    sums_first_ = plan_.splits == 1 && (rows <= kFewRows || (rounded && fits));
    keeps_tiles_ = sums_first_ && fits;
    if (keeps_tiles_ && !kept_tiles_) kept_tiles_ = memory_.take(kKeptTiles);
  }

  // logsumexp, and the dot product of out and its gradient, for every lane.
  void prepare(size_t i, size_t slot) {
    const Panel& panel = panels_[i];
    Prepared& state = prepared_[i];
    for (int l = 0; l < kPanel; ++l) {
      state.lse[l] = kInfinity;
      state.delta[l] = state.grad_lse[l] = state.inverse[l] = 0.0f;
      if (l >= panel.count) continue;
      state.lse[l] = lse_for_weights(p_, panel, l, g_.logsumexp);
      if (!sums_first_ && !inverse_.empty())
        state.inverse[l] = inverse_[p_.row_index(panel.b, panel.head[l], panel.query[l])];
      state.lse_finite = state.lse_finite && state.lse[l] == state.lse[l];
      if (!g_.grad_logsumexp || state.lse[l] == kInfinity) continue;
      const int64_t b = p_.varlen ? 0 : panel.b, row = p_.first_query(panel.b) + panel.query[l];
      const int64_t* stride = g_.grad_logsumexp_stride;
      state.grad_lse[l] = g_.grad_logsumexp[b * stride[0] + panel.head[l] * stride[1] + row * stride[2]];
    }
    pack_panel(i, slot);
    if (!want_scores_ || sums_first_) return;
    const int width = panel.vectors * kLanes;
    const Word* grad = dot_ + slot * kPanel * value_words_;
    pack_transposed(ot_, width, p_, panel, g_.out, p_.value_dim, 1.0f,
                    [&](int l) { return state.lse[l] != kInfinity; });
    for (int l = 0; l < width; l += kLanes) {
      // In the order of the product that delta is subtracted from: rows with one key then cancel exactly.
      const int64_t part = simd::depth_block<Word>(value_words_);
      Vec total = simd::zero();
      for (int64_t first = 0; first < value_words_; first += part) {
        Vec sum = simd::zero();
        for (int64_t d = first; d < std::min(first + part, value_words_); ++d)
          sum = simd::dot_words(sum, simd::load_words(ot_ + d * width + l), simd::load_words(grad + d * width + l));
        total += sum;
      }
      simd::store(state.delta + l, total - simd::load(state.grad_lse + l));
    }
  }

  void pack_panel(size_t i, size_t slot) {
    const Panel& panel = panels_[i];
    const int64_t width = panel.vectors * kLanes;
    // Rows that see nothing may hold anything and must not spread it.
    const auto keep = [&](int l) { return prepared_[i].lse[l] != kInfinity; };
    pack_transposed(qt_ + slot * kPanel * head_words_, width, p_, panel, p_.q, p_.head_dim, query_factor(p_), keep);
    if (p_.on_grid) pack_grid(grid_ + slot * kPanel * p_.grid(), p_, panel, keep);
    if (want_scores_) {
      pack_transposed(dot_ + slot * kPanel * value_words_, width, p_, panel, g_.grad_out, p_.value_dim, 1.0f, keep);
    }
    if (g_.grad_key.data)
      prepared_[i].q_finite = pack_panel_rows(q_ + slot * kPanelWords * ldk_, ldk_, p_, panel, p_.q, p_.head_dim, keep);
    if (g_.grad_value.data) {
      prepared_[i].do_finite =
          pack_panel_rows(do_ + slot * kPanelWords * ldv_, ldv_, p_, panel, g_.grad_out, p_.value_dim, keep);
    }
  }

  void run_chunk(Pass pass, const Job& job, const Pair& pair, int64_t first, int64_t stop, float* dq) {
    const bool weighs = pass == Pass::sum || !keeps_tiles_;
    KeyBlockOf<Format> block;
    block.first = first;
    block.count = stop - first;
    block.k = k_;
    block.v = v_;
    block.ldk = ldk_words_;
    block.ldv = ldv_words_;
    block.k_together = k_together_;
    block.ldk_together = Format::kDepth == 1 ? ldk_words_ : ldk_;
    const bool* holes = p_.holes(pair.b);
    block.holes = holes ? holes + first : nullptr;
    if (pass == Pass::differentiate) {
      std::fill_n(dk_, block.count * ldk_, 0.0f);
      std::fill_n(dv_, block.count * ldv_, 0.0f);
    }
    int64_t lo = INT64_MAX, hi = 0;
    for (const Panel& panel : panels_) {
      if (panel.hi <= panel.lo) continue;
      lo = std::min(lo, panel.lo);
      hi = std::max(hi, panel.hi);
    }
    lo = std::max(lo, first);
    hi = std::min(hi, stop);
    if (lo < hi && !(holes && std::find(holes + lo, holes + hi, true) == holes + hi)) {
      const int64_t at = lo - first;
      const bool* block_holes = holes ? holes + lo : nullptr;
      block.k_finite =
          pack_keys_together(k_together_ + at / Format::kDepth * block.ldk_together, block.ldk_together, p_, p_.k,
                             pair.b, pair.kv_head, lo, hi - lo, p_.head_dim, block_holes, at % Format::kDepth);
      if (Format::kDepth > 1 && weighs) {
        pack_key_rows(k_ + at * ldk_words_, ldk_words_, p_, p_.k, pair.b, pair.kv_head, lo, hi - lo, p_.head_dim,
                      block_holes);
      }
      if (weighs) {
        v_finite_[first / kChunk] = pack_key_rows(v_ + at * ldv_words_, ldv_words_, p_, p_.v, pair.b, pair.kv_head, lo,
                                                  hi - lo, p_.value_dim, block_holes);
      }
      block.v_finite = v_finite_[first / kChunk];
      for (size_t i = 0; i < panels_.size(); ++i) {
        Panel& panel = panels_[i];
        const int64_t a = std::max(panel.lo, first) - first, z = std::min(panel.hi, stop) - first;
        if (a >= z) continue;
        if (!keep_all_) pack_panel(i, 0);
        const int64_t panels = static_cast<int64_t>(panels_.size());
        const int64_t tile = tiles_.number(first / kChunk, panels, static_cast<int64_t>(i));
        float* panel_dq = dq + static_cast<int64_t>(i) * kPanel * columns_;
        Piece piece = piece_at(a, z, keep_all_ ? i : 0, first / kChunk * panels + static_cast<int64_t>(i));
        const auto run = [&](auto vectors) {
          constexpr int V = decltype(vectors)::value;
          const float* additive = nullptr;
          if ((weighs || is_special(prepared_[i], block)) &&
              !tiles_.template find_additive<V>(additive, panel, block, a, z, tile)) {
            // Kept for the next pass.
            if (pass == Pass::sum && keeps_tiles_) {
              for (float* kept : {piece.weights, piece.ds, piece.dropped, piece.tanh})
                if (kept) std::fill_n(kept, (z - a) * V * kLanes, 0.0f);
            }
            return;
          }
          if (weighs) weigh<V>(pass, panel, prepared_[i], block, piece, additive);
          if (pass == Pass::sum)
            add_sums<V>(panel, prepared_[i], block, piece, additive);
          else
            spread<V>(job, panel, prepared_[i], block, piece, additive, tile, panel_dq);
        };
        if (panel.vectors == 2)
          run(std::integral_constant<int, 2>{});
        else
          run(std::integral_constant<int, 1>{});
      }
    }
    if (pass == Pass::sum) return;
    if (g_.grad_key.data) write_key_rows(g_.grad_key, pair, block, dk_, ldk_, p_.head_dim, p_.scale);
    if (g_.grad_value.data) write_key_rows(g_.grad_value, pair, block, dv_, ldv_, p_.value_dim, 1.0f);
  }

  // Where the tiles of piece (chunk, panel) are: in those kept from the first pass, or in memory for one of them.
  Piece piece_at(int64_t from, int64_t to, size_t slot, int64_t tile) const {
    const auto part = [&](int64_t number, float* own) {
      return keeps_tiles_ ? kept_tiles_ + (tile * tile_parts() + number) * kChunk * kPanel : own;
    };
    Piece piece{from, to, slot, part(0, weights_), part(1, ds_), part(0, weights_), scratch_.tanh};
    if (p_.dropout) piece.dropped = part(2, dropped_);
    if (scratch_.tanh) piece.tanh = part(p_.dropout ? 3 : 2, scratch_.tanh);
    return piece;
  }
  int64_t tile_parts() const { return 2 + (p_.dropout ? 1 : 0) + (scratch_.tanh ? 1 : 0); }

  // Whether more has to be asked of a tile than whether a weight is 0.
  bool is_special(const Prepared& state, const KeyBlockOf<Format>& block) const {
    return !(state.lse_finite && state.q_finite && state.do_finite && block.k_finite && block.v_finite);
  }
  template <int V>
  Sight<V, Format> sight_of(const Panel& panel, const Prepared& state, const KeyBlockOf<Format>& block,
                            const Piece& piece, const float* additive) const {
    return {panel, block, piece.from, additive, [&](int l) { return state.lse[l] != kInfinity; }};
  }

  // The weights of one panel over keys of the block, and the gradients of them.
  template <int V>
  void weigh(Pass pass, Panel& panel, const Prepared& state, const KeyBlockOf<Format>& block, Piece& piece,
             const float* additive) {
    constexpr int kWidth = V * kLanes;
    const int64_t n = piece.to - piece.from;
    multiply_queries<V>(piece.weights, p_, block, piece.from, piece.to, qt_ + piece.slot * kPanel * head_words_,
                        kWidth);
    const float* grid = p_.on_grid ? grid_ + piece.slot * kPanel * p_.grid() : nullptr;
    products_to_scores<V>(piece.weights, p_, panel, block, piece.from, piece.to, grid, additive, piece.tanh);
    if (want_scores_) {
      simd::product<V, false, simd::Start::zero>(piece.ds, kWidth, n, block.v + piece.from * block.ldv, block.ldv,
                                                 value_words_, dot_ + piece.slot * kPanel * value_words_, kWidth);
    }
    const bool special = is_special(state, block);
    // The exponentials can wait for the next loop over the tile.
    piece.scores = pass == Pass::differentiate && !special && !p_.dropout;
    if (piece.scores) return;
    Vec lse[V];
    simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA { lse[v] = simd::load(state.lse + v * kLanes); });
    for (int64_t at = 0; at < n * kWidth; at += kWidth) {
      simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
        float* w = piece.weights + at + v * kLanes;
        simd::store(w, simd::exp(simd::load(w) - lse[v]));
      });
    }
    if (special) {
      const auto sight = sight_of<V>(panel, state, block, piece, additive);
      for (int64_t i = 0; i < n; ++i) {
        for (int v = 0; v < V; ++v) {
          float* w = piece.weights + i * kWidth + v * kLanes;
          simd::store(w, simd::select(sight.lanes(i, v), simd::load(w), simd::zero()));
        }
      }
    }
    if (!p_.dropout) return;
    for_dropout<V>(p_, panel, block.first + piece.from, n, [&](int64_t i, int v, simd::VecMask keep) {
      const int64_t at = i * kWidth + v * kLanes;
      simd::store(piece.dropped + at,
                  simd::select(keep, simd::load(piece.weights + at) * p_.dropout_scale, simd::zero()));
      if (want_scores_) {
        simd::store(piece.ds + at, simd::select(keep, simd::load(piece.ds + at) * p_.dropout_scale, simd::zero()));
      }
    });
  }

  // The sums of a row's weights, and of weights times their gradients, over the keys of a piece: into inverse and
  // delta.
  template <int V>
  void add_sums(const Panel& panel, Prepared& state, const KeyBlockOf<Format>& block, const Piece& piece,
                const float* additive) {
    constexpr int kWidth = V * kLanes;
    const bool special = is_special(state, block);
    const auto sight = sight_of<V>(panel, state, block, piece, additive);
    Vec weights[V], sum[V];
    simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA { weights[v] = sum[v] = simd::zero(); });
    for (int64_t i = 0; i < piece.to - piece.from; ++i) {
      simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
        const int64_t at = i * kWidth + v * kLanes;
        const Vec weight = simd::load(piece.weights + at);
        weights[v] += weight;
        if (!want_scores_) return;
        const simd::VecMask counts = special ? sight.lanes(i, v) : weight != simd::zero();
        sum[v] += simd::select(counts, weight * simd::load(piece.ds + at), simd::zero());
      });
    }
    simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
      const auto add = [&](float* to, Vec x) { simd::store(to + v * kLanes, simd::load(to + v * kLanes) + x); };
      add(state.inverse, weights[v]);
      add(state.delta, sum[v]);
    });
  }

  static void finish_sums(Prepared& state) {
    for (int l = 0; l < kPanel; ++l) {
      state.inverse[l] = state.inverse[l] == 0.0f ? 1.0f : 1.0f / state.inverse[l];
      state.delta[l] = state.delta[l] * state.inverse[l] - state.grad_lse[l];
    }
  }

  // What the weights of a piece and the gradients of them are in every gradient.
  template <int V>
  void spread(const Job& job, const Panel& panel, const Prepared& state, const KeyBlockOf<Format>& block,
              const Piece& piece, const float* additive, int64_t tile, float* dq) {
    constexpr int kWidth = V * kLanes;
    const int64_t from = piece.from, to = piece.to, n = to - from;
    const bool special = is_special(state, block), scales = sums_first_ || !inverse_.empty();
    const auto sight = sight_of<V>(panel, state, block, piece, additive);
    Vec lse[V], delta[V], inverse[V];
    simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
      lse[v] = simd::load(state.lse + v * kLanes);
      delta[v] = simd::load(state.delta + v * kLanes);
      inverse[v] = simd::load(state.inverse + v * kLanes);
    });
    for (int64_t i = 0; i < n; ++i) {
      simd::unroll<V>([&](auto v) VELM_INLINE_LAMBDA {
        const int64_t at = i * kWidth + v * kLanes;
        Vec weight = simd::load(piece.weights + at);
        if (piece.scores) weight = simd::exp(weight - lse[v]);
        // A hidden value may have made other factors NaN, or infinite.
        const simd::VecMask counts = special ? sight.lanes(i, v) : weight != simd::zero();
        if (scales) {
          weight = simd::select(counts, weight * inverse[v], simd::zero());
          if (p_.dropout) {
            const Vec dropped = simd::load(piece.dropped + at);
            simd::store(piece.dropped + at, simd::select(dropped == simd::zero(), dropped, dropped * inverse[v]));
          }
        }
        if (piece.scores || scales) simd::store(piece.weights + at, weight);
        if (want_scores_) {
          const Vec ds = weight * (simd::load(piece.ds + at) - delta[v]);
          simd::store(piece.ds + at, simd::select(counts, ds, simd::zero()));
        }
      });
    }
    if (tiles_.sums()) {
      tiles_.template add<V>(tile, from, n, piece.ds);
    } else if (g_.grad_bias) {
      add_bias_gradient<V>(job.grad_bias, g_.bias_size, panel, piece.ds, block.first + from, n);
    }
    if (columns_ > p_.head_dim) add_grid_gradient<V>(dq + p_.head_dim * kWidth, p_, piece.ds, block.first + from, n);
    if (want_scores_ && p_.softcap > 0) {
      for (int64_t at = 0; at < n * kWidth; at += kLanes) {
        const Vec t = simd::load(piece.tanh + at), ds = simd::load(piece.ds + at);
        simd::store(piece.ds + at, simd::select(ds == simd::zero(), ds, ds * (1.0f - t * t)));
      }
    }
    // Hidden keys that lie between others are zero rows, but their gradients would take in what their rows hold.
    const bool some_hidden = p_.masked_by_row() || block.holes;
    constexpr int64_t kWords = kWidth / Format::kDepth;
    const auto key_sees = [&](int64_t i, int64_t l, int64_t) { return sight(i, l); };
    if (g_.grad_value.data) {
      const Word* rows = do_ + piece.slot * kPanelWords * ldv_;
      const Word* weights = weights_over_queries<Format, V>(words_, piece.dropped, n);
      float* to_dv = dv_ + from * ldv_;
      if (state.do_finite || !some_hidden) {
        simd::product_columns<false, simd::Start::add>(to_dv, ldv_, n, round_up(p_.value_dim, kLanes), weights, kWords,
                                                       kWords, rows, ldv_);
      } else {
        simd::product_of_some(to_dv, ldv_, n, p_.value_dim, weights, kWords, 1, kWords, rows, ldv_, nullptr, key_sees);
      }
    }
    if (g_.grad_key.data) {
      const Word* rows = q_ + piece.slot * kPanelWords * ldk_;
      const Word* weights = weights_over_queries<Format, V>(words_, piece.ds, n);
      float* to_dk = dk_ + from * ldk_;
      if (state.q_finite || !some_hidden) {
        simd::product_columns<false, simd::Start::add>(to_dk, ldk_, n, round_up(p_.head_dim, kLanes), weights, kWords,
                                                       kWords, rows, ldk_);
      } else {
        simd::product_of_some(to_dk, ldk_, n, p_.head_dim, weights, kWords, 1, kWords, rows, ldk_, nullptr, key_sees);
      }
    }
    if (g_.grad_query.data) {
      const int64_t depth = key_words<Format>(from, to), ld = block.ldk_together, before = from % Format::kDepth;
      const Word* keys = block.k_together + from / Format::kDepth * ld;
      const Word* weights = weights_over_keys<Format, V>(words_, piece.ds, from, to);
      if (block.k_finite || !p_.masked_by_row()) {
        simd::product<V, true, simd::Start::add>(dq, kWidth, p_.head_dim, keys, ld, depth, weights, kWidth);
      } else {
        simd::product_of_some(
            dq, kWidth, p_.head_dim, kWidth, keys, 1, ld, depth, weights, kWidth, nullptr,
            [&](int64_t, int64_t k, int64_t l) { return k >= before && k - before < n && sight(k - before, l); });
      }
    }
  }

  void write_key_rows(const Rows& rows, const Pair& pair, const KeyBlockOf<Format>& block, const float* from,
                      int64_t ld, int64_t columns, float factor) {
    with_type(rows.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t j = 0; j < block.count; ++j) {
        T* to = reinterpret_cast<T*>(
            rows.mutable_at(p_.varlen ? 0 : pair.b, pair.kv_head, p_.first_key(pair.b) + block.first + j));
        for (int64_t d = 0; d < columns; d += kLanes) {
          simd::store_first(to + d, simd::load(from + j * ld + d) * factor,
                            static_cast<int>(std::min<int64_t>(columns - d, kLanes)));
        }
      }
    });
  }

  const Problem& p_;
  const Gradients& g_;
  const Plan& plan_;
  const std::vector<int64_t>& offsets_;
  const std::vector<float>& inverse_;
  float* partial_;
  simd::FlushSubnormals flush_;
  simd::Scratch memory_;
  ScoreScratch scratch_;
  bool want_scores_, keep_all_;
  int64_t columns_, head_words_, value_words_, ldk_, ldv_, ldk_words_, ldv_words_, kept_;
  Word *k_, *v_, *k_together_, *words_, *qt_, *dot_, *ot_, *q_, *do_;
  float *dk_, *dv_, *weights_, *ds_, *dropped_ = nullptr, *dq_ = nullptr, *grid_ = nullptr, *kept_tiles_ = nullptr;
  bool sums_first_ = false, keeps_tiles_ = false;
  std::vector<char> v_finite_;  // of the chunks of a pair
  std::vector<Panel> panels_;
  std::vector<Prepared> prepared_;
  SharedTiles<Format> tiles_;
};

// Adds the partial sums of the queries up, in the order of the key splits.
void reduce_sums(const Problem& p, const Gradients& g, const Plan& plan, const std::vector<int64_t>& offsets,
                 float* partial) {
  const int64_t columns = summed_columns(p, g), pairs = p.batch * p.kv_heads, size = kPanel * columns;
  simd::parallel_items(pairs, [&](int64_t pair) {
    const int64_t b = pair / p.kv_heads, rows = p.group * p.query_count(b);
    for (int64_t r = 0; r < rows; r += kPanel) {
      const Panel panel(p, b, pair % p.kv_heads, r, rows - r);
      float* sum = partial + (offsets[pair] + r / kPanel) * size;
      for (int64_t s = 1; s < plan.splits; ++s) {
        const float* other = sum + s * offsets.back() * size;
        for (int64_t i = 0; i < panel.vectors * kLanes * columns; i += kLanes)
          simd::store(sum + i, simd::load(sum + i) + simd::load(other + i));
      }
      write_sums(p, g, panel, sum);
    }
  });
}

}  // namespace

void backward(const Problem& p, const Gradients& g) {
  const Plan plan = make_plan(p, g.grad_bias ? g.bias_size : nullptr);
  const int64_t pairs = p.batch * p.kv_heads;

  // Panels before each pair, for the partial gradients of the queries.
  std::vector<int64_t> offsets{0};
  for (int64_t i = 0; i < pairs; ++i) offsets.push_back(offsets.back() + panel_count(p, i / p.kv_heads));
  simd::Scratch memory;
  float* partial = nullptr;
  const int64_t columns = summed_columns(p, g);
  if (columns && plan.splits > 1) partial = memory.take(plan.splits * offsets.back() * kPanel * columns);

  const std::vector<float> inverse = inverse_sums(p, g.logsumexp, [](int64_t) { return true; });
  const std::vector<Job> jobs = make_jobs(p, g, plan);
  with_format(p, [&](auto format) {
    using FormatWorker = Worker<decltype(format)>;
    simd::parallel_workers(
        static_cast<int64_t>(jobs.size()), [&] { return FormatWorker(p, g, plan, offsets, inverse, partial); },
        [&](FormatWorker& worker, int64_t i) { worker.run(jobs[i]); });
  });
  if (partial) reduce_sums(p, g, plan, offsets, partial);
  if (g.grad_bias && plan.partials > 1) {
    const int64_t bias_count = g.bias_size[0] * g.bias_size[1] * g.bias_size[2] * g.bias_size[3];
    simd::parallel_ranges(bias_count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float sum = g.grad_bias[i];
        for (int64_t c = 1; c < plan.partials; ++c) sum += g.grad_bias[c * bias_count + i];
        g.grad_bias[i] = sum;
      }
    });
  }
}

}  // namespace velm::attention
