// rotary, x * cos + R(x) * sin of queries and keys: both pass through the processor once, forward and backward.
//
// R turns each pair of columns, (first, second) to (-second, first). With the signs in the table of sines all layouts
// and both directions are one formula, y[i] = x[i] * cos[i] + x[partner of i] * sin[i]: backward has the sine of the
// partner.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "common/tensor.h"
#include "simd/layout.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm {
namespace {

using namespace simd;

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;
// Tokens whose tables lie side by side, in float32, while the heads pass by.
constexpr int64_t kTokens = 16;

enum Layout : int64_t { kHalves, kPairs, kQuarters };

VELM_INLINE Vec swap_neighbours(Vec x) {
#if defined(__AVX512F__)
  return Vec(_mm512_permute_ps(static_cast<__m512>(x), 0xB1));
#elif defined(__AVX2__)
  return Vec(_mm256_permute_ps(static_cast<__m256>(x), 0xB1));
#else
  const __m128 v = static_cast<__m128>(x);
  return Vec(_mm_shuffle_ps(v, v, 0xB1));
#endif
}

// Rounds and stores: what a rotation in 16 bits spends most of its time with.
template <class T>
VELM_INLINE void put(T* p, Vec x) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    constexpr int kSubnormal = 0x20;
    const auto v = static_cast<__m512>(x);
    // The instruction takes subnormal numbers for zeros.
    if (_mm512_fpclass_ps_mask(v, kSubnormal) == 0) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
      return;
    }
  }
#endif
  store(p, x);
}

// f(i, load, store) for the vectors that cover [0, n); the last one may be partial.
template <class F>
VELM_INLINE void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    f(
        i, [](const auto* p) VELM_INLINE_LAMBDA { return load(p); },
        [](auto* p, Vec x) VELM_INLINE_LAMBDA { store(p, x); });
  if (const int left = static_cast<int>(n - i); left > 0)
    f(
        i, [left](const auto* p) VELM_INLINE_LAMBDA { return load_first(p, left); },
        [left](auto* p, Vec x) VELM_INLINE_LAMBDA { store_first(p, x, left); });
}

// The same where nothing is read again that was written: the last vector may overlap the one before it, as a partial
// one takes several times as long.
template <class F>
VELM_INLINE void for_overlapping(int64_t n, const F& f) {
  if (n < kLanes) return for_vectors(n, f);
  const auto read = [](const auto* p) VELM_INLINE_LAMBDA { return load(p); };
  const auto write = [](auto* p, Vec x) VELM_INLINE_LAMBDA { put(p, x); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, read, write);
  if (i < n) f(n - kLanes, read, write);
}

// How the columns are paired: `parts` stretches of 2 * half columns, or neighbours.
struct Pairing {
  bool neighbours;
  int64_t rotated, parts, half;

  Pairing(int64_t layout, int64_t columns)
      : neighbours(layout == kPairs),
        rotated(columns),
        parts(layout == kQuarters ? 2 : 1),
        half(columns / 2 / (layout == kQuarters ? 2 : 1)) {}

  // f(first, second) for the columns of every pair.
  template <class F>
  void for_pairs(const F& f) const {
    if (neighbours) {
      for (int64_t i = 0; i < rotated; i += 2) f(i, i + 1);
      return;
    }
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < half; ++i) f(2 * part * half + i, (2 * part + 1) * half + i);
  }
};

// The rotated columns of a row; in and out may not overlap.
template <class In, class Out>
VELM_INLINE void rotate(const Pairing& pairing, const In* x, const float* cos, const float* sin, Out* out) {
  if (pairing.neighbours) {
    for_overlapping(pairing.rotated, [&](int64_t i, auto read, auto write) VELM_INLINE_LAMBDA {
      const Vec v = read(x + i);
      write(out + i, fma(v, read(cos + i), swap_neighbours(v) * read(sin + i)));
    });
    return;
  }
  const int64_t half = pairing.half;
  for (int64_t part = 0; part < pairing.parts; ++part) {
    const int64_t at = 2 * part * half;
    for_overlapping(half, [&](int64_t j, auto read, auto write) VELM_INLINE_LAMBDA {
      const int64_t i = at + j;
      const Vec a = read(x + i), b = read(x + half + i);
      write(out + i, fma(a, read(cos + i), b * read(sin + i)));
      write(out + half + i, fma(b, read(cos + half + i), a * read(sin + half + i)));
    });
  }
}

// Adds grad * x to the gradient of cos and grad * (partner of x), still without its sign, to that of sin.
template <class G, class X>
VELM_INLINE void add_to_tables(const Pairing& pairing, const G* grad, const X* x, float* of_cos, float* of_sin) {
  if (pairing.neighbours) {
    for_vectors(pairing.rotated, [&](int64_t i, auto read, auto write) VELM_INLINE_LAMBDA {
      const Vec g = read(grad + i), v = read(x + i);
      write(of_cos + i, fma(g, v, read(of_cos + i)));
      write(of_sin + i, fma(g, swap_neighbours(v), read(of_sin + i)));
    });
    return;
  }
  const int64_t half = pairing.half;
  for (int64_t part = 0; part < pairing.parts; ++part) {
    const int64_t at = 2 * part * half;
    for_vectors(half, [&](int64_t j, auto read, auto write) VELM_INLINE_LAMBDA {
      const int64_t first = at + j, second = first + half;
      const Vec a = read(x + first), b = read(x + second), g = read(grad + first), h = read(grad + second);
      write(of_cos + first, fma(g, a, read(of_cos + first)));
      write(of_cos + second, fma(h, b, read(of_cos + second)));
      write(of_sin + first, fma(g, b, read(of_sin + first)));
      write(of_sin + second, fma(h, a, read(of_sin + second)));
    });
  }
}

// cos and sin as they are given.
struct Tables {
  Tensor cos, sin;
  ScalarType type;
  int64_t cos_batch, cos_row, sin_batch, sin_row;

  Tables(const Tensor& c, const Tensor& s)
      : cos(c),
        sin(s),
        type(c.scalar_type()),
        cos_batch(c.stride(0)),
        cos_row(c.stride(1)),
        sin_batch(s.stride(0)),
        sin_row(s.stride(1)) {}

  // Those of tokens [first, first + count) in float32, sines with the signs of R, or `back` of its transpose.
  void take(const Pairing& pairing, int64_t batch, int64_t first, int64_t count, bool back, float* to_cos,
            float* to_sin) const {
    const int64_t n = pairing.rotated;
    with_type(type, [&](auto t) {
      using T = decltype(t);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t token = first + r;
        convert(to_cos + r * n, const_data<T>(cos) + batch * cos_batch + token * cos_row, n);
        float* s = to_sin + r * n;
        convert(s, const_data<T>(sin) + batch * sin_batch + token * sin_row, n);
        pairing.for_pairs([&](int64_t i, int64_t j) {
          const float of_first = s[i], of_second = s[j];
          s[i] = back ? of_second : -of_first;
          s[j] = back ? -of_first : of_second;
        });
      }
    });
  }
};

// What a thread computes in.
struct Worker {
  Scratch memory;
  float *cos, *sin;                            // kTokens rows of the tables, sines with the signs of R
  float *row, *inverses;                       // a row in float32; 1 / RMS of each head
  float* turned_back = nullptr;                // of backward: gradients of all heads of a token before its norm
  float *of_cos = nullptr, *of_sin = nullptr;  // kTokens rows of the tables' gradients

  Worker(const Pairing& pairing, int64_t head_dim, int64_t heads)
      : cos(memory.take(kTokens * pairing.rotated)),
        sin(memory.take(kTokens * pairing.rotated)),
        row(memory.take(std::max(head_dim, heads))),
        inverses(memory.take(heads)) {}

  void prepare_backward(const Pairing& pairing, int64_t head_dim, int64_t heads, bool has_norm, bool wants_tables) {
    if (has_norm && !turned_back) turned_back = memory.take(heads * head_dim);
    if (!wants_tables || of_cos) return;
    of_cos = memory.take(kTokens * pairing.rotated);
    of_sin = memory.take(kTokens * pairing.rotated);
  }
};

// All heads of some tokens, in the order in which they lie in memory.
template <class F>
VELM_INLINE void for_rows(const Tensor& x, int64_t count, const F& f) {
  const int64_t heads = x.size(1);
  if (x.stride(1) < x.stride(2)) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t h = 0; h < heads; ++h) f(h, r);
  } else {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < count; ++r) f(h, r);
  }
}

// out = rotated x; `back` by the transpose.
void rotate_all(const Tensor& x, const Pairing& pairing, int64_t batch, int64_t first, int64_t count, const float* cos,
                const float* sin, const Tensor& out) {
  const int64_t rest = x.size(3) - pairing.rotated;
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Rows<T> from(x), to(out);
    for_rows(x, count, [&](int64_t h, int64_t r) VELM_INLINE_LAMBDA {
      const T* row = from.at(batch, h, first + r);
      T* result = to.at(batch, h, first + r);
      rotate(pairing, row, cos + r * pairing.rotated, sin + r * pairing.rotated, result);
      if (rest > 0) std::memcpy(result + pairing.rotated, row + pairing.rotated, static_cast<size_t>(rest) * sizeof(T));
    });
  });
}

// An RMS norm of heads: over the columns of each, or with a weight for all of them over these too.
struct Norm {
  const float* weight = nullptr;
  bool over_heads = false;
  float eps = 0;

  Norm() = default;
  Norm(const std::optional<Tensor>& given, const Tensor& x, double epsilon, Scratch& memory)
      : eps(static_cast<float>(epsilon)) {
    if (!given) return;
    const int64_t n = given->numel();
    float* values = memory.take(n);
    with_type(given->scalar_type(), [&](auto t) { convert(values, const_data<decltype(t)>(*given), n); });
    weight = values;
    over_heads = n != x.size(3);
  }

  const float* of_head(int64_t h, int64_t head_dim) const { return over_heads ? weight + h * head_dim : weight; }

  // 1 / sqrt(mean of x^2 + eps) of a token, one for each head.
  template <class T>
  void inverse_rms(const Rows<T>& x, int64_t heads, int64_t head_dim, int64_t batch, int64_t token, float* to) const {
    double total = 0;
    for (int64_t h = 0; h < heads; ++h) {
      const T* row = x.at(batch, h, token);
      Vec sum = zero();
      for_vectors(head_dim, [&](int64_t i, auto read, auto) VELM_INLINE_LAMBDA {
        const Vec v = read(row + i);
        sum = fma(v, v, sum);
      });
      const double squares = sum_lanes(sum);
      total += squares;
      to[h] = inverse(squares, head_dim);
    }
    if (over_heads) std::fill_n(to, heads, inverse(total, heads * head_dim));
  }

 private:
  float inverse(double squares, int64_t count) const {
    return static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(count) + static_cast<double>(eps)));
  }
};

void normed_rotate_all(const Tensor& x, const Norm& norm, const Pairing& pairing, int64_t batch, int64_t first,
                       int64_t count, Worker& worker, const Tensor& out) {
  if (!norm.weight) return rotate_all(x, pairing, batch, first, count, worker.cos, worker.sin, out);
  const int64_t heads = x.size(1), head_dim = x.size(3), rotated = pairing.rotated;
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Rows<T> from(x), to(out);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = first + r;
      norm.inverse_rms(from, heads, head_dim, batch, token, worker.inverses);
      for (int64_t h = 0; h < heads; ++h) {
        const T* row = from.at(batch, h, token);
        T* result = to.at(batch, h, token);
        const float* weight = norm.of_head(h, head_dim);
        const Vec factor(worker.inverses[h]);
        for_overlapping(head_dim, [&](int64_t i, auto read, auto write) VELM_INLINE_LAMBDA {
          write(worker.row + i, read(row + i) * factor * read(weight + i));
        });
        rotate(pairing, worker.row, worker.cos + r * rotated, worker.sin + r * rotated, result);
        convert(result + rotated, worker.row + rotated, head_dim - rotated);
      }
    }
  });
}

// f(worker, batch, first, count, item) for blocks of tokens, shared by threads.
template <class F>
void for_blocks(const Tensor& query, const Tensor& key, const Pairing& pairing, const F& f) {
  const int64_t tokens = query.size(2), per_entry = divide_up(tokens, kTokens), head_dim = query.size(3);
  const int64_t elements = (query.size(1) + key.size(1)) * head_dim * std::min(tokens, kTokens);
  const int64_t most_heads = std::max(query.size(1), key.size(1));
  parallel_ranges(query.size(0) * per_entry, kGrain / std::max<int64_t>(elements, 1), [&](int64_t begin, int64_t end) {
    Worker worker(pairing, head_dim, most_heads);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % per_entry * kTokens;
      f(worker, item / per_entry, first, std::min(kTokens, tokens - first), item);
    }
  });
}

void forward(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, const Norm& query_norm,
             const Norm& key_norm, int64_t layout, const Tensor& rotated_query, const Tensor& rotated_key) {
  in_large_pages(rotated_query);
  in_large_pages(rotated_key);
  const Pairing pairing(layout, cos.size(2));
  const Tables tables(cos, sin);
  for_blocks(query, key, pairing, [&](Worker& worker, int64_t batch, int64_t first, int64_t count, int64_t) {
    tables.take(pairing, batch, first, count, false, worker.cos, worker.sin);
    normed_rotate_all(query, query_norm, pairing, batch, first, count, worker, rotated_query);
    normed_rotate_all(key, key_norm, pairing, batch, first, count, worker, rotated_key);
  });
}

// One of query and key, and what backward makes of it.
struct Side {
  Tensor grad;
  const std::optional<Tensor>& x;
  const Norm& norm;
  const std::optional<Tensor>& grad_x;
  float* of_weight;  // for each block of tokens, or null
  int64_t weight_size;
};

// The gradients of a token through the norm: z = x / RMS(x) * weight was rotated.
template <class T>
void backward_of_norm(const Side& side, const Pairing& pairing, int64_t batch, int64_t token, const float* cos,
                      const float* sin, const Worker& worker, float* of_weight) {
  const int64_t heads = side.grad.size(1), head_dim = side.grad.size(3), rotated = pairing.rotated;
  const Rows<T> grads(side.grad), from(*side.x);
  double over_heads = 0;
  // Of each head the mean of grad * z, in the place of what of the gradient lies along x.
  for (int64_t h = 0; h < heads; ++h) {
    const T *grad = grads.at(batch, h, token), *row = from.at(batch, h, token);
    float* back = worker.turned_back + h * head_dim;
    rotate(pairing, grad, cos, sin, back);
    convert(back + rotated, grad + rotated, head_dim - rotated);
    const float* weight = side.norm.of_head(h, head_dim);
    float* sums = of_weight == nullptr ? nullptr : of_weight + (side.norm.over_heads ? h * head_dim : 0);
    const Vec inverse(worker.inverses[h]);
    Vec along = zero();
    for_vectors(head_dim, [&](int64_t i, auto read, auto write) VELM_INLINE_LAMBDA {
      const Vec g = read(back + i), n = read(row + i) * inverse, weighted = g * read(weight + i);
      if (sums != nullptr) write(sums + i, fma(g, n, read(sums + i)));
      along = fma(weighted, n, along);
      write(back + i, weighted);
    });
    worker.row[h] = sum_lanes(along);
    over_heads += worker.row[h];
  }
  if (!side.grad_x) return;
  const Rows<T> to(*side.grad_x);
  for (int64_t h = 0; h < heads; ++h) {
    const double mean = side.norm.over_heads ? over_heads / static_cast<double>(heads * head_dim)
                                             : static_cast<double>(worker.row[h]) / static_cast<double>(head_dim);
    const T* row = from.at(batch, h, token);
    T* result = to.at(batch, h, token);
    const float* back = worker.turned_back + h * head_dim;
    const Vec inverse(worker.inverses[h]), factor(static_cast<float>(mean) * worker.inverses[h]);
    for_overlapping(head_dim, [&](int64_t i, auto read, auto write) VELM_INLINE_LAMBDA {
      write(result + i, inverse * (read(back + i) - factor * read(row + i)));
    });
  }
}

// Tokens of one side, one after the other.
void backward_by_tokens(const Side& side, const Pairing& pairing, int64_t batch, int64_t first, int64_t count,
                        int64_t item, bool wants_tables, Worker& worker, float* of_cos, float* of_sin) {
  const int64_t heads = side.grad.size(1), head_dim = side.grad.size(3), rotated = pairing.rotated;
  float* of_weight = side.of_weight == nullptr ? nullptr : side.of_weight + item * side.weight_size;
  if (of_weight != nullptr) std::fill_n(of_weight, side.weight_size, 0.0f);
  with_type(side.grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Rows<T> grads(side.grad), from = side.x ? Rows<T>(*side.x) : Rows<T>();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = first + r;
      if (side.norm.weight) side.norm.inverse_rms(from, heads, head_dim, batch, token, worker.inverses);
      for (int64_t h = 0; wants_tables && h < heads; ++h) {
        const T* row = from.at(batch, h, token);
        const Vec inverse(side.norm.weight ? worker.inverses[h] : 1.0f);
        const float* weight = side.norm.weight ? side.norm.of_head(h, head_dim) : nullptr;
        for_vectors(rotated, [&](int64_t i, auto read, auto write) VELM_INLINE_LAMBDA {
          const Vec v = read(row + i);
          write(worker.row + i, weight ? v * inverse * read(weight + i) : v);
        });
        add_to_tables(pairing, grads.at(batch, h, token), worker.row, of_cos + r * rotated, of_sin + r * rotated);
      }
      if (side.norm.weight && (side.grad_x || of_weight))
        backward_of_norm<T>(side, pairing, batch, token, worker.cos + r * rotated, worker.sin + r * rotated, worker,
                            of_weight);
    }
  });
  if (!side.norm.weight && side.grad_x)
    rotate_all(side.grad, pairing, batch, first, count, worker.cos, worker.sin, *side.grad_x);
}

// The sums over heads of some tokens, as gradients of cos and sin.
void put_tables(const Pairing& pairing, int64_t batch, int64_t first, int64_t count, const float* of_cos, float* of_sin,
                const std::optional<Tensor>& grad_cos, const std::optional<Tensor>& grad_sin) {
  const int64_t n = pairing.rotated;
  const auto put = [&](const Tensor& to, const float* from) {
    with_type(to.scalar_type(), [&](auto t) {
      using T = decltype(t);
      convert(mutable_data<T>(to) + batch * to.stride(0) + first * to.stride(1), from, count * n);
    });
  };
  if (grad_cos) put(*grad_cos, of_cos);
  if (!grad_sin) return;
  for (int64_t r = 0; r < count; ++r)
    pairing.for_pairs([&](int64_t i, int64_t) { of_sin[r * n + i] = -of_sin[r * n + i]; });
  put(*grad_sin, of_sin);
}

// The weight's gradient, of the sums of every block in their order.
void sum_weights(const Side& side, int64_t items, const std::optional<Tensor>& grad_weight) {
  if (!grad_weight) return;
  with_type(grad_weight->scalar_type(), [&](auto t) {
    auto* to = mutable_data<decltype(t)>(*grad_weight);
    parallel_ranges(side.weight_size, kGrain / std::max<int64_t>(items, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double total = 0;
        for (int64_t item = 0; item < items; ++item) total += side.of_weight[item * side.weight_size + i];
        store_scalar(to + i, static_cast<float>(total));
      }
    });
  });
}

void backward(Side query, Side key, const Tensor& cos, const Tensor& sin, int64_t layout,
              const std::optional<Tensor>& grad_cos, const std::optional<Tensor>& grad_sin,
              const std::optional<Tensor>& grad_query_weight, const std::optional<Tensor>& grad_key_weight) {
  for (const Side* side : {&query, &key}) in_large_pages(side->grad_x);
  const Pairing pairing(layout, cos.size(2));
  const Tables tables(cos, sin);
  const int64_t items = query.grad.size(0) * divide_up(query.grad.size(2), kTokens), head_dim = query.grad.size(3);
  const int64_t most_heads = std::max(query.grad.size(1), key.grad.size(1));
  const bool wants_tables = grad_cos || grad_sin;
  Scratch memory;
  for (auto [side, weight] : {std::pair(&query, &grad_query_weight), std::pair(&key, &grad_key_weight)}) {
    if (!*weight) continue;
    side->weight_size = (*weight)->numel();
    side->of_weight = memory.take(items * side->weight_size);
  }
  for_blocks(
      query.grad, key.grad, pairing, [&](Worker& worker, int64_t batch, int64_t first, int64_t count, int64_t item) {
        tables.take(pairing, batch, first, count, true, worker.cos, worker.sin);
        worker.prepare_backward(pairing, head_dim, most_heads, query.norm.weight || key.norm.weight, wants_tables);
        if (wants_tables) {
          std::fill_n(worker.of_cos, count * pairing.rotated, 0.0f);
          std::fill_n(worker.of_sin, count * pairing.rotated, 0.0f);
        }
        for (const Side* side : {&query, &key})
          backward_by_tokens(*side, pairing, batch, first, count, item, wants_tables, worker, worker.of_cos,
                             worker.of_sin);
        if (wants_tables) put_tables(pairing, batch, first, count, worker.of_cos, worker.of_sin, grad_cos, grad_sin);
      });
  sum_weights(query, items, grad_query_weight);
  sum_weights(key, items, grad_key_weight);
}

const Norm kNoNorm;
const std::optional<Tensor> kNone;

void rotary_forward(Tensor query, Tensor key, Tensor cos, Tensor sin, int64_t layout, bool, bool, Tensor rotated_query,
                    Tensor rotated_key) {
  forward(query, key, cos, sin, kNoNorm, kNoNorm, layout, rotated_query, rotated_key);
}

void normed_rotary_forward(Tensor query, Tensor key, Tensor cos, Tensor sin, std::optional<Tensor> query_norm_weight,
                           std::optional<Tensor> key_norm_weight, double norm_eps, int64_t layout, bool, bool,
                           Tensor rotated_query, Tensor rotated_key) {
  Scratch memory;
  forward(query, key, cos, sin, Norm(query_norm_weight, query, norm_eps, memory),
          Norm(key_norm_weight, key, norm_eps, memory), layout, rotated_query, rotated_key);
}

void rotary_backward(Tensor grad_rotated_query, Tensor grad_rotated_key, std::optional<Tensor> query,
                     std::optional<Tensor> key, Tensor cos, Tensor sin, int64_t layout, bool, bool,
                     std::optional<Tensor> grad_query, std::optional<Tensor> grad_key, std::optional<Tensor> grad_cos,
                     std::optional<Tensor> grad_sin) {
  backward({grad_rotated_query, query, kNoNorm, grad_query, nullptr, 0},
           {grad_rotated_key, key, kNoNorm, grad_key, nullptr, 0}, cos, sin, layout, grad_cos, grad_sin, kNone, kNone);
}

void normed_rotary_backward(Tensor grad_rotated_query, Tensor grad_rotated_key, Tensor query, Tensor key, Tensor cos,
                            Tensor sin, std::optional<Tensor> query_norm_weight, std::optional<Tensor> key_norm_weight,
                            double norm_eps, int64_t layout, bool, bool, std::optional<Tensor> grad_query,
                            std::optional<Tensor> grad_key, std::optional<Tensor> grad_cos,
                            std::optional<Tensor> grad_sin, std::optional<Tensor> grad_query_norm_weight,
                            std::optional<Tensor> grad_key_norm_weight) {
  Scratch memory;
  const Norm query_norm(query_norm_weight, query, norm_eps, memory), key_norm(key_norm_weight, key, norm_eps, memory);
  const std::optional<Tensor> of_query(query), of_key(key);
  backward({grad_rotated_query, of_query, query_norm, grad_query, nullptr, 0},
           {grad_rotated_key, of_key, key_norm, grad_key, nullptr, 0}, cos, sin, layout, grad_cos, grad_sin,
           grad_query_norm_weight, grad_key_norm_weight);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "rotary_forward", rotary_forward);
  VELM_KERNEL(m, "rotary_backward", rotary_backward);
  VELM_KERNEL(m, "normed_rotary_forward", normed_rotary_forward);
  VELM_KERNEL(m, "normed_rotary_backward", normed_rotary_backward);
}

}  // namespace
}  // namespace velm
