// Pooling over tokens, backward: the gradient of every token in one pass.

#include <cstring>
#include <limits>
#include <type_traits>

#include "common/needed.h"
#include "pooling/pool/cpu.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm::pooling {
namespace {

using namespace simd;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The gradient of a token: `of(x, token, grad, stat)`, the last two as `prepare` made them from those of the segment.

struct Share {
  static constexpr bool kReadsX = false;
  bool is_mean;
  VELM_INLINE void prepare(Vec& grad, Vec&, float inverse) const {
    if (is_mean) grad *= inverse;
  }
  VELM_INLINE Vec of(Vec, int32_t, Vec grad, Vec) const { return grad; }
};

struct ToLargest {
  static constexpr bool kReadsX = false;
  VELM_INLINE void prepare(Vec&, Vec&, float) const {}
  VELM_INLINE Vec of(Vec, int32_t token, Vec grad, Vec index) const {
    const auto equal = bits_of(index) == VecUint(static_cast<uint32_t>(token));
    VecUint bits = bits_of(grad);
    stdx::where(!equal, bits) = 0u;
    return float_of(bits);
  }
};

struct Softmax {
  static constexpr bool kReadsX = true;
  VELM_INLINE void prepare(Vec& grad, Vec& logsumexp, float) const {
    // Where all are -inf.
    const VecMask none = logsumexp == Vec(-kInfinity);
    grad = select(none, zero(), grad);
    logsumexp = select(none, zero(), logsumexp);
  }
  VELM_INLINE Vec of(Vec x, int32_t, Vec grad, Vec logsumexp) const { return grad * simd::exp(x - logsumexp); }
};

// (x / result)^(p - 1), which cannot overflow where x^(p - 1) does. NaN is kept, in orders that keep it.
struct PowerShare {
  static constexpr bool kReadsX = true;
  float p;
  VELM_INLINE void prepare(Vec& grad, Vec& result, float inverse) const {
    grad *= inverse;
    result = maximum(Vec(kGemEps), result);
    // Of a quarter, because one over the largest numbers would be subnormal.
    if (p == 3.0f) result = 1.0f / (result * 0.25f);
  }
  VELM_INLINE Vec of(Vec x, int32_t, Vec grad, Vec result) const {
    Vec factor(1.0f);
    if (p == 3.0f) {
      const Vec ratio = x * 0.25f * result;
      factor = ratio * ratio;
    } else if (p != 1.0f) {
      factor = power(maximum(zero(), x / result), p - 1);
    }
    return select(x >= Vec(kGemEps), grad * factor, zero());
  }
};

// The gradients of `n` elements: of columns of one token, whose grad and stat lie in memory, or of tokens of one
// column.
template <class Rule>
void row_gradient(const Rule& rule, const float* x, int32_t token, const float* grad, const float* stat, int64_t n,
                  float* out) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    store(out + c, rule.of(Rule::kReadsX ? load(x + c) : zero(), token, load(grad + c), load(stat + c)));
  if (const int lanes = static_cast<int>(n - c); lanes > 0)
    store_first(out + c,
                rule.of(Rule::kReadsX ? load_first(x + c, lanes) : zero(), token, load(grad + c), load(stat + c)),
                lanes);
}
template <class Rule>
void column_gradient(const Rule& rule, const float* x, Vec grad, Vec stat, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, rule.of(Rule::kReadsX ? load(x + i) : zero(), 0, grad, stat));
  if (const int lanes = static_cast<int>(n - i); lanes > 0)
    store_first(out + i, rule.of(Rule::kReadsX ? load_first(x + i, lanes) : zero(), 0, grad, stat), lanes);
}

template <class Rule>
void rows_backward(const Rule& rule, const Tensor& grad, const std::optional<Tensor>& x, const Tensor& stats,
                   const Tokens& tokens, Tensor& out) {
  const int64_t dim = grad.size(1), padded = (dim + kLanes - 1) / kLanes * kLanes;
  const bool packed = tokens.bounds;
  const Lines grads(grad, dim, 0), to(out, packed ? 0 : tokens.tokens * dim, dim);
  const Lines from = x ? Lines(*x, packed ? 0 : x->stride(0), x->stride(packed ? 0 : 1)) : Lines();
  const bool in_place = to.type == ScalarType::Float;
  const auto row_bytes = static_cast<size_t>(to.inner);
  const auto* stat = static_cast<const float*>(stats.const_data_ptr());
  const std::vector<Piece> pieces = pieces_of(tokens, kLeastElements / dim, true);
  std::vector<int64_t> counts(static_cast<size_t>(tokens.segments));
  for (int64_t s = 0; s < tokens.segments; ++s) counts[static_cast<size_t>(s)] = tokens.count(s);
  struct Worker {
    Scratch scratch;
    float *grad, *stat, *converted;
    explicit Worker(int64_t padded)
        : grad(scratch.take(padded)), stat(scratch.take(padded)), converted(scratch.take(padded)) {
      std::fill_n(grad, padded, 0.0f);
      std::fill_n(stat, padded, 0.0f);
    }
  };
  parallel_workers(
      static_cast<int64_t>(pieces.size()), [&] { return Worker(padded); },
      [&](Worker& worker, int64_t i) {
        const FlushSubnormals flush;
        const Piece& piece = pieces[static_cast<size_t>(i)];
        const int64_t s = piece.segment, count = counts[static_cast<size_t>(s)];
        const float inverse = count ? static_cast<float>(1.0 / static_cast<double>(count)) : 0.0f;
        const float* given = as_floats(grads.type, grads.at(s, 0), dim, worker.converted);
        std::copy(given, given + dim, worker.grad);
        if (stats.numel()) std::copy(stat + s * dim, stat + (s + 1) * dim, worker.stat);
        for (int64_t c = 0; c < padded; c += kLanes) {
          Vec g = load(worker.grad + c), t = load(worker.stat + c);
          rule.prepare(g, t, inverse);
          store(worker.grad + c, g);
          store(worker.stat + c, t);
        }
        const bool* live = tokens.mask_of(s);
        const int64_t begin = tokens.begin(s), end = tokens.end(s);
        for (int64_t n = piece.begin; n < piece.end; ++n) {
          char* row = to.at(s, n);
          if (n >= end || (live && !live[n])) {
            std::memset(row, 0, row_bytes);
            continue;
          }
          const float* values = Rule::kReadsX ? as_floats(from.type, from.at(s, n), dim, worker.converted) : nullptr;
          float* result = in_place ? reinterpret_cast<float*>(row) : worker.converted;
          row_gradient(rule, values, static_cast<int32_t>(n - begin), worker.grad, worker.stat, dim, result);
          if (!in_place) from_floats(to.type, row, result, dim);
        }
      });
}

template <class Rule>
void columns_backward(const Rule& rule, const Tensor& grad, const std::optional<Tensor>& x, const Tensor& stats,
                      const Tokens& tokens, Tensor& out) {
  constexpr int64_t kColumns = 16, kRun = 4096;
  const int64_t dim = grad.size(1), blocks = (dim + kColumns - 1) / kColumns, all = tokens.tokens;
  const auto element = static_cast<int64_t>(out.element_size());
  const Lines grads(grad, dim, 1), to(out, dim * all, all);
  const Lines from = x ? Lines(*x, x->stride(0), x->stride(2)) : Lines();
  const bool in_place = to.type == ScalarType::Float;
  const auto* stat = static_cast<const float*>(stats.const_data_ptr());
  struct Worker {
    Scratch scratch;
    float* converted = scratch.take(kRun);
  };
  parallel_workers(
      tokens.segments * blocks, [&] { return Worker(); },
      [&](Worker& worker, int64_t item) {
        const FlushSubnormals flush;
        const int64_t s = item / blocks, column = item % blocks * kColumns, columns = std::min(kColumns, dim - column);
        const int64_t end = tokens.end(s), count = tokens.count(s);
        const float inverse = count ? static_cast<float>(1.0 / static_cast<double>(count)) : 0.0f;
        const bool* live = tokens.mask_of(s);
        float of_columns[kColumns];
        const float* given = as_floats(grads.type, grads.at(s, column), columns, of_columns);
        for (int64_t c = 0; c < columns; ++c) {
          char* row = to.at(s, column + c);
          Vec g(given[c]), t(stats.numel() ? stat[s * dim + column + c] : 0.0f);
          if constexpr (std::is_same_v<Rule, ToLargest>) {
            std::memset(row, 0, static_cast<size_t>(all * element));
            const auto index = std::bit_cast<int32_t>(float{t[0]});
            if (index >= 0 && index < all) from_floats(to.type, row + index * element, given + c, 1);
            continue;
          }
          rule.prepare(g, t, inverse);
          for (int64_t begin = 0; begin < end; begin += kRun) {
            const int64_t size = std::min(kRun, end - begin);
            char* there = row + begin * element;
            const float* values = nullptr;
            if (Rule::kReadsX)
              values = as_floats(from.type, from.at(s, column + c) + begin * element, size, worker.converted);
            float* result = in_place ? reinterpret_cast<float*>(there) : worker.converted;
            column_gradient(rule, values, g, t, size, result);
            if (!in_place) from_floats(to.type, there, result, size);
          }
          for (int64_t n = 0; live && n < end; ++n)
            if (!live[n]) std::memset(row + n * element, 0, static_cast<size_t>(element));
          std::memset(row + end * element, 0, static_cast<size_t>((all - end) * element));
        }
      });
}

void pool_backward(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> lengths, std::optional<Tensor> mask,
                   std::optional<Tensor> cu_seqlens, Tensor stats, int64_t token_count, bool tokens_contiguous,
                   int64_t mode_number, double p, Tensor grad_x) {
  in_large_pages(grad_x);
  const auto mode = static_cast<Mode>(mode_number);
  const int64_t segments = grad.size(0), dim = grad.size(1);
  const Tokens tokens(segments, token_count, lengths, mask, cu_seqlens);
  if (mode == kLogSumExp || mode == kGem) needed(x, "x");
  const auto run = [&](const auto& rule) {
    if (segments == 0 || dim == 0 || token_count == 0) return;
    if (tokens_contiguous)
      columns_backward(rule, grad, x, stats, tokens, grad_x);
    else
      rows_backward(rule, grad, x, stats, tokens, grad_x);
  };
  if (mode == kMax)
    run(ToLargest{});
  else if (mode == kLogSumExp)
    run(Softmax{});
  else if (mode != kGem)
    run(Share{mode == kMean});
  else
    run(PowerShare{static_cast<float>(p)});
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "pool_backward", pool_backward);
}

}  // namespace
}  // namespace velm::pooling
