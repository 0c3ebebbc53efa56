// Pooling over tokens, forward: one pass over the tokens that count.

#include "pooling/pool/cpu.h"

#include <cstring>
#include <limits>
#include <type_traits>

#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm::pooling {
namespace {

using namespace simd;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// Rows read side by side: as many streams of memory as a core follows.
constexpr int kRowsAtOnce = 8;
// Rows whose terms are added in float32 before they join the sum of the earlier ones.
constexpr int kGroup = 128;

VELM_INLINE VecMask is_greater_or_nan(Vec x, Vec than) {
  // A NaN that is there already stays.
  return !(x <= than) && than == than;
}
VELM_INLINE VecMask is_unordered(Vec x, Vec y) {
#if defined(__AVX512F__)
  return VecMask(_mm512_cmp_ps_mask(static_cast<__m512>(x), static_cast<__m512>(y), _CMP_UNORD_Q));
#else
  return x != x || y != y;
#endif
}
VELM_INLINE Vec as_float(VecInt x) {
  return std::bit_cast<Vec>(x);
}

// The largest of some vectors; NaN may get lost.
template <int R>
VELM_INLINE Vec largest_of(const Vec (&x)[R]) {
  if constexpr (R == 1)
    return x[0];
  else
    return maximum(maximum(maximum(x[0], x[1]), maximum(x[2], x[3])),
                   maximum(maximum(x[4], x[5]), maximum(x[6], x[7])));
}

// How tokens are reduced. The state of a column is (a, b): `step` takes values of some tokens into it, `join` a later
// state into an earlier one, `result` is what it amounts to. Tokens have numbers for the sake of Max.

struct Add {
  static constexpr bool kHasB = false;
  static constexpr float kA = 0.0f;
  template <int R>
  VELM_INLINE void step(const Vec (&x)[R], const int32_t*, Vec& a, Vec&) const {
    add<R>([&](int r) VELM_INLINE_LAMBDA { return x[r]; }, a);
  }
  VELM_INLINE void join(Vec& a, Vec&, Vec later, Vec) const { a += later; }

  template <int R, class F>
  static VELM_INLINE void add(const F& f, Vec& a) {
    if constexpr (R == 1)
      a += f(0);
    else
      a += ((f(0) + f(1)) + (f(2) + f(3))) + ((f(4) + f(5)) + (f(6) + f(7)));
  }
};

// b = sum of (x / a)^p, where a is the largest x so far, or the largest finite number if that is infinite: no power
// overflows or vanishes beside the others, and equal values come out as they are.
struct AddPower {
  static constexpr bool kHasB = true;
  static constexpr float kA = kGemEps;
  float p;
  template <int R>
  VELM_INLINE void step(const Vec (&x)[R], const int32_t*, Vec& a, Vec& b) const {
    Vec clamped[R], terms[R];
    // In this order NaN is kept: it gets into b, and not into a.
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA { clamped[r] = maximum(Vec(kGemEps), x[r]); });
    const Vec most = least_keep_nan(largest_of(clamped), kLargest);
    if (stdx::any_of(most > a)) {
      const Vec largest = maximum(most, a);
      b *= power_or_cube(a / largest, p, 3.0f);
      a = largest;
    }
    // Of a quarter, because one over the largest numbers would be subnormal.
    const Vec inverse = 1.0f / (a * 0.25f);
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      const Vec ratio = select(clamped[r] == a, Vec(1.0f), clamped[r] * 0.25f * inverse);
      terms[r] = power_or_cube(ratio, p, 3.0f);
    });
    Add::add<R>([&](int r) VELM_INLINE_LAMBDA { return terms[r]; }, b);
  }
  VELM_INLINE void join(Vec& a, Vec& b, Vec later, Vec later_b) const {
    const Vec largest = maximum(a, later);
    b = b * power_or_cube(a / largest, p, 3.0f) + later_b * power_or_cube(later / largest, p, 3.0f);
    a = largest;
  }
  VELM_INLINE Vec result(Vec a, Vec b, int64_t count) const {
    return maximum(Vec(kGemEps), a * power(b / static_cast<float>(count), 1.0f / p));
  }
};

// b holds the bits of the number of the first token that is the largest.
struct Max {
  static constexpr bool kHasB = true;
  static constexpr float kA = -kInfinity;
  template <int R>
  VELM_INLINE void step(const Vec (&x)[R], const int32_t* tokens, Vec& a, Vec& b) const {
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      const VecMask take = is_greater_or_nan(x[r], a);
      a = select(take, x[r], a);
      b = select(take, as_float(VecInt(tokens[r])), b);
    });
  }
  VELM_INLINE void join(Vec& a, Vec& b, Vec later, Vec later_b) const {
    const VecMask take = is_greater_or_nan(later, a);
    a = select(take, later, a);
    b = select(take, later_b, b);
  }
};

// b = sum of exp(x - a), where a is a value that was met, so that b is at least 1 once there is an x above -inf, and no
// more than kSlack below the largest. Staying behind by a little, it seldom changes: only then do the exponentials of a
// row wait for a comparison with the rows before, and the sum so far for another exponential.
struct LogSumExp {
  static constexpr bool kHasB = true;
  static constexpr float kA = -kLargest;
  // exp(kSlack) times any number of tokens is far from overflowing; a + log(b) of a result near 0 is inexact by 1e-6 at
  // most.
  static constexpr float kSlack = 8.0f;

  // e^x for x <= kSlack to two units in the last place, e^-87 below; NaN stays NaN. What the sum needs and no more.
  static VELM_INLINE Vec exp_of(Vec x) {
    constexpr float kLog2E = 1.442695040888963f;
    // Added to a small number, it leaves the number rounded to an integer in the lowest bits.
    constexpr float kMagic = 12582912.0f;
    const Vec limited = maximum(Vec(-87.0f), x);
    const Vec rounded = fma(limited, Vec(kLog2E), Vec(kMagic));
    const Vec r = fma(limited, Vec(kLog2E), kMagic - rounded);
    const Vec p =
        polynomial(r, 1.326472725e-03f, 9.671512688e-03f, 5.550733744e-02f, 2.402224208e-01f, 6.931469776e-01f, 1.0f);
    return float_of(bits_of(p) + (bits_of(rounded) << 23));
  }
  template <int R>
  static VELM_INLINE VecMask has_nan(const Vec (&x)[R]) {
    if constexpr (R == 1)
      return x[0] != x[0];
    else
      return (is_unordered(x[0], x[1]) || is_unordered(x[2], x[3])) ||
             (is_unordered(x[4], x[5]) || is_unordered(x[6], x[7]));
  }
  // NaN and infinity, of which exp_of would make numbers: NaN goes into b and not into a, infinity into both.
  template <int R>
  static void step_special(const Vec (&x)[R], Vec& a, Vec& b) {
    for (int r = 0; r < R; ++r) {
      const Vec largest = maximum(x[r], a), base = least_keep_nan(largest, kLargest);
      b = b * simd::exp(a - base) + simd::exp(x[r] - base);
      a = largest;
    }
  }
  // Every column for itself: what stands beside it changes no bit of it.
  template <int R>
  static VELM_INLINE void step_finite(const Vec (&x)[R], Vec most, Vec& a, Vec& b) {
    const VecMask exceeds = most > a + kSlack;
    if (stdx::any_of(exceeds)) [[unlikely]] {
      // It may have been infinite before.
      b = select(exceeds, b * exp_of(least_keep_nan(a, kLargest) - least_keep_nan(most, kLargest)), b);
      a = select(exceeds, most, a);
    }
    Vec terms[R];
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA { terms[r] = exp_of(x[r] - a); });
    Add::add<R>([&](int r) VELM_INLINE_LAMBDA { return terms[r]; }, b);
  }
  template <int R>
  [[gnu::noinline]] static void step_both(const Vec (&x)[R], Vec most, VecMask special, Vec& a, Vec& b) {
    Vec special_a = a, special_b = b;
    step_special(x, special_a, special_b);
    step_finite(x, most, a, b);
    a = select(special, special_a, a);
    b = select(special, special_b, b);
  }
  template <int R>
  VELM_INLINE void step(const Vec (&x)[R], const int32_t*, Vec& a, Vec& b) const {
    const Vec most = largest_of(x);
    const VecMask special = has_nan(x) || most == Vec(kInfinity);
    if (stdx::any_of(special)) [[unlikely]]
      return step_both(x, most, special, a, b);
    step_finite(x, most, a, b);
  }
  VELM_INLINE void join(Vec& a, Vec& b, Vec later, Vec later_b) const {
    const Vec largest = maximum(a, later), base = least_keep_nan(largest, kLargest);
    b = b * simd::exp(a - base) + later_b * simd::exp(later - base);
    a = largest;
  }
  static VELM_INLINE Vec result(Vec a, Vec b) { return select(b < Vec(0.5f), Vec(-kInfinity), a + simd::log(b)); }
};

// The states of all columns of some tokens.
struct State {
  float *a, *b;
  State(Scratch& scratch, int64_t padded) : a(scratch.take(padded)), b(scratch.take(padded)) {}
  State(float* memory, int64_t padded) : a(memory), b(memory + padded) {}
};

// How far ahead, in bytes, columns of rows that come from memory are asked for. Arithmetic on a few columns fills what
// a core can hold of waiting instructions, so that it does not get to the loads of later ones by itself. Adding is too
// little to get into the way.
constexpr int64_t kPrefetchBytes = 256;

template <int R, bool kFromMemory, class Reduce>
void add_rows(const Reduce& reduce, const float* const* row, const int32_t* token, int64_t begin, int64_t end,
              const State& state) {
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = row[r];
  for (int64_t c = begin; c < end; c += kLanes) {
    Vec x[R];
    unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
      const float* at = rows[r] + (c - begin);
      x[r] = load(at);
      if (kFromMemory && !std::is_same_v<Reduce, Add>)
        __builtin_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes);
    });
    Vec a = load(state.a + c), b = Reduce::kHasB ? load(state.b + c) : zero();
    reduce.template step<R>(x, token, a, b);
    store(state.a + c, a);
    if (Reduce::kHasB) store(state.b + c, b);
  }
}

template <bool kFromMemory, class Reduce>
void add_rows(const Reduce& reduce, const float* const* row, const int32_t* token, int rows, int64_t begin, int64_t end,
              const State& state) {
  if (rows == kRowsAtOnce)
    add_rows<kRowsAtOnce, kFromMemory>(reduce, row, token, begin, end, state);
  else
    for (int r = 0; r < rows; ++r) add_rows<1, kFromMemory>(reduce, row + r, token + r, begin, end, state);
}

// Up to kRowsAtOnce rows into the state.
template <class Reduce>
void add_some(const Reduce& reduce, ScalarType type, const char* const* row, const int32_t* token, int rows,
              int64_t dim, int64_t padded, float* converted, const State& state) {
  const float* whole[kRowsAtOnce];
  if (type != ScalarType::Float) {
    for (int r = 0; r < rows; ++r) whole[r] = as_floats(type, row[r], dim, converted + r * padded);
    return add_rows<false>(reduce, whole, token, rows, 0, padded, state);
  }
  const int64_t full = dim / kLanes * kLanes;
  for (int r = 0; r < rows; ++r) whole[r] = reinterpret_cast<const float*>(row[r]);
  add_rows<true>(reduce, whole, token, rows, 0, full, state);
  if (full == dim) return;
  for (int r = 0; r < rows; ++r) {
    store(converted + r * kLanes, load_first(whole[r] + full, static_cast<int>(dim - full)));
    whole[r] = converted + r * kLanes;
  }
  add_rows<false>(reduce, whole, token, rows, full, padded, state);
}

template <class Reduce>
void begin_group(const State& state, int64_t padded, int32_t token) {
  std::fill(state.a, state.a + padded, Reduce::kA);
  if (Reduce::kHasB)
    std::fill(state.b, state.b + padded, std::is_same_v<Reduce, Max> ? std::bit_cast<float>(token) : 0.0f);
}

template <class Reduce>
void join_states(const Reduce& reduce, const State& earlier, const State& later, int64_t padded) {
  for (int64_t c = 0; c < padded; c += kLanes) {
    Vec a = load(earlier.a + c), b = Reduce::kHasB ? load(earlier.b + c) : zero();
    reduce.join(a, b, load(later.a + c), Reduce::kHasB ? load(later.b + c) : zero());
    store(earlier.a + c, a);
    if (Reduce::kHasB) store(earlier.b + c, b);
  }
}

// What a column's state over `count` tokens amounts to.
template <class Reduce>
struct Finish {
  const Reduce& reduce;
  Mode mode;

  VELM_INLINE Vec operator()(Vec a, Vec b, int64_t count) const {
    if (count == 0) return zero();
    if constexpr (std::is_same_v<Reduce, LogSumExp>) return LogSumExp::result(a, b);
    if constexpr (std::is_same_v<Reduce, AddPower>) return reduce.result(a, b, count);
    return mode == kMean ? a * static_cast<float>(1.0 / static_cast<double>(count)) : a;
  }
  // What backward keeps of it.
  VELM_INLINE Vec stat(Vec result, Vec b, int64_t count) const {
    return std::is_same_v<Reduce, Max> ? count ? b : as_float(VecInt(-1)) : result;
  }
};

// x whose columns are neighbours in memory.
template <class Reduce>
void pool_rows(const Reduce& reduce, const Finish<Reduce>& finish, const Tensor& x, const Tokens& tokens, Tensor& out,
               float* stats) {
  const bool packed = tokens.bounds;
  const int64_t dim = x.size(x.dim() - 1), padded = (dim + kLanes - 1) / kLanes * kLanes;
  const Lines from(x, packed ? 0 : x.stride(0), x.stride(x.dim() - 2)), to(out, dim, 0);
  const std::vector<Piece> pieces = pieces_of(tokens, kLeastElements / dim, false);
  // The first piece of each segment; a segment of several pieces leaves its states in memory.
  std::vector<int64_t> first(static_cast<size_t>(tokens.segments) + 1, static_cast<int64_t>(pieces.size()));
  for (size_t i = pieces.size(); i-- > 0;) first[static_cast<size_t>(pieces[i].segment)] = static_cast<int64_t>(i);
  const bool several = static_cast<int64_t>(pieces.size()) > tokens.segments;
  Scratch shared;
  float* states = several ? shared.take(2 * padded * static_cast<int64_t>(pieces.size())) : nullptr;
  std::vector<int64_t> counts(pieces.size());

  // Overwrites the state with the result.
  const auto write = [&](int64_t segment, const State& state, int64_t count) {
    for (int64_t c = 0; c < padded; c += kLanes) {
      const Vec b = Reduce::kHasB ? load(state.b + c) : zero();
      const Vec result = finish(load(state.a + c), b, count);
      store(state.a + c, result);
      store(state.b + c, finish.stat(result, b, count));
    }
    from_floats(to.type, to.at(segment, 0), state.a, dim);
    // Four bytes each, whether index or number.
    if (stats) std::memcpy(stats + segment * dim, state.b, sizeof(float) * static_cast<size_t>(dim));
  };
  struct Worker {
    Scratch scratch;
    State total, part;
    float* converted;
    explicit Worker(int64_t padded)
        : total(scratch, padded), part(scratch, padded), converted(scratch.take(kRowsAtOnce * padded)) {
      std::fill_n(converted, kRowsAtOnce * padded, 0.0f);
      // What a segment of nothing finds.
      std::fill_n(total.a, padded, 0.0f);
      std::fill_n(total.b, padded, 0.0f);
    }
  };
  parallel_workers(
      static_cast<int64_t>(pieces.size()), [&] { return Worker(padded); },
      [&](Worker& worker, int64_t i) {
        const FlushSubnormals flush;
        const Piece& piece = pieces[static_cast<size_t>(i)];
        const bool alone =
            first[static_cast<size_t>(piece.segment) + 1] - first[static_cast<size_t>(piece.segment)] == 1;
        const State total = alone ? worker.total : State(states + 2 * padded * i, padded);
        const bool* live = tokens.mask_of(piece.segment);
        const int64_t zero_token = tokens.begin(piece.segment);
        const char* row[kRowsAtOnce];
        int32_t token[kRowsAtOnce];
        int rows = 0;
        // Live tokens so far, and those of the group that is being added up.
        int64_t count = 0, of_group = 0;
        const auto add = [&] {
          const State& state = count == of_group ? total : worker.part;
          add_some(reduce, from.type, row, token, rows, dim, padded, worker.converted, state);
          rows = 0;
        };
        const auto end_group = [&] {
          if (rows) add();
          if (of_group && count != of_group) join_states(reduce, total, worker.part, padded);
          of_group = 0;
        };
        for (int64_t n = piece.begin; n < piece.end; ++n) {
          if (live && !live[n]) continue;
          row[rows] = from.at(piece.segment, n);
          token[rows] = static_cast<int32_t>(n - zero_token);
          ++count;
          if (++of_group == 1) begin_group<Reduce>(count == 1 ? total : worker.part, padded, token[0]);
          if (++rows == kRowsAtOnce) add();
          if (of_group == kGroup) end_group();
        }
        end_group();
        counts[static_cast<size_t>(i)] = count;
        if (alone) write(piece.segment, total, count);
      });
  if (!several) return;
  parallel_items(tokens.segments, [&](int64_t s) {
    const int64_t begin = first[static_cast<size_t>(s)], end = first[static_cast<size_t>(s) + 1];
    if (end - begin == 1) return;
    int64_t count = 0, start = begin;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t of_piece = counts[static_cast<size_t>(i)];
      if (of_piece && count)
        join_states(reduce, State(states + 2 * padded * start, padded), State(states + 2 * padded * i, padded), padded);
      else if (of_piece)
        start = i;
      count += of_piece;
    }
    write(s, State(states + 2 * padded * start, padded), count);
  });
}

// The tokens [0, n) of one column into (a, b); live is 0 for those that do not count, or null.
template <class Reduce>
void add_column(const Reduce& reduce, const float* x, const float* live, int64_t n, Vec& a, Vec& b) {
  const int32_t none[1] = {0};
  const auto add = [&](Vec value, VecMask use) VELM_INLINE_LAMBDA {
    if constexpr (std::is_same_v<Reduce, LogSumExp> || std::is_same_v<Reduce, Max>) {
      const Vec one[1] = {select(use, value, Vec(-kInfinity))};
      reduce.template step<1>(one, none, a, b);
    } else {
      const Vec before = a, before_b = b, one[1] = {value};
      reduce.template step<1>(one, none, a, b);
      a = select(use, a, before);
      b = select(use, b, before_b);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(load(x + i), live ? load(live + i) != zero() : VecMask(true));
  if (i == n) return;
  const int lanes = static_cast<int>(n - i);
  VecMask use = first_lanes(lanes);
  if (live) use = use && load_first(live + i, lanes) != zero();
  add(load_first(x + i, lanes), use);
}

// The number of the first live token that is `value`, or NaN where that is; n if there is none.
int64_t find(const float* x, const float* live, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i)
    if ((live == nullptr || live[i] != 0) && (x[i] == value || (x[i] != x[i] && value != value))) return i;
  return n;
}

// x whose tokens are neighbours in memory: a column is a run of them.
template <class Reduce>
void pool_columns(const Reduce& reduce, const Finish<Reduce>& finish, const Tensor& x, const Tokens& tokens,
                  Tensor& out, float* stats) {
  constexpr int64_t kColumns = 16;
  // Tokens whose terms are added in float32 before they join the sum of the earlier ones.
  constexpr int64_t kRun = 4096;
  const int64_t dim = x.size(2), blocks = (dim + kColumns - 1) / kColumns;
  const auto element = static_cast<int64_t>(x.element_size());
  const Lines from(x, x.stride(0), x.stride(2)), to(out, dim, 1);
  struct Worker {
    Scratch scratch;
    float *live, *converted;
    explicit Worker(int64_t n) : live(scratch.take(n)), converted(scratch.take(kRun)) {}
  };
  parallel_workers(
      tokens.segments * blocks, [&] { return Worker(tokens.mask ? tokens.tokens : 0); },
      [&](Worker& worker, int64_t item) {
        const FlushSubnormals flush;
        const int64_t segment = item / blocks, column = item % blocks * kColumns;
        const int64_t end = tokens.end(segment), count = tokens.count(segment);
        const bool* mask = tokens.mask_of(segment);
        const float* live = mask ? worker.live : nullptr;
        if (mask) std::copy(mask, mask + end, worker.live);
        const int64_t columns = std::min(kColumns, dim - column);
        float results[kColumns], kept[kColumns];
        for (int64_t c = 0; c < columns; ++c) {
          const char* row = from.at(segment, column + c);
          Vec total_a(Reduce::kA), total_b = zero();
          const auto values = [&](int64_t begin) {
            return as_floats(from.type, row + begin * element, std::min(kRun, end - begin), worker.converted);
          };
          for (int64_t begin = 0; begin < end; begin += kRun) {
            Vec a(Reduce::kA), b = zero();
            add_column(reduce, values(begin), live ? live + begin : nullptr, std::min(kRun, end - begin), a, b);
            reduce.join(total_a, total_b, a, b);
          }
          // The lanes, one into the other.
          alignas(64) float as[kLanes], bs[kLanes];
          store(as, total_a);
          store(bs, total_b);
          Vec a(as[0]), b(bs[0]);
          for (int k = 1; k < kLanes; ++k) reduce.join(a, b, Vec(as[k]), Vec(bs[k]));
          if constexpr (std::is_same_v<Reduce, Max>) {
            for (int64_t begin = 0; begin < end; begin += kRun) {
              const int64_t size = std::min(kRun, end - begin);
              const int64_t i = find(values(begin), live ? live + begin : nullptr, size, a[0]);
              if (i == size) continue;
              b = as_float(VecInt(static_cast<int32_t>(begin + i)));
              break;
            }
          }
          const Vec result = finish(a, b, count);
          results[c] = result[0];
          kept[c] = finish.stat(result, b, count)[0];
        }
        from_floats(to.type, to.at(segment, column), results, columns);
        if (stats) std::memcpy(stats + segment * dim + column, kept, sizeof(float) * static_cast<size_t>(columns));
      });
}

template <class Reduce>
void pool(const Reduce& reduce, Mode mode, const Tensor& x, bool tokens_contiguous, const Tokens& tokens, Tensor& out,
          float* stats) {
  const Finish<Reduce> finish{reduce, mode};
  if (tokens_contiguous)
    pool_columns(reduce, finish, x, tokens, out, stats);
  else
    pool_rows(reduce, finish, x, tokens, out, stats);
}

void pool_forward(Tensor x, std::optional<Tensor> lengths, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                  bool tokens_contiguous, int64_t mode_number, double p, Tensor out,
                  std::optional<Tensor> stats_of_mode) {
  const auto mode = static_cast<Mode>(mode_number);
  const int64_t segments = out.size(0), dim = out.size(1);
  if (segments == 0 || dim == 0) return;
  // Of a maximum they are indices, in the bits of floats.
  float* stats = stats_of_mode ? static_cast<float*>(stats_of_mode->mutable_data_ptr()) : nullptr;
  const Tokens tokens(segments, x.size(x.dim() - 2), lengths, mask, cu_seqlens);
  const auto run = [&](const auto& reduce) { pool(reduce, mode, x, tokens_contiguous, tokens, out, stats); };
  if (mode == kMax)
    run(Max{});
  else if (mode == kLogSumExp)
    run(LogSumExp{});
  else if (mode != kGem)
    run(Add{});
  else
    run(AddPower{static_cast<float>(p)});
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "pool_forward", pool_forward);
}

}  // namespace
}  // namespace velm::pooling
