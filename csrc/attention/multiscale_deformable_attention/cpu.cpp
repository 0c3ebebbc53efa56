// multiscale_deformable_attention: weighted sums of bilinear samples of several levels, without the samples in memory.
//
// Forward goes through the queries of one head after the other, so that what is read of the levels is one head's
// tokens. Backward adds to those tokens, at places that only the numbers know: one thread has one head, or one level of
// it, whose gradients it sums in memory of its own in the order of the queries, whatever the number of threads.

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "common/tensor.h"
#include "simd/layout.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm {
namespace {

using namespace simd;

// Queries whose samples are placed at once.
constexpr int64_t kQueries = 16;
// Bytes of a value that no cache near a core holds.
constexpr int64_t kPackedBytes = int64_t{2} << 20;
// Samples and rows that are asked for before their turn.
constexpr int64_t kSamplesAhead = 4, kRowsAhead = 16;
// Products below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;
// Columns are counted in float32.
constexpr int64_t kLargestSide = int64_t{1} << 24;
// In the place of a token's number: some of the four corners lie outside, or all.
constexpr int64_t kPartlyInside = -1, kOutside = -2;

struct Level {
  int64_t first, height, width;
};

struct Problem {
  int64_t batch, tokens, heads, d, queries, levels, points;
  std::vector<Level> level;

  Problem(const Tensor& value, const Tensor& spatial_shapes, const Tensor& locations)
      : batch(value.size(0)),
        tokens(value.size(1)),
        heads(value.size(2)),
        d(value.size(3)),
        queries(locations.size(1)),
        levels(locations.size(3)),
        points(locations.size(4)) {
    const int64_t* sizes = const_data<int64_t>(spatial_shapes);
    int64_t first = 0;
    for (int64_t l = 0; l < levels; ++l) {
      const int64_t height = sizes[2 * l], width = sizes[2 * l + 1];
      if (height < 0 || width < 0 || height > kLargestSide || width > kLargestSide)
        throw std::runtime_error("velm: spatial_shapes: expected sizes from 0 to 2^24");
      level.push_back({first, height, width});
      first += height * width;
    }
    if (first != tokens) throw std::runtime_error("velm: spatial_shapes: expected as many tokens as value has");
  }

  // Of (batch, queries, heads, levels, points), contiguous.
  int64_t sample(int64_t b, int64_t query, int64_t head, int64_t l) const {
    return (((b * queries + query) * heads + head) * levels + l) * points;
  }
};

// Asks for memory that is needed soon. What belongs to the queries of one head lies far apart, where no processor
// guesses which line is next.
template <bool kWrites>
VELM_INLINE void ask_for(const void* first, int64_t bytes) {
  constexpr std::uintptr_t kLine = 64;
  const auto begin = reinterpret_cast<std::uintptr_t>(first);
  for (std::uintptr_t at = begin / kLine * kLine; at < begin + static_cast<std::uintptr_t>(bytes); at += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(at), kWrites, 3);
}

// A contiguous tensor of any type of numbers, or none.
struct Numbers {
  char* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t bytes = 4;  // of a number

  explicit Numbers(const Tensor& t)
      : data(const_cast<char*>(static_cast<const char*>(t.const_data_ptr()))),
        type(t.scalar_type()),
        bytes(static_cast<int64_t>(t.element_size())) {}
  explicit Numbers(const std::optional<Tensor>& to) {
    if (!to) return;
    data = static_cast<char*>(to->mutable_data_ptr());
    type = to->scalar_type();
    bytes = static_cast<int64_t>(to->element_size());
  }

  template <bool kWrites>
  void ask_for(int64_t first, int64_t count) const {
    if (data != nullptr) velm::ask_for<kWrites>(data + first * bytes, count * bytes);
  }
  void put(int64_t first, const float* from, int64_t count) const {
    if (data == nullptr) return;
    with_type(type, [&](auto t) { convert(reinterpret_cast<decltype(t)*>(data) + first, from, count); });
  }
};

// The tokens of one head, `stride` elements apart.
template <class T>
struct Tokens {
  T* data;
  int64_t stride;

  Tokens(const Tensor& t, int64_t b, int64_t head)
      : data(const_cast<T*>(const_data<T>(t)) + b * t.stride(0) + head * t.stride(2)), stride(t.stride(1)) {}
  Tokens(T* first, int64_t elements) : data(first), stride(elements) {}
  T* at(int64_t token) const { return data + token * stride; }
};

// Rows of a head lie `heads` rows apart: in some of the sets of a cache alone, and a few to a page. Of a large value,
// of which most rows are read several times, a copy in which they lie side by side pays.
template <class T>
bool pays_to_pack(const Problem& p) {
  const int64_t bytes = p.tokens * p.heads * p.d * static_cast<int64_t>(sizeof(T));
  return p.heads > 1 && bytes >= kPackedBytes && p.queries * p.levels * p.points >= 2 * p.tokens;
}

// (batch, heads, tokens, d), or null where that does not pay.
template <class T>
T* packed_heads(Scratch& memory, const Tensor& value, const Problem& p) {
  if (!pays_to_pack<T>(p)) return nullptr;
  T* packed = memory.take<T>(p.batch * p.heads * p.tokens * p.d);
  parallel_ranges(p.batch * p.tokens, kGrain / std::max<int64_t>(p.heads * p.d, 1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.tokens, token = item % p.tokens;
      for (int64_t head = 0; head < p.heads; ++head)
        std::copy_n(Tokens<T>(value, b, head).at(token), p.d, packed + ((b * p.heads + head) * p.tokens + token) * p.d);
    }
  });
  return packed;
}

// Samples side by side: where each lies among the tokens, and the shares of its four corners, by rows.
struct Samples {
  int64_t room;
  float *column, *row, *weight;  // the upper left corner; attention's weight
  float *right, *lower;          // how far from it, 0 to 1
  float* share[4];
  int64_t* token;  // of the upper left corner, or how far it is inside
  const Level** level;

  Samples(Scratch& memory, int64_t count) : room(round_up(count, kLanes)) {
    for (float** of : {&column, &row, &weight, &right, &lower, &share[0], &share[1], &share[2], &share[3]}) {
      *of = memory.take(room);
      std::fill_n(*of, room, 0.0f);
    }
    token = memory.take<int64_t>(room);
    level = memory.take<const Level*>(room);
  }

  // Reads `count` locations and weights that lie side by side, of levels that are set.
  void read(int64_t at, int64_t count, const Numbers& locations, const Numbers& weights, int64_t first) {
    with_type(locations.type, [&](auto t) {
      const auto* xy = reinterpret_cast<const decltype(t)*>(locations.data) + 2 * first;
      for (int64_t i = 0; i < count; ++i) {
        column[at + i] = to_float(xy[2 * i]);
        row[at + i] = to_float(xy[2 * i + 1]);
      }
    });
    with_type(weights.type,
              [&](auto t) { convert(weight + at, reinterpret_cast<const decltype(t)*>(weights.data) + first, count); });
  }

  void place(int64_t count, const float* width, const float* height) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec x = fma(load(column + i), load(width + i), Vec(-0.5f));
      const Vec y = fma(load(row + i), load(height + i), Vec(-0.5f));
      const Vec left = stdx::floor(x), above = stdx::floor(y);
      const Vec to_right = x - left, below = y - above;
      store(column + i, left);
      store(row + i, above);
      store(right + i, to_right);
      store(lower + i, below);
      store(share[0] + i, (1.0f - to_right) * (1.0f - below));
      store(share[1] + i, to_right * (1.0f - below));
      store(share[2] + i, (1.0f - to_right) * below);
      store(share[3] + i, to_right * below);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float x = column[i], y = row[i], w = width[i], h = height[i];
      const Level& of = *level[i];
      // Not so for NaN.
      if (x >= 0 && y >= 0 && x < w - 1 && y < h - 1) {
        token[i] = of.first + static_cast<int64_t>(y) * of.width + static_cast<int64_t>(x);
      } else {
        token[i] = x >= -1 && y >= -1 && x < w && y < h ? kPartlyInside : kOutside;
      }
    }
  }

  // f(corner, token) for the corners that are inside of a level; the others lie in zeros.
  template <class F>
  void for_inside(int64_t i, const F& f) const {
    const Level& of = *level[i];
    if (token[i] == kOutside) return;
    const int64_t x = static_cast<int64_t>(column[i]), y = static_cast<int64_t>(row[i]);
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t cx = x + corner % 2, cy = y + corner / 2;
      if (cx >= 0 && cx < of.width && cy >= 0 && cy < of.height) f(corner, of.first + cy * of.width + cx);
    }
  }

  // Asks for the corners of a sample, of tokens from `first` on.
  template <bool kWrites, class T>
  VELM_INLINE void ask_for_corners(int64_t i, const Tokens<T>& tokens, int64_t first, int64_t d) const {
    if (token[i] < 0) return;
    const int64_t upper = token[i] - first, lower = upper + level[i]->width;
    for (const int64_t number : {upper, upper + 1, lower, lower + 1})
      ask_for<kWrites>(tokens.at(number), d * static_cast<int64_t>(sizeof(T)));
  }

  // Shares times the zeros around a level: NaN where a location is no number.
  float of_outside(int64_t i) const {
    float of_zeros = 0.0f;
    for (const float* of : share) of_zeros += of[i] * 0.0f;
    return of_zeros;
  }
};

// The sizes of levels beside samples, as floats.
struct Sides {
  float *width, *height;

  Sides(Scratch& memory, const Samples& samples) : width(memory.take(samples.room)), height(memory.take(samples.room)) {
    std::fill_n(width, samples.room, 0.0f);
    std::fill_n(height, samples.room, 0.0f);
  }
  void set(Samples& samples, int64_t i, const Level& level) {
    samples.level[i] = &level;
    width[i] = static_cast<float>(level.width);
    height[i] = static_cast<float>(level.height);
  }
};

// out = sum over samples [begin, end) of weight * bilinear, kVectors vectors of columns; with `left` > 0 one vector, of
// which as many columns are there.
template <int kVectors, class T>
VELM_INLINE void sum_samples(const Samples& samples, int64_t begin, int64_t end, const Tokens<T>& value, bool asks,
                             int left, T* out) {
  const T* data = value.data;
  const int64_t stride = value.stride;
  const auto read = [left](const T* p) VELM_INLINE_LAMBDA { return left > 0 ? load_first(p, left) : load(p); };
  Vec sum[kVectors];
  for (Vec& of : sum) of = zero();
  for (int64_t i = begin; i < end; ++i) {
    if (asks && i + kSamplesAhead < end)
      samples.ask_for_corners<false>(i + kSamplesAhead, value, 0, left > 0 ? left : kVectors * kLanes);
    const Vec weight(samples.weight[i]);
    if (samples.token[i] >= 0) {
      const T* upper = data + samples.token[i] * stride;
      const T* lower = upper + samples.level[i]->width * stride;
      const Vec a(samples.share[0][i]), b(samples.share[1][i]), c(samples.share[2][i]), e(samples.share[3][i]);
      unroll<kVectors>([&](auto v) VELM_INLINE_LAMBDA {
        const int64_t j = v * kLanes;
        const Vec above = fma(read(upper + stride + j), b, read(upper + j) * a);
        const Vec below = fma(read(lower + stride + j), e, read(lower + j) * c);
        sum[v] = fma(above + below, weight, sum[v]);
      });
      continue;
    }
    Vec sampled[kVectors];
    for (Vec& of : sampled) of = Vec(samples.of_outside(i));
    samples.for_inside(i, [&](int corner, int64_t token) VELM_INLINE_LAMBDA {
      const Vec share(samples.share[corner][i]);
      const T* row = data + token * stride;
      unroll<kVectors>([&](auto v) VELM_INLINE_LAMBDA { sampled[v] = fma(read(row + v * kLanes), share, sampled[v]); });
    });
    unroll<kVectors>([&](auto v) VELM_INLINE_LAMBDA { sum[v] = fma(sampled[v], weight, sum[v]); });
  }
  unroll<kVectors>([&](auto v) VELM_INLINE_LAMBDA {
    if (left > 0) {
      store_first(out, sum[v], left);
    } else {
      store(out + v * kLanes, sum[v]);
    }
  });
}

template <class T>
void sum_samples(const Samples& samples, int64_t begin, int64_t end, const Tokens<T>& value, bool asks, int64_t d,
                 T* out) {
  int64_t j = 0;
  const auto from = [&] { return Tokens<T>(value.data + j, value.stride); };
  for (; j + 4 * kLanes <= d; j += 4 * kLanes) sum_samples<4>(samples, begin, end, from(), asks, 0, out + j);
  if (j + 2 * kLanes <= d) {
    sum_samples<2>(samples, begin, end, from(), asks, 0, out + j);
    j += 2 * kLanes;
  }
  if (j + kLanes <= d) {
    sum_samples<1>(samples, begin, end, from(), asks, 0, out + j);
    j += kLanes;
  }
  if (j < d) sum_samples<1>(samples, begin, end, from(), asks, static_cast<int>(d - j), out + j);
}

void multiscale_deformable_attention_forward(Tensor value, Tensor spatial_shapes, Tensor locations, Tensor weights,
                                             Tensor out) {
  in_large_pages(out);
  const Problem p(value, spatial_shapes, locations);
  const int64_t of_query = p.levels * p.points, blocks = divide_up(p.queries, kQueries);
  const int64_t products = std::max<int64_t>(kQueries * of_query * p.d * 4, 1);
  const Numbers of_locations(locations), of_weights(weights);
  with_type(value.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* results = mutable_data<T>(out);
    Scratch shared;
    T* packed = packed_heads<T>(shared, value, p);
    parallel_ranges(p.batch * p.heads * blocks, kGrain / products, [&](int64_t begin, int64_t end) {
      Scratch memory;
      Samples samples(memory, kQueries * of_query);
      Sides sides(memory, samples);
      for (int64_t i = 0; i < kQueries * of_query; ++i) sides.set(samples, i, p.level[i / p.points % p.levels]);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / blocks / p.heads, head = item / blocks % p.heads, first = item % blocks * kQueries;
        const int64_t count = std::min(kQueries, p.queries - first);
        for (int64_t q = 0; q < count; ++q)
          samples.read(q * of_query, of_query, of_locations, of_weights, p.sample(b, first + q, head, 0));
        for (int64_t q = first + kQueries; q < std::min(first + 2 * kQueries, p.queries); ++q) {
          const int64_t next = p.sample(b, q, head, 0);
          of_locations.ask_for<false>(2 * next, 2 * of_query);
          of_weights.ask_for<false>(next, of_query);
        }
        samples.place(count * of_query, sides.width, sides.height);
        const Tokens<T> tokens = packed == nullptr ? Tokens<T>(value, b, head)
                                                   : Tokens<T>(packed + (b * p.heads + head) * p.tokens * p.d, p.d);
        for (int64_t q = 0; q < count; ++q)
          sum_samples<T>(samples, q * of_query, (q + 1) * of_query, tokens, packed == nullptr, p.d,
                         results + ((b * p.queries + first + q) * p.heads + head) * p.d);
      }
    });
  });
}

// The sums over lanes of four vectors.
VELM_INLINE void sum_lanes(Vec a, Vec b, Vec c, Vec d, float (&to)[4]) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto half = [](Vec x) VELM_INLINE_LAMBDA {
    const __m512 v = static_cast<__m512>(x);
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  };
#else
  const auto half = [](Vec x) VELM_INLINE_LAMBDA { return static_cast<__m256>(x); };
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  to[0] = simd::sum_lanes(a);
  to[1] = simd::sum_lanes(b);
  to[2] = simd::sum_lanes(c);
  to[3] = simd::sum_lanes(d);
#endif
}

// Products of what comes in with the corners of each sample, and its shares added to them. kVectors vectors of columns,
// or with 0 any number of columns.
template <class T, int kVectors>
struct Corners {
  Tokens<T> value;  // from `first` on
  int64_t d, stride;
  float* of_tokens;  // (tokens, stride), or null
  int64_t first;

  // f(column, load, columns that are there) for the vectors of a row.
  template <class F>
  VELM_INLINE void for_vectors(const F& f) const {
    const auto whole = [](const T* p) VELM_INLINE_LAMBDA { return load(p); };
    if constexpr (kVectors > 0) {
      unroll<kVectors>([&](auto v) VELM_INLINE_LAMBDA { f(int64_t{v * kLanes}, whole); });
    } else {
      int64_t j = 0;
      for (; j + kLanes <= d; j += kLanes) f(j, whole);
      if (const int left = static_cast<int>(d - j); left > 0)
        f(j, [left](const T* p) VELM_INLINE_LAMBDA { return load_first(p, left); });
    }
  }

  // dots[corner] = grad . value there; `of_zeros` outside. grad has `stride` columns, zeros behind d.
  template <bool kDots, bool kTokens>
  VELM_INLINE void run(const Samples& samples, int64_t i, const float* grad, float of_zeros, float (&dots)[4]) const {
    const float weight = samples.weight[i];
    if (samples.token[i] >= 0) {
      const int64_t width = samples.level[i]->width;
      const T* upper = value.at(samples.token[i] - first);
      const T* lower = upper + width * value.stride;
      Vec sums[4] = {zero(), zero(), zero(), zero()};
      float* to_upper = kTokens ? of_tokens + (samples.token[i] - first) * stride : nullptr;
      float* to_lower = kTokens ? to_upper + width * stride : nullptr;
      const Vec a(weight * samples.share[0][i]), b(weight * samples.share[1][i]);
      const Vec c(weight * samples.share[2][i]), e(weight * samples.share[3][i]);
      for_vectors([&](int64_t j, auto read) VELM_INLINE_LAMBDA {
        const Vec g = load(grad + j);
        if constexpr (kDots) {
          sums[0] = fma(g, read(upper + j), sums[0]);
          sums[1] = fma(g, read(upper + value.stride + j), sums[1]);
          sums[2] = fma(g, read(lower + j), sums[2]);
          sums[3] = fma(g, read(lower + value.stride + j), sums[3]);
        }
        if constexpr (kTokens) {
          store(to_upper + j, fma(g, a, load(to_upper + j)));
          store(to_upper + stride + j, fma(g, b, load(to_upper + stride + j)));
          store(to_lower + j, fma(g, c, load(to_lower + j)));
          store(to_lower + stride + j, fma(g, e, load(to_lower + stride + j)));
        }
      });
      if constexpr (kDots) sum_lanes(sums[0], sums[1], sums[2], sums[3], dots);
      return;
    }
    std::fill_n(dots, 4, of_zeros);
    samples.for_inside(i, [&](int corner, int64_t token) {
      const T* row = value.at(token - first);
      Vec sum = zero();
      float* to = kTokens ? of_tokens + (token - first) * stride : nullptr;
      const Vec share(weight * samples.share[corner][i]);
      for_vectors([&](int64_t j, auto read) VELM_INLINE_LAMBDA {
        const Vec g = load(grad + j);
        if constexpr (kDots) sum = fma(g, read(row + j), sum);
        if constexpr (kTokens) store(to + j, fma(g, share, load(to + j)));
      });
      if constexpr (kDots) dots[corner] = simd::sum_lanes(sum);
    });
  }
};

// The gradients of a sample's location and weight, of what comes in times each corner.
VELM_INLINE void of_sample(const Samples& samples, int64_t i, const float (&dots)[4], float* xy, float* of_weight) {
  const float weight = samples.weight[i], right = samples.right[i], lower = samples.lower[i];
  const float along = (1.0f - lower) * (dots[1] - dots[0]) + lower * (dots[3] - dots[2]);
  const float down = (1.0f - right) * (dots[2] - dots[0]) + right * (dots[3] - dots[1]);
  xy[0] = weight * along * static_cast<float>(samples.level[i]->width);
  xy[1] = weight * down * static_cast<float>(samples.level[i]->height);
  *of_weight = samples.share[0][i] * dots[0] + samples.share[1][i] * dots[1] + samples.share[2][i] * dots[2] +
               samples.share[3][i] * dots[3];
}

template <class T>
struct Gradients {
  const Problem& p;
  const Tensor& value;
  const T* grads;
  Numbers locations, weights, of_locations, of_weights;
  const std::optional<Tensor>& of_value;
  // Levels of a head that a thread goes through at once.
  int64_t levels;
};

// What a thread has for the heads, or levels of them, that it goes through.
template <class T>
struct BackwardWorker {
  const Gradients<T>& g;
  const Problem& p;
  const int64_t stride, of_query;
  Scratch memory;
  Samples samples;
  Sides sides;
  float *row, *xy, *of_weights, *of_tokens = nullptr;
  T* packed = nullptr;

  explicit BackwardWorker(const Gradients<T>& gradients)
      : g(gradients),
        p(g.p),
        stride(round_up(p.d, kLanes)),
        of_query(g.levels * p.points),
        samples(memory, kQueries * of_query),
        sides(memory, samples),
        row(memory.take(stride)),
        xy(memory.take(2 * of_query)),
        of_weights(memory.take(of_query)) {
    std::fill_n(row, stride, 0.0f);
    int64_t most = 0;
    for (int64_t l = 0; l < p.levels; l += g.levels) most = std::max(most, tokens_of(l));
    if (g.of_value) of_tokens = memory.take(most * stride);
    if (pays_to_pack<T>(p)) packed = memory.take<T>(most * p.d);
  }

  int64_t tokens_of(int64_t first) const {
    const Level& last = p.level[first + g.levels - 1];
    return last.first + last.height * last.width - p.level[first].first;
  }

  // Of the levels from `level` on.
  template <int kVectors>
  void run(int64_t b, int64_t head, int64_t level) {
    for (int64_t i = 0; i < kQueries * of_query; ++i) sides.set(samples, i, p.level[level + i / p.points % g.levels]);
    const int64_t first_token = p.level[level].first, tokens = tokens_of(level);
    const int64_t row_bytes = p.d * static_cast<int64_t>(sizeof(T));
    if (of_tokens != nullptr) std::fill_n(of_tokens, tokens * stride, 0.0f);
    const Tokens<T> of_head(g.value, b, head);
    Tokens<T> read(of_head.at(first_token), of_head.stride);
    if (packed != nullptr) {
      for (int64_t i = 0; i < tokens; ++i) {
        ask_for<false>(read.at(std::min(i + kRowsAhead, tokens - 1)), row_bytes);
        std::copy_n(read.at(i), p.d, packed + i * p.d);
      }
      read = Tokens<T>(packed, p.d);
    }
    const Corners<T, kVectors> corners{read, p.d, stride, of_tokens, first_token};
    if (g.of_locations.data == nullptr && g.of_weights.data == nullptr) {
      for_queries<false, true>(corners, b, head, level);
    } else if (of_tokens == nullptr) {
      for_queries<true, false>(corners, b, head, level);
    } else {
      for_queries<true, true>(corners, b, head, level);
    }
    if (of_tokens == nullptr) return;
    const Tokens<T> to(*g.of_value, b, head);
    for (int64_t i = 0; i < tokens; ++i) {
      ask_for<true>(to.at(first_token + std::min(i + kRowsAhead, tokens - 1)), row_bytes);
      convert(to.at(first_token + i), of_tokens + i * stride, p.d);
    }
  }

  template <bool kDots, bool kTokens, class C>
  void for_queries(const C& corners, int64_t b, int64_t head, int64_t level) {
    for (int64_t first = 0; first < p.queries; first += kQueries) {
      const int64_t count = std::min(kQueries, p.queries - first);
      for (int64_t q = 0; q < count; ++q)
        samples.read(q * of_query, of_query, g.locations, g.weights, p.sample(b, first + q, head, level));
      samples.place(count * of_query, sides.width, sides.height);
      for (int64_t q = first + kQueries; q < std::min(first + 2 * kQueries, p.queries); ++q) {
        const int64_t next = p.sample(b, q, head, level);
        g.locations.template ask_for<false>(2 * next, 2 * of_query);
        g.weights.template ask_for<false>(next, of_query);
        g.of_locations.template ask_for<true>(2 * next, 2 * of_query);
        g.of_weights.template ask_for<true>(next, of_query);
        ask_for<false>(g.grads + ((b * p.queries + q) * p.heads + head) * p.d, p.d * static_cast<int64_t>(sizeof(T)));
      }
      for (int64_t q = 0; q < count; ++q) {
        convert(row, g.grads + ((b * p.queries + first + q) * p.heads + head) * p.d, p.d);
        Vec of_zeros = zero();
        for (int64_t j = 0; j < stride; j += kLanes) of_zeros = fma(load(row + j), zero(), of_zeros);
        const float outside = simd::sum_lanes(of_zeros);
        for (int64_t k = 0; k < of_query; ++k) {
          float dots[4];
          const int64_t i = q * of_query + k;
          // Where most tokens are read several times, they are near by.
          if (const int64_t next = i + kSamplesAhead; packed == nullptr && next < count * of_query) {
            if constexpr (kDots) samples.ask_for_corners<false>(next, corners.value, corners.first, p.d);
            if constexpr (kTokens)
              samples.ask_for_corners<true>(next, Tokens<float>(of_tokens, stride), corners.first, p.d);
          }
          corners.template run<kDots, kTokens>(samples, i, row, outside, dots);
          if constexpr (kDots) of_sample(samples, i, dots, xy + 2 * k, of_weights + k);
        }
        if constexpr (!kDots) continue;
        const int64_t at = p.sample(b, first + q, head, level);
        g.of_locations.put(2 * at, xy, 2 * of_query);
        g.of_weights.put(at, of_weights, of_query);
      }
    }
  }
};

void multiscale_deformable_attention_backward(Tensor grad, Tensor value, Tensor spatial_shapes, Tensor locations,
                                              Tensor weights, std::optional<Tensor> grad_value,
                                              std::optional<Tensor> grad_locations,
                                              std::optional<Tensor> grad_weights) {
  in_large_pages(grad_value);
  const Problem p(value, spatial_shapes, locations);
  if (p.levels == 0) return;
  // All levels of a head at once read what lies side by side; one level at a time is for many threads. A token's sum is
  // in the order of the queries in both.
  const bool by_heads = p.batch * p.heads >= 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t levels = by_heads ? p.levels : 1;
  with_type(value.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Gradients<T> gradients{p,
                                 value,
                                 const_data<T>(grad),
                                 Numbers(locations),
                                 Numbers(weights),
                                 Numbers(grad_locations),
                                 Numbers(grad_weights),
                                 grad_value,
                                 levels};
    const int64_t of_head = p.levels / levels;
    parallel_workers(
        p.batch * p.heads * of_head, [&] { return BackwardWorker<T>(gradients); },
        [&](BackwardWorker<T>& worker, int64_t item) {
          const int64_t b = item / of_head / p.heads, head = item / of_head % p.heads, level = item % of_head * levels;
          if (p.d == kLanes) return worker.template run<1>(b, head, level);
          if (p.d == 2 * kLanes) return worker.template run<2>(b, head, level);
          if (p.d == 4 * kLanes) return worker.template run<4>(b, head, level);
          worker.template run<0>(b, head, level);
        });
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "multiscale_deformable_attention_forward", multiscale_deformable_attention_forward);
  VELM_KERNEL(m, "multiscale_deformable_attention_backward", multiscale_deformable_attention_backward);
}

}  // namespace
}  // namespace velm
