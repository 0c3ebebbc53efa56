// bilinear_attention: scores, their softmax over all pairs, and its gradient.

#include <limits>

#include "fusion/bilinear_attention/cpu_pairs.h"
#include "simd/math.h"

namespace velm {
namespace {

using namespace pairs;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// Numbers that are summed in single precision.
constexpr int64_t kSum = 512;

// The softmax of all pairs of a glimpse, in out, which may be x. False where all weights are NaN: a score is NaN or
// +inf, or all are -inf.
bool softmax(const float* x, int64_t size, float* out) {
  const FlushSubnormals flush;
  Vec largest(-kInfinity);
  vectors(size, [&](int64_t i, int n) VELM_INLINE_LAMBDA {
    const Vec value = load_first(x + i, n);
    largest = maximum(n == kLanes ? value : select(first_lanes(n), value, Vec(-kInfinity)), largest);
  });
  const Vec base(max_lanes(largest));
  Vec sum = zero();
  vectors(size, [&](int64_t i, int n) VELM_INLINE_LAMBDA {
    const Vec weight = simd::exp(load_first(x + i, n) - base);
    sum += n == kLanes ? weight : select(first_lanes(n), weight, zero());
    store_first(out + i, weight, n);
  });
  const float total = sum_lanes(sum);
  const Vec scale(1.0f / total);
  vectors(size, [&](int64_t i, int n) VELM_INLINE_LAMBDA { store_first(out + i, load_first(out + i, n) * scale, n); });
  return total == total;
}

void bilinear_attention_forward(Tensor v, Tensor q, Tensor h, Given bias, Given v_lengths, Given q_lengths,
                                Given v_mask, Given q_mask, bool, Tensor maps, Given logits) {
  const Problem p = problem_of(v, q, h.size(0), v_lengths, q_lengths, v_mask, q_mask);
  const int64_t size = p.batch * p.glimpses * p.pairs();
  if (size == 0) return;
  Scratch memory;
  const bool is_fp32 = v.scalar_type() == ScalarType::Float;
  float* raw = is_fp32 ? mutable_data<float>(logits ? *logits : maps) : memory.take(size);
  scores(p, shared_rows(h), bias, -kInfinity, raw);
  const Matrices to_maps(maps, p.glimpses * p.pairs(), p.pairs());
  const Matrices to_logits(logits ? *logits : maps, p.glimpses * p.pairs(), p.pairs());
  parallel_ranges(p.batch * p.glimpses, 1, [&](int64_t begin, int64_t end) {
    Scratch own;
    Live live(own, p);
    float* weights = own.take(p.pairs());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.glimpses, g = task % p.glimpses;
      const float* from = raw + task * p.pairs();
      if (logits && !is_fp32) to_logits.write(b, g, 0, p.pairs(), from);
      live.of(p, b);
      const bool some = live.regions > 0 && live.words > 0;
      if (!some || !softmax(from, p.pairs(), weights)) {
        // NaN at the pairs that count and nowhere else.
        std::fill_n(weights, p.pairs(), 0.0f);
        for (int64_t i = 0; some && i < live.regions; ++i)
          for (int64_t j = 0; j < live.words; ++j) weights[live.region[i] * p.q.rows + live.word[j]] = kNaN;
      }
      to_maps.write(b, g, 0, p.pairs(), weights);
    }
  });
}

// In single precision for a few numbers at a time.
double sum_of(const float* x, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; i += kSum) {
    Vec sum = zero();
    vectors(std::min(kSum, size - i), [&](int64_t j, int n) VELM_INLINE_LAMBDA { sum += load_first(x + i + j, n); });
    total += sum_lanes(sum);
  }
  return total;
}

// The gradient of the scores of a glimpse: weights [i][j] holds the maps and is replaced.
void score_gradient(float* weights, const float* grad_maps, const float* grad_logits, int64_t size) {
  Vec dot = zero();
  if (grad_maps)
    vectors(size, [&](int64_t i, int n)
                      VELM_INLINE_LAMBDA { dot = fma(load_first(weights + i, n), load_first(grad_maps + i, n), dot); });
  const Vec along(sum_lanes(dot));
  vectors(size, [&](int64_t i, int n) VELM_INLINE_LAMBDA {
    Vec slope = grad_logits ? load_first(grad_logits + i, n) : zero();
    if (grad_maps) slope += load_first(weights + i, n) * (load_first(grad_maps + i, n) - along);
    store_first(weights + i, slope, n);
  });
}

void bilinear_attention_backward(Given grad_maps, Given grad_logits, Tensor v, Tensor q, Tensor h, Given v_lengths,
                                 Given q_lengths, Given v_mask, Given q_mask, Tensor maps, bool, Given grad_v,
                                 Given grad_q, Given grad_h, Given grad_bias) {
  const Problem p = problem_of(v, q, h.size(0), v_lengths, q_lengths, v_mask, q_mask);
  Scratch memory;
  const Weights weights{memory.take(p.batch * Weights::room(p))};
  double* sums = memory.take<double>(p.batch * p.glimpses);
  const int64_t all = p.glimpses * p.pairs();
  const Matrices of_maps(maps, all, p.pairs());
  const Matrices of_grad(grad_maps ? *grad_maps : maps, all, p.pairs());
  const Matrices of_logits(grad_logits ? *grad_logits : maps, all, p.pairs());
  pack_weights(p, weights, [&](const Live& live, int64_t b, int64_t g, float* line, float* pairs) {
    const int64_t size = live.regions * live.words;
    float *of_map = pairs + size, *of_logit = pairs + 2 * size;
    gather(p, live, of_maps, b, g, line, pairs);
    if (grad_maps) gather(p, live, of_grad, b, g, line, of_map);
    if (grad_logits) gather(p, live, of_logits, b, g, line, of_logit);
    score_gradient(pairs, grad_maps ? of_map : nullptr, grad_logits ? of_logit : nullptr, size);
    // The softmax does not see a bias: only the gradients of the logits count.
    if (grad_bias) sums[b * p.glimpses + g] = grad_logits ? sum_of(of_logit, size) : 0.0;
  });
  for (int64_t g = 0; g < p.glimpses && grad_bias; ++g) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) sum += sums[b * p.glimpses + g];
    with_type(v.scalar_type(),
              [&](auto t) { store_scalar(mutable_data<decltype(t)>(*grad_bias) + g, static_cast<float>(sum)); });
  }
  if (!(grad_v || grad_q || grad_h) || p.k == 0) return;
  const Matrices factors = shared_rows(h);
  float* of_h = grad_h ? memory.take(p.glimpses * p.k) : nullptr;
  contract(p, &factors, weights, Gradients(grad_v, grad_q, of_h));
  if (grad_h) {
    const Matrices to_h = shared_rows(*grad_h);
    for (int64_t g = 0; g < p.glimpses; ++g) to_h.write(0, g, 0, p.k, of_h + g * p.k);
  }
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "bilinear_attention_forward", bilinear_attention_forward);
  VELM_KERNEL(m, "bilinear_attention_backward", bilinear_attention_backward);
}

}  // namespace
}  // namespace velm
