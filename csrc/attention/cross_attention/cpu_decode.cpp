// Attention of few rows: every key and value is read once, where it lies, for all rows together. Lanes run along the
// keys in scores and weights, and along the values in the output.
//
// A score is summed over head_dim in the order of simd::product, so that the backward pass recomputes the same bits.
// The instruction that multiplies pairs of bfloat16 was tried: calls of 4 and 8 rows over cached keys took 1.4 times as
// long with it on a processor with AMX.
//
// What this takes is the time to read keys and values. Heads whose keys lie side by side in memory are gone through
// together, block of keys by block, so that memory is read in the order of its addresses; what comes next is asked for
// in that order too. Processors follow such a stream by themselves, and far ahead, where they do not follow short rows
// of one head that lie pages apart.
#include "attention/cross_attention/cpu_decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/cross_attention/cpu_scores.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm::attention {

namespace {

// Keys between two updates of the running maxima, at the most.
constexpr int64_t kBlock = 128;
// Accumulators of the output: its vectors times rows.
constexpr int kAccumulators = simd::kRegisters / 2;
// Bytes that the heads of a group have side by side in a row of keys: two pages, of which a processor fetches all once
// it has seen a part be read.
constexpr int64_t kGroupBytes = 8192;
// Bytes of keys and values of a block of a group: two blocks, this one and the next, stay in a second-level cache.
constexpr int64_t kBlockBytes = 1 << 18, kLeastBlock = 16;
// The keys of a group are cut into chunks of at least so many bytes of keys and values, and at most so many chunks.
constexpr int64_t kChunkBytes = 1 << 18, kMostChunks = 64;
// Numbers of partial results that one thread puts together at the least.
constexpr int64_t kMergeFloats = 1 << 15;
static_assert(kBlock % kLanes == 0 && kLeastBlock % kLanes == 0);

// Key heads of a batch entry that are gone through together.
struct Group {
  int64_t b, first, heads;
  int64_t rows, per_head;  // of one key head, and of one head
  int64_t lo, hi;          // union of what the rows see
  int64_t block;           // keys between two updates of the running maxima
  int64_t chunk, parts;    // keys of a chunk, number of chunks
  int64_t partial;         // where its partial results begin

  Group(const Problem& p, int64_t batch, int64_t kv_head, int64_t count)
      : b(batch),
        first(kv_head),
        heads(count),
        rows(p.group * p.query_count(batch)),
        per_head(p.query_count(batch)),
        lo(0),
        hi(0) {
    for (int64_t i = 0; i < per_head; ++i) {
      const Range r = p.range(b, i);
      if (r.hi <= r.lo) continue;
      lo = hi == 0 ? r.lo : std::min<int64_t>(lo, r.lo);
      hi = std::max<int64_t>(hi, r.hi);
    }
  }
  // Head and query of row r of key head h of the group.
  int64_t head(const Problem& p, int64_t h, int64_t r) const { return (first + h) * p.group + r / per_head; }
  int64_t query(int64_t r) const { return r % per_head; }
};

struct Item {
  int64_t group, part;
};

// Sizes of a partial result: an output row, then its maximum and sum.
int64_t partial_row(const Problem& p) {
  return round_up(p.value_dim, kLanes) + kLanes;
}

// Bytes of a row of one head, and from a head to the next.
int64_t row_bytes(const Rows& rows, int64_t columns) {
  return columns * element_size(rows.dtype);
}
int64_t head_bytes(const Rows& rows) {
  return rows.head * element_size(rows.dtype);
}

// Heads that are gone through together.
int64_t heads_of_group(const Problem& p) {
  const auto most = [&](const Rows& rows, int64_t columns) -> int64_t {
    const int64_t row = row_bytes(rows, columns), head = head_bytes(rows);
    // Keys and values of a head may take turns, but what else lies between is not to be read.
    if (head < row || head > 2 * row || rows.row < rows.head * p.kv_heads) return 1;
    return kGroupBytes / head;
  };
  return std::clamp<int64_t>(std::min(most(p.k, p.head_dim), most(p.v, p.value_dim)), 1, p.kv_heads);
}

// Asks for the lines of a run of rows, in the order of their addresses, some lines at a time.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const char* first, int64_t step, int64_t length, int64_t rows)
      : row_(first), step_(step), length_(length), rows_(rows) {
    if (step == length) {
      length_ *= rows;
      rows_ = std::min<int64_t>(rows, 1);
    }
  }
  // As many bytes more as were used meanwhile.
  VELM_INLINE void ask(int64_t bytes) {
    owed_ += bytes;
    if (owed_ >= kAtOnce * kLine) fetch();
  }

 private:
  static constexpr int64_t kLine = 64, kAtOnce = 8;

  __attribute__((noinline)) void fetch() {
    while (owed_ >= kLine && rows_ > 0) {
      const int64_t lines = std::min(owed_ / kLine, (length_ - at_ + kLine - 1) / kLine);
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(row_ + at_ + i * kLine, 0, 2);
      owed_ -= lines * kLine;
      at_ += lines * kLine;
      if (at_ < length_) continue;
      at_ = 0;
      row_ += step_;
      --rows_;
    }
  }

  const char* row_ = nullptr;
  int64_t step_ = 0, length_ = 0, rows_ = 0, at_ = 0, owed_ = 0;
};

class Worker {
 public:
  Worker(const Problem& p, int64_t heads, int64_t rows) : p_(p) {
    const int64_t all = heads * rows;
    q_ = memory_.take(all * p.head_dim);
    s_ = memory_.take(rows * kBlock);
    o_ld_ = round_up(p.value_dim, kLanes);
    o_ = memory_.take(all * o_ld_);
    max_ = memory_.take(all);
    sum_ = memory_.take(all * kLanes);
    if (p.mask || p.bias) additive_ = memory_.take(rows * kBlock);
    if (p.dropout) keep_ = memory_.take(kBlock + 8 * kLanes);
  }

  void run(const Group& group, int64_t part, float* partial) {
    if (group.rows == 1) {
      attend<1>(group, part, partial);
    } else if (group.rows == 2) {
      attend<2>(group, part, partial);
    } else if (group.rows <= 4) {
      attend<4>(group, part, partial);
    } else {
      attend<kDecodeRows>(group, part, partial);
    }
  }

 private:
  template <int R>
  void attend(const Group& group, int64_t part, float* partial) {
    begin_group<R>(group);
    std::fill_n(o_, group.heads * R * o_ld_, 0.0f);
    std::fill_n(max_, group.heads * R, -kInfinity);
    std::fill_n(sum_, group.heads * R * kLanes, 0.0f);
    const int64_t lo = group.lo + part * group.chunk, hi = std::min(group.hi, lo + group.chunk);
    begin_streams(group, lo, hi);
    group_ = &group;
    hi_ = hi;
    const bool* all_holes = p_.holes(group.b);
    for (int64_t from = lo; from < hi; from += group.block) {
      const int64_t count = std::min(hi - from, group.block);
      const bool* holes = all_holes ? all_holes + from : nullptr;
      const bool hidden = holes && std::find(holes, holes + count, true) == holes + count;
      for (int64_t h = 0; h < group.heads; ++h) {
        if (hidden || !attend_block<R>(group, h, from, count, holes)) pass_by(count);
      }
    }
    for (int64_t h = 0; h < group.heads; ++h) {
      for (int64_t r = 0; r < group.rows; ++r, partial += partial_row(p_)) {
        std::copy_n(o_ + (h * R + r) * o_ld_, o_ld_, partial);
        partial[o_ld_] = max_[h * R + r];
        partial[o_ld_ + 1] = simd::sum_lanes(simd::load(sum_ + (h * R + r) * kLanes));
      }
    }
  }

  // Keys and values of one head; returns false where all of them are hidden from all rows.
  template <int R>
  bool attend_block(const Group& group, int64_t h, int64_t from, int64_t count, const bool* holes) {
    if (additive_ && !add_up(group, h, from, count)) return false;
    const int64_t b = p_.varlen ? 0 : group.b, at = p_.first_key(group.b) + from;
    // Queries, keys and values need not have one type: a norm may have widened some of them.
    with_type(p_.k.dtype, [&](auto tag) {
      using T = decltype(tag);
      score<R>(q_ + h * R * p_.head_dim, reinterpret_cast<const T*>(p_.k.at(b, group.first + h, at)), count, holes);
    });
    float alpha[R];
    for (int64_t r = 0; r < R; ++r) {
      alpha[r] = 1.0f;
      if (r < group.rows) {
        alpha[r] = weigh(group, h, r, h * R + r, from, count, holes);
      } else {
        std::fill_n(s_ + r * kBlock, kBlock, 0.0f);
      }
    }
    with_type(p_.v.dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* values = reinterpret_cast<const T*>(p_.v.at(b, group.first + h, at));
      float* o = o_ + h * R * o_ld_;
      // Hidden values may be anything.
      if (holes || p_.masked_by_row()) {
        add_values<R, true>(o, alpha, values, count);
      } else {
        add_values<R, false>(o, alpha, values, count);
      }
    });
    return true;
  }

  // What is asked for keeps its distance where keys of a head are not read.
  void pass_by(int64_t count) {
    keys_ahead_.ask(count * row_bytes(p_.k, p_.head_dim));
    values_ahead_.ask(count * row_bytes(p_.v, p_.value_dim));
  }

  // What is asked for runs a block ahead of what is used, as far as the last key of the group. Keys that follow those
  // of the chunk before have been asked for.
  void begin_streams(const Group& group, int64_t lo, int64_t hi) {
    if (lo >= hi || (&group == group_ && lo == hi_)) return;
    const int64_t b = p_.varlen ? 0 : group.b, at = p_.first_key(group.b) + lo;
    const auto begin = [&](const Rows& rows, int64_t columns) {
      const int64_t length = (group.heads - 1) * head_bytes(rows) + row_bytes(rows, columns);
      Prefetch ahead(rows.at(b, group.first, at), rows.row * element_size(rows.dtype), length, group.hi - lo);
      ahead.ask(group.block * length);
      return ahead;
    };
    keys_ahead_ = begin(p_.k, p_.head_dim);
    values_ahead_ = begin(p_.v, p_.value_dim);
  }

  // The R rows of a head side by side, step by step of head_dim: a step's numbers lie at fixed distances from one
  // address, so that no row's address takes a register.
  template <int R>
  void begin_group(const Group& group) {
    if (&group == group_) return;
    const float factor = query_factor(p_);
    std::fill_n(q_, group.heads * R * p_.head_dim, 0.0f);
    for (int64_t h = 0; h < group.heads; ++h) {
      for (int64_t r = 0; r < group.rows; ++r) {
        float* to = q_ + h * R * p_.head_dim + r;
        const char* row =
            p_.q.at(p_.varlen ? 0 : group.b, group.head(p_, h, r), p_.first_query(group.b) + group.query(r));
        with_type(p_.q.dtype, [&](auto tag) {
          const auto* from = reinterpret_cast<const decltype(tag)*>(row);
          for (int64_t d = 0; d < p_.head_dim; ++d) to[d * R] = simd::to_float(from[d]) * factor;
        });
      }
    }
  }

  // Bias and mask of a block, -inf where they hide a key. Returns whether any key is left to any row: NaN hides none.
  bool add_up(const Group& group, int64_t kv, int64_t from, int64_t count) {
    simd::VecMask visible(false);
    for (int64_t r = 0; r < group.rows; ++r) {
      const int64_t h = group.head(p_, kv, r), i = group.query(r);
      const char* mask = p_.mask ? p_.mask.row(group.b, h, i) : nullptr;
      for (int64_t j = 0; j < count; j += kLanes) {
        const int width = static_cast<int>(std::min<int64_t>(count - j, kLanes));
        Vec x = simd::zero();
        if (p_.bias) {
          with_type(p_.bias.dtype, [&](auto tag) {
            using T = decltype(tag);
            x = bias_of_row(reinterpret_cast<const T*>(p_.bias.row(group.b, h, i)), p_.bias.stride[3], from + j, width);
          });
        }
        if (mask) x = masked_by(mask, p_.mask.stride[3], from + j, width, x);
        visible = visible || (x != Vec(-kInfinity) && simd::first_lanes(width));
        simd::store(additive_ + r * kBlock + j, x);
      }
    }
    return simd::stdx::any_of(visible);
  }

  // s[r][j] = the product of query row r and key j, as it is.
  template <int R, class T>
  void score(const float* queries, const T* keys, int64_t count, const bool* holes) {
    const int64_t columns = p_.head_dim, step = p_.k.row;
    for (int64_t j = 0; j < count; j += kLanes) {
      const int height = static_cast<int>(std::min<int64_t>(count - j, kLanes));
      const bool whole = height == kLanes && holes == nullptr;
      const T* rows = keys + j * step;
      for (int64_t first = 0; first < columns; first += simd::kDepthBlock) {
        const int64_t last = std::min(columns, first + simd::kDepthBlock);
        Vec sum[R];
        simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA { sum[r] = simd::zero(); });
        int64_t d = first;
        if (whole) {
          for (; d + kDepth<T> <= last; d += kDepth<T>) {
            keys_ahead_.ask(kDepth<T> * kLanes * static_cast<int64_t>(sizeof(T)));
            multiply_square<R>(sum, rows + d, step, queries + d * R);
          }
        }
        for (; d < last; d += kLanes) {
          const int width = static_cast<int>(std::min<int64_t>(last - d, kLanes));
          keys_ahead_.ask(width * height * static_cast<int64_t>(sizeof(T)));
          Vec block[kLanes];
          for (int l = 0; l < kLanes; ++l) {
            const bool seen = l < height && (holes == nullptr || holes[j + l]);
            block[l] = seen ? simd::load_first(rows + l * step + d, width) : simd::zero();
          }
          simd::transpose(block);
          for (int i = 0; i < width; ++i) {
            for (int r = 0; r < R; ++r) sum[r] = simd::fma(block[i], Vec(queries[(d + i) * R + r]), sum[r]);
          }
        }
        simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
          float* s = s_ + r * kBlock + j;
          simd::store(s, first == 0 ? sum[r] : simd::load(s) + sum[r]);
        });
      }
    }
  }

  // Steps of head_dim in a vector of kLanes words: bfloat16 is transposed in pairs.
  template <class T>
  static constexpr int kDepth = std::is_same_v<T, simd::bf16> ? 2 * kLanes : kLanes;

  // sum[r] += query row r times kDepth steps of kLanes keys.
  template <int R, class T>
  static VELM_INLINE void multiply_square(Vec (&sum)[R], const T* rows, int64_t step, const float* queries) {
    const auto add = [&](int64_t d, Vec x) VELM_INLINE_LAMBDA {
      simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA { sum[r] = simd::fma(x, Vec(queries[d * R + r]), sum[r]); });
    };
    if constexpr (std::is_same_v<T, simd::bf16>) {
      simd::VecUint block[kLanes];
      simd::unroll<kLanes>([&](auto l) VELM_INLINE_LAMBDA {
        block[l] = simd::load_words(reinterpret_cast<const uint32_t*>(rows + l * step));
      });
      simd::transpose(block);
      simd::unroll<kLanes>([&](auto i) VELM_INLINE_LAMBDA {
        add(2 * i, simd::float_of(block[i] << 16));
        add(2 * i + 1, simd::float_of(block[i] & 0xffff0000u));
      });
    } else {
      Vec block[kLanes];
      simd::unroll<kLanes>([&](auto l) VELM_INLINE_LAMBDA { block[l] = simd::load(rows + l * step); });
      simd::transpose(block);
      simd::unroll<kLanes>([&](auto i) VELM_INLINE_LAMBDA { add(i, block[i]); });
    }
  }

  // Products of row r become weights relative to its running maximum. Returns the factor of what the row has so far.
  float weigh(const Group& group, int64_t h, int64_t r, int64_t row, int64_t from, int64_t count, const bool* holes) {
    float* s = s_ + r * kBlock;
    const Range range = p_.range(group.b, group.query(r));
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
        const int width = static_cast<int>(std::min<int64_t>(count - j, kLanes));
        x = masked_by(reinterpret_cast<const char*>(holes), 1, j, width, x);
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
    const float highest = std::max(max_[row], simd::max_lanes(top));
    // A row that has seen nothing yet keeps -inf as its maximum.
    const float base = simd::base_of(highest);
    const float alpha = highest == max_[row] ? 1.0f : std::exp(max_[row] - base);
    max_[row] = highest;
    Vec sum = simd::load(sum_ + row * kLanes) * alpha;
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec x = simd::load(s + j), e = simd::exp(x - base);
      sum += e;
      // The sign of a weight of 0 says that its key is hidden.
      simd::store(s + j, simd::select(x == Vec(-kInfinity), Vec(-0.0f), e));
    }
    simd::store(sum_ + row * kLanes, sum);
    if (p_.dropout) drop(group, h, r, from, count);
    return alpha;
  }

  void drop(const Group& group, int64_t h, int64_t r, int64_t from, int64_t count) {
    const simd::VecUint query(static_cast<uint32_t>(group.query(r)));
    const simd::VecUint index(static_cast<uint32_t>(group.b * p_.heads + group.head(p_, h, r)));
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

  // o[r] = alpha[r] * o[r] + the weighted sum of values. Where Careful, hidden ones, of weight -0, are left out.
  template <int R, bool Careful, class T>
  void add_values(float* o, const float* alpha, const T* values, int64_t count) {
    int64_t d = 0;
    add_strips<R, std::min(8, kAccumulators / R), Careful>(d, o, alpha, values, count);
    if (d < p_.value_dim) {
      const int width = static_cast<int>(p_.value_dim - d);
      add_strip<R, 1, Careful>(o + d, alpha, values + d, count,
                               [&](const T* at) VELM_INLINE_LAMBDA { return simd::load_first(at, width); });
    }
  }

  template <int R, int S, bool Careful, class T>
  VELM_INLINE void add_strips(int64_t& d, float* o, const float* alpha, const T* values, int64_t count) {
    for (; d + S * kLanes <= p_.value_dim; d += S * kLanes) {
      add_strip<R, S, Careful>(o + d, alpha, values + d, count,
                               [](const T* at) VELM_INLINE_LAMBDA { return simd::load(at); });
    }
    if constexpr (S > 1) add_strips<R, S / 2, Careful>(d, o, alpha, values, count);
  }

  template <int R, int S, bool Careful, class T, class Read>
  VELM_INLINE void add_strip(float* o, const float* alpha, const T* values, int64_t count, const Read& read) {
    const int64_t step = p_.v.row,
                  bytes = std::min<int64_t>(S * kLanes, p_.value_dim) * static_cast<int64_t>(sizeof(T));
    Vec sum[R][S];
    simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      simd::unroll<S>([&](auto v) VELM_INLINE_LAMBDA { sum[r][v] = simd::zero(); });
    });
    for (int64_t j = 0; j < count; ++j, values += step) {
      if (j % kLanes == 0) values_ahead_.ask(std::min<int64_t>(count - j, kLanes) * bytes);
      Vec x[S];
      simd::unroll<S>([&](auto v) VELM_INLINE_LAMBDA { x[v] = read(values + v * kLanes); });
      simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
        const float weight = s_[r * kBlock + j];
        if (Careful && std::signbit(weight)) return;
        simd::unroll<S>([&](auto v) VELM_INLINE_LAMBDA { sum[r][v] = simd::fma(x[v], Vec(weight), sum[r][v]); });
      });
    }
    simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      simd::unroll<S>([&](auto v) VELM_INLINE_LAMBDA {
        float* to = o + r * o_ld_ + v * kLanes;
        simd::store(to, simd::fma(simd::load(to), Vec(alpha[r]), sum[r][v]));
      });
    });
  }

  const Problem& p_;
  simd::FlushSubnormals flush_;
  simd::Scratch memory_;
  Prefetch keys_ahead_, values_ahead_;
  // Of the chunk before.
  const Group* group_ = nullptr;
  int64_t hi_ = 0;
  int64_t o_ld_;
  float *q_, *s_, *o_, *max_, *sum_, *additive_ = nullptr, *keep_ = nullptr;
};

// Puts the chunks of rows [first, last) of a group together, in order.
void merge(const Problem& p, const Group& group, const float* partials, const Rows& out, float* logsumexp,
           int64_t first, int64_t last) {
  const int64_t ld = partial_row(p), at = round_up(p.value_dim, kLanes), all = group.heads * group.rows;
  float factor[kMostChunks];
  for (int64_t r = first; r < last; ++r) {
    const auto part = [&](int64_t c) { return partials + (c * all + r) * ld; };
    float highest = -kInfinity;
    for (int64_t c = 0; c < group.parts; ++c) highest = std::max(highest, part(c)[at]);
    const float base = simd::base_of(highest);
    float sum = 0.0f;
    for (int64_t c = 0; c < group.parts; ++c) {
      factor[c] = std::exp(part(c)[at] - base);
      sum += factor[c] * part(c)[at + 1];
    }
    const bool empty = sum == 0.0f;
    const int64_t h = group.head(p, r / group.rows, r % group.rows), i = group.query(r % group.rows);
    // Where all that a row sees has the score -inf, softmax divides 0 by 0.
    const float inverse = !empty ? 1.0f / sum : p.sees_any(group.b, h, i) ? kNaN : 0.0f;
    logsumexp[p.row_index(group.b, h, i)] = empty ? -kInfinity : highest + std::log(sum);
    with_type(out.dtype, [&](auto tag) {
      using T = decltype(tag);
      T* row = reinterpret_cast<T*>(out.mutable_at(p.varlen ? 0 : group.b, h, p.first_query(group.b) + i));
      for (int64_t d = 0; d < p.value_dim; d += kLanes) {
        Vec x = simd::zero();
        for (int64_t c = 0; c < group.parts; ++c) x = simd::fma(simd::load(part(c) + d), Vec(factor[c]), x);
        simd::store_first(row + d, x * inverse, static_cast<int>(std::min<int64_t>(p.value_dim - d, kLanes)));
      }
    });
  }
}

}  // namespace

void decode(const Problem& p, const Rows& out, float* logsumexp) {
  const int64_t together = heads_of_group(p);
  std::vector<Group> groups;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (!decodes(p, b) || p.query_count(b) == 0 || p.group == 0) continue;
    for (int64_t h = 0; h < p.kv_heads; h += together) groups.emplace_back(p, b, h, std::min(together, p.kv_heads - h));
  }
  if (groups.empty()) return;
  std::vector<Item> items;
  int64_t size = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    Group& group = groups[i];
    const int64_t bytes = group.heads * (row_bytes(p.k, p.head_dim) + row_bytes(p.v, p.value_dim));
    group.block = std::clamp(kBlockBytes / bytes / kLanes * kLanes, kLeastBlock, kBlock);
    const int64_t keys = group.hi - group.lo;
    const int64_t parts = std::clamp<int64_t>(keys * bytes / kChunkBytes, 1, kMostChunks);
    group.chunk = std::max<int64_t>(kLeastBlock, round_up((keys + parts - 1) / parts, kLeastBlock));
    group.parts = std::max<int64_t>(1, (keys + group.chunk - 1) / group.chunk);
    group.partial = size;
    size += group.parts * group.heads * group.rows * partial_row(p);
    for (int64_t c = 0; c < group.parts; ++c) items.push_back({static_cast<int64_t>(i), c});
  }
  simd::Scratch memory;
  float* partials = memory.take(size);
  simd::parallel_workers(
      static_cast<int64_t>(items.size()), [&] { return Worker(p, together, kDecodeRows); },
      [&](Worker& worker, int64_t i) {
        const Group& group = groups[items[i].group];
        worker.run(group, items[i].part,
                   partials + group.partial + items[i].part * group.heads * group.rows * partial_row(p));
      });
  for (const Group& group : groups) {
    const int64_t rows = group.heads * group.rows;
    simd::parallel_ranges(
        rows, std::max<int64_t>(1, kMergeFloats / (group.parts * partial_row(p))),
        [&](int64_t first, int64_t last) { merge(p, group, partials + group.partial, out, logsumexp, first, last); });
  }
}

}  // namespace velm::attention
