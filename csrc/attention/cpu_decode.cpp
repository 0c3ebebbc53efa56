// Attention of few rows: every key and value is read once, where it lies, for all rows together. Lanes run along the
// keys in scores and weights, and along the values in the output.
//
// A score is summed over head_dim in the order of simd::product, so that the backward pass recomputes the same bits.
#include "attention/cpu_decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/cpu_scores.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm::attention {

namespace {

// Keys between two updates of the running maximum.
constexpr int64_t kBlock = 128;
// Value rows added to the output at a time.
constexpr int kRun = 8;
// Rows to prefetch ahead: they often lie pages apart, where the processor does not prefetch by itself.
constexpr int64_t kAhead = 16;
// Where there are fewer key heads than shares, the keys of each are cut into chunks of at least this many.
constexpr int64_t kShares = 16, kLeastChunk = 1024;
static_assert(kLeastChunk % kBlock == 0 && kBlock % kLanes == 0 && kBlock % kRun == 0);

// The rows of one key head.
struct Head {
  int64_t b, kv_head;
  int64_t rows, per_head;
  int64_t lo, hi;        // union of what the rows see
  int64_t chunk, parts;  // keys of a chunk, number of chunks
  int64_t partial;       // where its partial results begin

  Head(const Problem& p, int64_t batch, int64_t kv)
      : b(batch), kv_head(kv), rows(p.group * p.query_count(batch)), per_head(p.query_count(batch)), lo(0), hi(0) {
    for (int64_t i = 0; i < per_head; ++i) {
      const Range r = p.range(b, i);
      if (r.hi <= r.lo) continue;
      lo = hi == 0 ? r.lo : std::min<int64_t>(lo, r.lo);
      hi = std::max<int64_t>(hi, r.hi);
    }
  }
  int64_t head(const Problem& p, int64_t r) const { return kv_head * p.group + r / per_head; }
  int64_t query(int64_t r) const { return r % per_head; }
};

struct Item {
  int64_t head, part;
};

// Sizes of a partial result: an output row, then its maximum and sum.
int64_t partial_row(const Problem& p) {
  return round_up(p.value_dim, kLanes) + kLanes;
}

class Worker {
 public:
  explicit Worker(const Problem& p) : p_(p) {
    q_ = memory_.take(kDecodeRows * p.head_dim);
    s_ = memory_.take(kDecodeRows * kBlock);
    o_ld_ = round_up(p.value_dim, kLanes);
    o_ = memory_.take(kDecodeRows * o_ld_);
    if (p.mask || p.bias) additive_ = memory_.take(kDecodeRows * kBlock);
    if (p.dropout) keep_ = memory_.take(kBlock + 8 * kLanes);
  }

  void run(const Head& head, int64_t part, float* partial) {
    if (head.rows == 1) {
      attend<1>(head, part, partial);
    } else if (head.rows == 2) {
      attend<2>(head, part, partial);
    } else {
      attend<kDecodeRows>(head, part, partial);
    }
  }

 private:
  template <int R>
  void attend(const Head& head, int64_t part, float* partial) {
    load_queries(head, R);
    std::fill_n(o_, R * o_ld_, 0.0f);
    std::fill_n(max_, kDecodeRows, -kInfinity);
    std::fill_n(sum_, kDecodeRows * kLanes, 0.0f);
    const int64_t lo = std::max(head.lo, part * head.chunk), hi = std::min(head.hi, (part + 1) * head.chunk);
    const bool* all_holes = p_.holes(head.b);
    const int64_t b = p_.varlen ? 0 : head.b, offset = p_.first_key(head.b);
    for (int64_t first = lo / kBlock * kBlock; first < hi; first += kBlock) {
      const int64_t from = std::max(lo, first), count = std::min(hi, first + kBlock) - from;
      const bool* holes = all_holes ? all_holes + from : nullptr;
      if (holes && std::find(holes, holes + count, true) == holes + count) continue;
      if (additive_ && !add_up(head, from, count)) continue;
      left_ = p_.key_count(head.b) - from;
      // Queries, keys and values need not have one type: a norm may have widened some of them.
      with_type(p_.k.dtype, [&](auto tag) {
        using T = decltype(tag);
        score<R>(reinterpret_cast<const T*>(p_.k.at(b, head.kv_head, offset + from)), count, holes);
      });
      for (int64_t r = 0; r < R; ++r) {
        if (r < head.rows) {
          weigh(head, r, from, count, holes);
        } else {
          std::fill_n(s_ + r * kBlock, kBlock, 0.0f);
        }
      }
      with_type(p_.v.dtype, [&](auto tag) {
        using T = decltype(tag);
        add_values<R>(reinterpret_cast<const T*>(p_.v.at(b, head.kv_head, offset + from)), count, head.rows,
                      holes != nullptr || p_.masked_by_row());
      });
    }
    for (int64_t r = 0; r < head.rows; ++r) {
      float* to = partial + r * partial_row(p_);
      std::copy_n(o_ + r * o_ld_, o_ld_, to);
      to[o_ld_] = max_[r];
      to[o_ld_ + 1] = simd::sum_lanes(simd::load(sum_ + r * kLanes));
    }
  }

  void load_queries(const Head& head, int64_t rows) {
    const float factor = query_factor(p_);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = q_ + r * p_.head_dim;
      if (r >= head.rows) {
        std::fill_n(to, p_.head_dim, 0.0f);
        continue;
      }
      const char* row = p_.q.at(p_.varlen ? 0 : head.b, head.head(p_, r), p_.first_query(head.b) + head.query(r));
      with_type(p_.q.dtype, [&](auto tag) {
        const auto* from = reinterpret_cast<const decltype(tag)*>(row);
        for (int64_t d = 0; d < p_.head_dim; ++d) to[d] = simd::to_float(from[d]) * factor;
      });
    }
  }

  // Bias and mask of a block, -inf where they hide a key. Returns whether any key is left to any row: NaN hides none.
  bool add_up(const Head& head, int64_t from, int64_t count) {
    simd::VecMask visible(false);
    for (int64_t r = 0; r < head.rows; ++r) {
      const int64_t h = head.head(p_, r), i = head.query(r);
      const char* mask = p_.mask ? p_.mask.row(head.b, h, i) : nullptr;
      for (int64_t j = 0; j < count; j += kLanes) {
        const int wide = static_cast<int>(std::min<int64_t>(count - j, kLanes));
        Vec x = simd::zero();
        if (p_.bias) {
          with_type(p_.bias.dtype, [&](auto tag) {
            using T = decltype(tag);
            x = bias_of_row(reinterpret_cast<const T*>(p_.bias.row(head.b, h, i)), p_.bias.stride[3], from + j, wide);
          });
        }
        if (mask) x = masked_by(mask, p_.mask.stride[3], from + j, wide, x);
        visible = visible || (x != Vec(-kInfinity) && simd::first_lanes(wide));
        simd::store(additive_ + r * kBlock + j, x);
      }
    }
    return simd::stdx::any_of(visible);
  }

  void prefetch(const void* first, int64_t step, int64_t row, int64_t at) const {
    const int64_t ahead = row + kAhead;
    if (ahead < left_) __builtin_prefetch(static_cast<const char*>(first) + ahead * step + at, 0, 2);
  }

  // s[r][j] = the product of query row r and key j, as it is.
  template <int R, class T>
  void score(const T* keys, int64_t count, const bool* holes) {
    const int64_t columns = p_.head_dim, step = p_.k.row;
    for (int64_t j = 0; j < count; j += kLanes) {
      const int tall = static_cast<int>(std::min<int64_t>(count - j, kLanes));
      const bool whole = tall == kLanes && holes == nullptr;
      const T* rows = keys + j * step;
      Vec sum[R], earlier[R];
      simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA { sum[r] = earlier[r] = simd::zero(); });
      for (int64_t d = 0; d < columns; d += kLanes) {
        if (d % simd::kDepthBlock == 0 && d > 0) {
          simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
            earlier[r] += sum[r];
            sum[r] = simd::zero();
          });
        }
        const int wide = static_cast<int>(std::min<int64_t>(columns - d, kLanes));
        if (d * sizeof(T) % 64 == 0) {
          for (int l = 0; l < kLanes; ++l)
            prefetch(keys, step * static_cast<int64_t>(sizeof(T)), j + l, d * static_cast<int64_t>(sizeof(T)));
        }
        Vec block[kLanes];
        if (whole && wide == kLanes) {
          simd::unroll<kLanes>([&](auto l) VELM_INLINE_LAMBDA { block[l] = simd::load(rows + l * step + d); });
          simd::transpose(block);
          simd::unroll<kLanes>([&](auto i) VELM_INLINE_LAMBDA {
            simd::unroll<R>(
                [&](auto r) VELM_INLINE_LAMBDA { sum[r] = simd::fma(block[i], Vec(q_[r * columns + d + i]), sum[r]); });
          });
          continue;
        }
        for (int l = 0; l < kLanes; ++l) {
          const bool seen = l < tall && (holes == nullptr || holes[j + l]);
          block[l] = seen ? simd::load_first(rows + l * step + d, wide) : simd::zero();
        }
        simd::transpose(block);
        for (int i = 0; i < wide; ++i) {
          for (int r = 0; r < R; ++r) sum[r] = simd::fma(block[i], Vec(q_[r * columns + d + i]), sum[r]);
        }
      }
      simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA { simd::store(s_ + r * kBlock + j, earlier[r] + sum[r]); });
    }
  }

  // Products of row r become weights relative to its running maximum; what the row has so far is scaled to it.
  void weigh(const Head& head, int64_t r, int64_t from, int64_t count, const bool* holes) {
    float* s = s_ + r * kBlock;
    const Range range = p_.range(head.b, head.query(r));
    const int64_t lo = std::clamp<int64_t>(range.lo - from, 0, count),
                  hi = std::clamp<int64_t>(range.hi - from, 0, count);
    const Vec lane = simd::stdx::static_simd_cast<Vec>(simd::lane_index());
    Vec top(-kInfinity);
    for (int64_t j = 0; j < count; j += kLanes) {
      Vec x = simd::load(s + j);
      if (p_.softcap > 0) x = simd::tanh(x) * p_.softcap;
      if (additive_) {
        const Vec e = simd::load(additive_ + r * kBlock + j);
        x = simd::select(e == Vec(-kInfinity), Vec(-kInfinity), x + e);
      }
      if (holes) {
        const int wide = static_cast<int>(std::min<int64_t>(count - j, kLanes));
        x = masked_by(reinterpret_cast<const char*>(holes), 1, j, wide, x);
      }
      if (lo > j || hi < j + kLanes) {
        const Vec key = lane + static_cast<float>(j);
        x = simd::select((key >= Vec(static_cast<float>(lo))) && (key < Vec(static_cast<float>(hi))), x,
                         Vec(-kInfinity));
      }
      // Of NaN the earlier maximum stays, so that hidden keys keep the weight 0; it comes out of the exponentials.
      top = simd::maximum(x, top);
      simd::store(s + j, x);
    }
    const float highest = std::max(max_[r], simd::max_lanes(top));
    // A row that has seen nothing yet keeps -inf as its maximum.
    const float base = simd::base_of(highest);
    const float alpha = std::exp(max_[r] - base);
    max_[r] = highest;
    Vec sum = simd::load(sum_ + r * kLanes) * alpha;
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec x = simd::load(s + j), e = simd::exp(x - base);
      sum += e;
      // The sign of a weight of 0 says that its key is hidden.
      simd::store(s + j, simd::select(x == Vec(-kInfinity), Vec(-0.0f), e));
    }
    simd::store(sum_ + r * kLanes, sum);
    if (alpha != 1.0f) {
      float* o = o_ + r * o_ld_;
      for (int64_t d = 0; d < o_ld_; d += kLanes) simd::store(o + d, simd::load(o + d) * alpha);
    }
    if (p_.dropout) drop(head, r, from, count);
  }

  void drop(const Head& head, int64_t r, int64_t from, int64_t count) {
    const simd::VecUint query(static_cast<uint32_t>(head.query(r)));
    const simd::VecUint index(static_cast<uint32_t>(head.b * p_.heads + head.head(p_, r)));
    const int64_t quad = from / 4;
    for (int64_t i = 0; (quad + i) * 4 < from + count; i += kLanes) {
      simd::VecUint word[4] = {
          query, simd::VecUint([&](auto l) { return static_cast<uint32_t>(quad + i + static_cast<int64_t>(l)); }),
          index, simd::VecUint(0u)};
      simd::philox(word, p_.seed);
      for (int w = 0; w < 4; ++w) {
        float t[kLanes];
        simd::store(t, simd::select(simd::at_least(word[w], p_.dropout_below), Vec(p_.dropout_scale), simd::zero()));
        for (int l = 0; l < kLanes; ++l) keep_[(i + l) * 4 + w] = t[l];
      }
    }
    float* s = s_ + r * kBlock;
    for (int64_t j = 0; j < count; ++j)
      s[j] = keep_[from - quad * 4 + j] == 0.0f ? std::copysign(0.0f, s[j]) : s[j] * p_.dropout_scale;
  }

  // o[r] += the weighted sum of values. Where `careful`, hidden values, of weight -0, are left out: they may be
  // anything.
  template <int R, class T>
  void add_values(const T* values, int64_t count, int64_t rows, bool careful) {
    const int64_t columns = p_.value_dim, step = p_.v.row;
    const int64_t whole_columns = columns / kLanes * kLanes;
    for (int64_t j = 0; j < count; j += kRun) {
      const T* from = values + j * step;
      const float* weights = s_ + j;
      const int n = static_cast<int>(std::min<int64_t>(count - j, kRun));
      bool whole = n == kRun;
      if (careful) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int i = 0; i < n; ++i) whole = whole && !std::signbit(weights[r * kBlock + i]);
        }
      }
      if (!whole) {
        for (int i = 0; i < n; ++i) {
          for (int64_t r = 0; r < rows; ++r) {
            const float w = weights[r * kBlock + i];
            if (careful && std::signbit(w)) continue;
            float* o = o_ + r * o_ld_;
            for (int64_t d = 0; d < columns; d += kLanes) {
              const int wide = static_cast<int>(std::min<int64_t>(columns - d, kLanes));
              simd::store(o + d, simd::fma(Vec(w), simd::load_first(from + i * step + d, wide), simd::load(o + d)));
            }
          }
        }
        continue;
      }
      const auto add = [&](int64_t d, auto&& read) VELM_INLINE_LAMBDA {
        Vec x[kRun];
        simd::unroll<kRun>([&](auto i) VELM_INLINE_LAMBDA { x[i] = read(from + i * step + d); });
        simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
          float* o = o_ + r * o_ld_ + d;
          Vec sum = simd::load(o);
          simd::unroll<kRun>([&](auto i)
                                 VELM_INLINE_LAMBDA { sum = simd::fma(x[i], Vec(weights[r * kBlock + i]), sum); });
          simd::store(o, sum);
        });
      };
      for (int64_t d = 0; d < whole_columns; d += kLanes) {
        if (d * sizeof(T) % 64 == 0) {
          for (int i = 0; i < kRun; ++i)
            prefetch(values, step * static_cast<int64_t>(sizeof(T)), j + i, d * static_cast<int64_t>(sizeof(T)));
        }
        add(d, [](const T* at) VELM_INLINE_LAMBDA { return simd::load(at); });
      }
      if (whole_columns < columns) {
        const int wide = static_cast<int>(columns - whole_columns);
        add(whole_columns, [&](const T* at) VELM_INLINE_LAMBDA { return simd::load_first(at, wide); });
      }
    }
  }

  const Problem& p_;
  simd::FlushSubnormals flush_;
  simd::Scratch memory_;
  int64_t o_ld_, left_ = 0;
  float *q_, *s_, *o_, *additive_ = nullptr, *keep_ = nullptr;
  float max_[kDecodeRows];
  alignas(64) float sum_[kDecodeRows * kLanes];
};

// Puts the chunks of a key head together, in order.
void merge(const Problem& p, const Head& head, const float* partials, const Rows& out, float* logsumexp) {
  const int64_t ld = partial_row(p), at = round_up(p.value_dim, kLanes);
  std::vector<float> factor(static_cast<size_t>(head.parts));
  for (int64_t r = 0; r < head.rows; ++r) {
    const auto part = [&](int64_t c) { return partials + (c * head.rows + r) * ld; };
    float highest = -kInfinity;
    for (int64_t c = 0; c < head.parts; ++c) highest = std::max(highest, part(c)[at]);
    const float base = simd::base_of(highest);
    float sum = 0.0f;
    for (int64_t c = 0; c < head.parts; ++c) {
      factor[c] = std::exp(part(c)[at] - base);
      sum += factor[c] * part(c)[at + 1];
    }
    const bool empty = sum == 0.0f;
    const int64_t h = head.head(p, r), i = head.query(r);
    // Where all that a row sees has the score -inf, softmax divides 0 by 0.
    const float inverse = !empty ? 1.0f / sum : p.sees_any(head.b, h, i) ? kNaN : 0.0f;
    logsumexp[p.row_index(head.b, h, i)] = empty ? -kInfinity : highest + std::log(sum);
    with_type(out.dtype, [&](auto tag) {
      using T = decltype(tag);
      T* row = reinterpret_cast<T*>(out.mutable_at(p.varlen ? 0 : head.b, h, p.first_query(head.b) + i));
      for (int64_t d = 0; d < p.value_dim; d += kLanes) {
        Vec x = simd::zero();
        for (int64_t c = 0; c < head.parts; ++c) x = simd::fma(simd::load(part(c) + d), Vec(factor[c]), x);
        simd::store_first(row + d, x * inverse, static_cast<int>(std::min<int64_t>(p.value_dim - d, kLanes)));
      }
    });
  }
}

}  // namespace

void decode(const Problem& p, const Rows& out, float* logsumexp) {
  std::vector<Head> heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (!decodes(p, b)) continue;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      if (p.query_count(b) > 0 && p.group > 0) heads.emplace_back(p, b, h);
    }
  }
  if (heads.empty()) return;
  const int64_t shares = (kShares + static_cast<int64_t>(heads.size()) - 1) / static_cast<int64_t>(heads.size());
  std::vector<Item> items;
  int64_t size = 0;
  for (size_t i = 0; i < heads.size(); ++i) {
    Head& head = heads[i];
    head.chunk = std::max(kLeastChunk, round_up((head.hi + shares - 1) / shares, kBlock));
    head.parts = std::max<int64_t>(1, (head.hi + head.chunk - 1) / head.chunk);
    head.partial = size;
    size += head.parts * head.rows * partial_row(p);
    for (int64_t c = 0; c < head.parts; ++c) items.push_back({static_cast<int64_t>(i), c});
  }
  simd::Scratch memory;
  float* partials = memory.take(size);
  simd::parallel_workers(
      static_cast<int64_t>(items.size()), [&] { return Worker(p); },
      [&](Worker& worker, int64_t i) {
        const Head& head = heads[items[i].head];
        worker.run(head, items[i].part, partials + head.partial + items[i].part * head.rows * partial_row(p));
      });
  for (const Head& head : heads) merge(p, head, partials + head.partial, out, logsumexp);
}

}  // namespace velm::attention
