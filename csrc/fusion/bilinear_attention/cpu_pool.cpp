// bilinear_attention_pool: the contraction with weights that are given.

#include "fusion/bilinear_attention/cpu_pairs.h"

namespace velm {
namespace {

using namespace pairs;

// Attention that is given, packed.
void pack_attention(const Problem& p, const Tensor& attention, const Weights& to) {
  const Matrices from(attention, p.glimpses * p.pairs(), p.pairs());
  pack_weights(p, to, [&](const Live& live, int64_t b, int64_t g, float* line, float* pairs) {
    gather(p, live, from, b, g, line, pairs);
  });
}

void bilinear_attention_pool_forward(Tensor v, Tensor q, Tensor attention, Given v_lengths, Given q_lengths,
                                     Given v_mask, Given q_mask, Tensor out) {
  const Problem p = problem_of(v, q, attention.size(1), v_lengths, q_lengths, v_mask, q_mask);
  if (p.batch * p.glimpses * p.k == 0) return;
  Scratch memory;
  const Weights weights{memory.take(p.batch * Weights::room(p))};
  pack_attention(p, attention, weights);
  const Matrices to_out(out);
  Gradients to;
  to.h = to_out;
  contract(p, nullptr, weights, to);
}

void bilinear_attention_pool_backward(Tensor grad, Tensor v, Tensor q, Tensor attention, Given v_lengths,
                                      Given q_lengths, Given v_mask, Given q_mask, Given grad_v, Given grad_q,
                                      Given grad_attention) {
  const Problem p = problem_of(v, q, attention.size(1), v_lengths, q_lengths, v_mask, q_mask);
  const Matrices factors(grad);
  Scratch memory;
  const int64_t size = p.batch * p.glimpses * p.pairs();
  if (grad_attention && size > 0) {
    const bool is_fp32 = v.scalar_type() == ScalarType::Float;
    float* raw = is_fp32 ? mutable_data<float>(*grad_attention) : memory.take(size);
    scores(p, factors, std::nullopt, 0.0f, raw);
    const Matrices to(*grad_attention, p.pairs(), 0);
    if (!is_fp32)
      parallel_items(p.batch * p.glimpses,
                     [&](int64_t task) { to.write(task, 0, 0, p.pairs(), raw + task * p.pairs()); });
  }
  if ((grad_v || grad_q) && p.k > 0) {
    const Weights weights{memory.take(p.batch * Weights::room(p))};
    pack_attention(p, attention, weights);
    contract(p, &factors, weights, Gradients(grad_v, grad_q, nullptr));
  }
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "bilinear_attention_pool_forward", bilinear_attention_pool_forward);
  VELM_KERNEL(m, "bilinear_attention_pool_backward", bilinear_attention_pool_backward);
}

}  // namespace
}  // namespace velm
