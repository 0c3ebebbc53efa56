// The attention operators: results are allocated and norms applied here, the rest is on plain
// pointers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "attention/cross_attention/cpu_backward.h"
#include "attention/cross_attention/cpu_forward.h"
#include "attention/cross_attention/cpu_norm.h"
#include "simd/parallel.h"

namespace velm::attention {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using MaybeTensor = std::optional<Tensor>;

// Bits of grad_mask.
enum Wanted : int64_t { kQuery = 1, kKey = 2, kValue = 4, kBias = 8, kQueryNorm = 16, kKeyNorm = 32 };

// The same arguments with normalised queries and keys.
Arguments apply_norms(Arguments a) {
  const bool varlen = a.cu_seqlens_q.has_value();
  if (a.query_norm_weight) a.query = rms_norm(a.query, *a.query_norm_weight, a.norm_eps, varlen);
  if (a.key_norm_weight) a.key = rms_norm(a.key, *a.key_norm_weight, a.norm_eps, varlen);
  return a;
}

Tensor new_like(const Tensor& t) {
  const auto sizes = t.sizes();
  return new_empty(t, sizes);
}

Tensor new_wide_heads_last(const Tensor& like) {
  if (like.dim() == 3) return new_empty(like, {like.size(0), like.size(1), like.size(2)}, ScalarType::Float);
  return torch::stable::transpose(
      new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}, ScalarType::Float), 1, 2);
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    Tensor query, Tensor key, Tensor value, MaybeTensor key_lengths, MaybeTensor range_start, MaybeTensor range_stop,
    MaybeTensor key_mask, MaybeTensor mask, MaybeTensor bias, MaybeTensor query_norm_weight,
    MaybeTensor key_norm_weight, MaybeTensor seed, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, int64_t, int64_t,
    bool is_causal, double scale, double softcap, double norm_eps, double dropout_p, bool return_key_mass) {
  const Arguments arguments =
      apply_norms({query, key, value, key_lengths, range_start, range_stop, key_mask, mask, bias, query_norm_weight,
                   key_norm_weight, seed, cu_seqlens_q, cu_seqlens_k, is_causal, scale, softcap, norm_eps, dropout_p});
  const Problem p(arguments);
  Tensor out = new_heads_last(query, p.value_dim);
  Tensor logsumexp = p.varlen ? new_empty(query, {p.heads, p.queries}, ScalarType::Float)
                              : new_empty(query, {p.batch, p.heads, p.queries}, ScalarType::Float);
  Tensor key_mass = !return_key_mass ? new_empty(query, {0}, ScalarType::Float)
                    : p.varlen       ? new_empty(query, {p.heads, p.keys}, ScalarType::Float)
                                     : new_empty(query, {p.batch, p.heads, p.keys}, ScalarType::Float);
  float* lse = static_cast<float*>(logsumexp.mutable_data_ptr());
  forward(p, rows_of(out, p.varlen), lse, return_key_mass ? static_cast<float*>(key_mass.mutable_data_ptr()) : nullptr);
  return {out, logsumexp, key_mass};
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, MaybeTensor grad_logsumexp, Tensor query, Tensor key, Tensor value, MaybeTensor key_lengths,
    MaybeTensor range_start, MaybeTensor range_stop, MaybeTensor key_mask, MaybeTensor mask, MaybeTensor bias,
    MaybeTensor query_norm_weight, MaybeTensor key_norm_weight, MaybeTensor seed, MaybeTensor cu_seqlens_q,
    MaybeTensor cu_seqlens_k, Tensor out, Tensor logsumexp, int64_t, int64_t, bool is_causal, double scale,
    double softcap, double norm_eps, double dropout_p, int64_t grad_mask) {
  const Arguments arguments =
      apply_norms({query, key, value, key_lengths, range_start, range_stop, key_mask, mask, bias, query_norm_weight,
                   key_norm_weight, seed, cu_seqlens_q, cu_seqlens_k, is_causal, scale, softcap, norm_eps, dropout_p});
  const Problem p(arguments);
  const auto wants = [&](int64_t bit) { return (grad_mask & bit) != 0; };
  const auto result = [&](int64_t bit, const Tensor& like) {
    return wants(bit) ? new_heads_last(like, like.size(like.dim() - 1)) : new_empty(like, {0});
  };
  Tensor grad_query = result(kQuery, query), grad_key = result(kKey, key), grad_value = result(kValue, value);
  Tensor grad_bias = wants(kBias) ? new_like(*bias) : new_empty(query, {0});
  Tensor grad_query_norm = wants(kQueryNorm) ? new_like(*query_norm_weight) : new_empty(query, {0});
  Tensor grad_key_norm = wants(kKeyNorm) ? new_like(*key_norm_weight) : new_empty(query, {0});

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
  MaybeTensor wide_query, wide_key;
  if (query_norm_weight && wants(kQuery | kQueryNorm)) wide_query = new_wide_heads_last(query);
  if (key_norm_weight && wants(kKey | kKeyNorm)) wide_key = new_wide_heads_last(key);
  if (wide_query || wants(kQuery)) g.grad_query = rows_of(wide_query ? *wide_query : grad_query, p.varlen);
  if (wide_key || wants(kKey)) g.grad_key = rows_of(wide_key ? *wide_key : grad_key, p.varlen);
  if (wants(kValue)) g.grad_value = rows_of(grad_value, p.varlen);
  MaybeTensor wide_bias;
  if (wants(kBias)) {
    for (int d = 0; d < 4; ++d) g.bias_size[d] = bias->size(d);
    const int64_t partials = bias_partials(p, g.bias_size);
    if (partials > 1 || p.bias.dtype != ScalarType::Float) {
      wide_bias = new_empty(query, {partials * bias->numel()}, ScalarType::Float);
      g.grad_bias = static_cast<float*>(torch::stable::zero_(*wide_bias).mutable_data_ptr());
    } else {
      g.grad_bias = static_cast<float*>(torch::stable::zero_(grad_bias).mutable_data_ptr());
    }
  }

  backward(p, g);

  if (wide_bias) convert_bias_gradient(grad_bias, g.grad_bias);
  if (wide_query) {
    rms_norm_backward(query, *query_norm_weight, norm_eps, p.varlen, *wide_query,
                      wants(kQuery) ? rows_of(grad_query, p.varlen) : Rows{},
                      wants(kQueryNorm) ? &grad_query_norm : nullptr);
  }
  if (wide_key) {
    rms_norm_backward(key, *key_norm_weight, norm_eps, p.varlen, *wide_key,
                      wants(kKey) ? rows_of(grad_key, p.varlen) : Rows{}, wants(kKeyNorm) ? &grad_key_norm : nullptr);
  }
  return {grad_query, grad_key, grad_value, grad_bias, grad_query_norm, grad_key_norm};
}

}  // namespace

}  // namespace velm::attention

#define VELM_IMPL_(name, dispatch, m) STABLE_TORCH_LIBRARY_IMPL(name, dispatch, m)
#define VELM_IMPL(name, dispatch, m) VELM_IMPL_(name, dispatch, m)

VELM_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&velm::attention::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&velm::attention::attention_backward));
}
