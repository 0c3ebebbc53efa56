// The attention operators: norms are applied here, the rest is on plain pointers.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "attention/cross_attention/cpu_backward.h"
#include "attention/cross_attention/cpu_forward.h"
#include "attention/cross_attention/cpu_norm.h"
#include "common/kernel.h"
#include "simd/parallel.h"

namespace velm::attention {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using MaybeTensor = std::optional<Tensor>;

// The same arguments with normalised queries and keys.
Arguments apply_norms(Arguments a) {
  const bool varlen = a.cu_seqlens_q.has_value();
  if (a.query_norm_weight) a.query = rms_norm(a.query, *a.query_norm_weight, a.norm_eps, varlen);
  if (a.key_norm_weight) a.key = rms_norm(a.key, *a.key_norm_weight, a.norm_eps, varlen);
  return a;
}

Tensor new_floats_heads_last(const Tensor& like) {
  if (like.dim() == 3) return new_empty(like, {like.size(0), like.size(1), like.size(2)}, ScalarType::Float);
  return torch::stable::transpose(
      new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}, ScalarType::Float), 1, 2);
}

void attention_forward(Tensor query, Tensor key, Tensor value, MaybeTensor key_lengths, MaybeTensor range_start,
                       MaybeTensor range_stop, MaybeTensor key_mask, MaybeTensor mask, MaybeTensor bias,
                       MaybeTensor rel_pos_height, MaybeTensor rel_pos_width, MaybeTensor query_norm_weight,
                       MaybeTensor key_norm_weight, MaybeTensor seed, MaybeTensor cu_seqlens_q,
                       MaybeTensor cu_seqlens_k, int64_t, int64_t, bool is_causal, double scale, double softcap,
                       double norm_eps, double dropout_p, bool, Tensor out, Tensor logsumexp, MaybeTensor key_mass) {
  const Arguments arguments = apply_norms(
      {query,        key,          value,          key_lengths,   range_start,       range_stop,      key_mask,
       mask,         bias,         rel_pos_height, rel_pos_width, query_norm_weight, key_norm_weight, seed,
       cu_seqlens_q, cu_seqlens_k, is_causal,      scale,         softcap,           norm_eps,        dropout_p});
  const Problem p(arguments);
  forward(p, rows_of(out, p.varlen), static_cast<float*>(logsumexp.mutable_data_ptr()),
          key_mass ? static_cast<float*>(key_mass->mutable_data_ptr()) : nullptr);
}

// Writes an fp32 bias gradient in the dtype of the bias.
void convert_bias_gradient(const Tensor& to, const float* from) {
  with_type(dtype_of(to), [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(to.mutable_data_ptr());
    simd::parallel_ranges(to.numel(), 1 << 15,
                          [&](int64_t begin, int64_t end) { simd::convert(out + begin, from + begin, end - begin); });
  });
}

void attention_backward(Tensor grad_out, MaybeTensor grad_logsumexp, Tensor query, Tensor key, Tensor value,
                        MaybeTensor key_lengths, MaybeTensor range_start, MaybeTensor range_stop, MaybeTensor key_mask,
                        MaybeTensor mask, MaybeTensor bias, MaybeTensor rel_pos_height, MaybeTensor rel_pos_width,
                        MaybeTensor query_norm_weight, MaybeTensor key_norm_weight, MaybeTensor seed,
                        MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, Tensor out, Tensor logsumexp, int64_t,
                        int64_t, bool is_causal, double scale, double softcap, double norm_eps, double dropout_p,
                        MaybeTensor grad_query, MaybeTensor grad_key, MaybeTensor grad_value, MaybeTensor grad_bias,
                        MaybeTensor grad_rel_pos_height, MaybeTensor grad_rel_pos_width, MaybeTensor grad_query_norm,
                        MaybeTensor grad_key_norm) {
  const Arguments arguments = apply_norms(
      {query,        key,          value,          key_lengths,   range_start,       range_stop,      key_mask,
       mask,         bias,         rel_pos_height, rel_pos_width, query_norm_weight, key_norm_weight, seed,
       cu_seqlens_q, cu_seqlens_k, is_causal,      scale,         softcap,           norm_eps,        dropout_p});
  const Problem p(arguments);
  Gradients g;
  g.out = rows_of(out, p.varlen);
  g.grad_out = rows_of(grad_out, p.varlen);
  g.logsumexp = static_cast<const float*>(logsumexp.const_data_ptr());
  if (grad_logsumexp) {
    g.grad_logsumexp = static_cast<const float*>(grad_logsumexp->const_data_ptr());
    const int first = p.varlen ? 1 : 0;  // (heads, queries), or (batch, heads, queries)
    for (int d = first; d < 3; ++d) g.grad_logsumexp_stride[d] = grad_logsumexp->stride(d - first);
  }
  // Through a norm, gradients stay in fp32 until the norm's own backward.
  MaybeTensor float_query, float_key;
  if (query_norm_weight && (grad_query || grad_query_norm)) float_query = new_floats_heads_last(query);
  if (key_norm_weight && (grad_key || grad_key_norm)) float_key = new_floats_heads_last(key);
  const auto rows = [&](const MaybeTensor& t) { return t ? rows_of(*t, p.varlen) : Rows{}; };
  g.grad_query = rows(float_query ? float_query : grad_query);
  g.grad_key = rows(float_key ? float_key : grad_key);
  g.grad_value = rows(grad_value);
  g.grad_rel_pos_height = rows(grad_rel_pos_height);
  g.grad_rel_pos_width = rows(grad_rel_pos_width);
  MaybeTensor float_bias;
  if (grad_bias) {
    for (int d = 0; d < 4; ++d) g.bias_size[d] = bias->size(d);
    const int64_t partials = bias_partials(p, g.bias_size);
    if (partials > 1 || p.bias.dtype != ScalarType::Float) {
      float_bias = new_empty(query, {partials * bias->numel()}, ScalarType::Float);
      g.grad_bias = static_cast<float*>(torch::stable::zero_(*float_bias).mutable_data_ptr());
    } else {
      g.grad_bias = static_cast<float*>(torch::stable::zero_(*grad_bias).mutable_data_ptr());
    }
  }

  backward(p, g);

  if (float_bias) convert_bias_gradient(*grad_bias, g.grad_bias);
  const auto through_norm = [&](const Tensor& x, const MaybeTensor& weight, const MaybeTensor& grad_y,
                                const MaybeTensor& grad_x, const MaybeTensor& grad_weight) {
    if (grad_y)
      rms_norm_backward(x, *weight, norm_eps, p.varlen, *grad_y, rows(grad_x), grad_weight ? &*grad_weight : nullptr);
  };
  through_norm(query, query_norm_weight, float_query, grad_query, grad_query_norm);
  through_norm(key, key_norm_weight, float_key, grad_key, grad_key_norm);
}

}  // namespace

}  // namespace velm::attention

#define VELM_IMPL_(name, dispatch, m) STABLE_TORCH_LIBRARY_IMPL(name, dispatch, m)
#define VELM_IMPL(name, dispatch, m) VELM_IMPL_(name, dispatch, m)

VELM_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "attention_forward", velm::attention::attention_forward);
  VELM_KERNEL(m, "attention_backward", velm::attention::attention_backward);
}
