// The attention operators on CUDA kernels.

#include "attention/cross_attention/cuda_norm.h"
#include "attention/cuda_backward.h"
#include "attention/cuda_tensors.h"

namespace velm::cuda {
namespace {

using namespace device;
using MaybeTensor = std::optional<Tensor>;
using torch::stable::new_empty;

// The tensors and scalars that all operators take, in the order of their schemas.
struct Arguments {
  Tensor query, key, value;
  MaybeTensor key_lengths, range_start, range_stop, key_mask, mask, bias, query_norm_weight, key_norm_weight, seed,
      cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  bool is_causal;
  double scale, softcap, norm_eps, dropout_p;

  bool packed() const { return cu_seqlens_q.has_value(); }
};

// x itself where there is no weight.
Tensor normed(const Tensor& x, const MaybeTensor& weight, double eps, Stream stream) {
  if (!weight) return x;
  Tensor y = empty_heads_last(x, x.size(x.dim() - 1));
  rms_norm({rows_of(x), rows_of(y), view_of(*weight), eps}, stream);
  return y;
}

// With query and key as the norms leave them.
void set_problem(Attention& p, const Arguments& a, const Tensor& query, const Tensor& key) {
  p.query = rows_of(query);
  p.key = rows_of(key);
  p.value = rows_of(a.value);
  p.batch = a.packed() ? a.cu_seqlens_q->numel() - 1 : query.size(0);
  p.longest_queries = a.packed() ? a.max_seqlen_q : p.queries();
  p.longest_keys = a.packed() ? a.max_seqlen_k : p.keys();
  if (p.queries() > INT32_MAX || p.keys() > INT32_MAX)
    throw std::runtime_error("velm: attention: more than 2^31 - 1 tokens");
  p.key_lengths = view_of(a.key_lengths);
  p.range_start = view_of(a.range_start);
  p.range_stop = view_of(a.range_stop);
  p.cu_seqlens_q = view_of(a.cu_seqlens_q);
  p.cu_seqlens_k = view_of(a.cu_seqlens_k);
  p.key_mask = view_of(a.key_mask);
  p.mask = view_of(a.mask);
  p.bias = view_of(a.bias);
  if (a.dropout_p > 0) p.seed = view_of(a.seed);
  p.scale = a.scale;
  p.softcap = a.softcap;
  p.dropout_p = a.dropout_p;
  p.is_causal = a.is_causal;
}

void attention_forward_op(Tensor query, Tensor key, Tensor value, MaybeTensor key_lengths, MaybeTensor range_start,
                          MaybeTensor range_stop, MaybeTensor key_mask, MaybeTensor mask, MaybeTensor bias, MaybeTensor,
                          MaybeTensor, MaybeTensor query_norm_weight, MaybeTensor key_norm_weight, MaybeTensor seed,
                          MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, int64_t max_seqlen_q,
                          int64_t max_seqlen_k, bool is_causal, double scale, double softcap, double norm_eps,
                          double dropout_p, bool, Tensor out, Tensor logsumexp, MaybeTensor key_mass) {
  const Current current(query);
  const Arguments a{query,        key,          value,        key_lengths,       range_start,     range_stop,
                    key_mask,     mask,         bias,         query_norm_weight, key_norm_weight, seed,
                    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,      is_causal,       scale,
                    softcap,      norm_eps,     dropout_p};
  const Tensor query_normed = normed(query, query_norm_weight, norm_eps, current.stream());
  const Tensor key_normed = normed(key, key_norm_weight, norm_eps, current.stream());
  AttentionForward p{};
  set_problem(p, a, query_normed, key_normed);
  p.out = rows_of(out);
  p.logsumexp = view_of(logsumexp);
  MaybeTensor shift;
  if (key_mass) shift = empty_of_rows(query, query.size(1));
  p.shift = view_of(shift);
  run_forward(p, query, current.stream());
  if (key_mass) attention_key_mass(p, p.logsumexp, p.shift, view_of(*key_mass), current.stream());
}

// Floats shaped and laid out like the gradient of x.
Tensor floats_heads_last(const Tensor& x) {
  const int64_t dim = x.size(x.dim() - 1);
  if (x.dim() == 3) return new_empty(x, {x.size(0), x.size(1), dim}, ScalarType::Float);
  return torch::stable::transpose(new_empty(x, {x.size(0), x.size(2), x.size(1), dim}, ScalarType::Float), 1, 2);
}

// From the gradient of a norm's result to those of its argument and weight that are wanted.
void norm_backward(const Tensor& x, const Tensor& weight, const Tensor& grad_y, const MaybeTensor& grad_x,
                   const MaybeTensor& grad_weight, double eps, Stream stream) {
  RmsNormBackward p{};
  p.eps = eps;
  p.x = rows_of(x);
  p.weight = view_of(weight);
  p.grad_y = rows_of(grad_y);
  p.grad_x = rows_of(grad_x);
  p.grad_weight = view_of(grad_weight);
  std::optional<Tensor> partials;
  if (p.grad_weight) {
    partials = new_empty(x, {rms_norm_partials(p)}, ScalarType::Float);
    p.partials = view_of(*partials);
  }
  rms_norm_backward(p, stream);
}

void attention_backward_op(Tensor grad_out, MaybeTensor grad_logsumexp, Tensor query, Tensor key, Tensor value,
                           MaybeTensor key_lengths, MaybeTensor range_start, MaybeTensor range_stop,
                           MaybeTensor key_mask, MaybeTensor mask, MaybeTensor bias, MaybeTensor, MaybeTensor,
                           MaybeTensor query_norm_weight, MaybeTensor key_norm_weight, MaybeTensor seed,
                           MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, Tensor out, Tensor logsumexp,
                           int64_t max_seqlen_q, int64_t max_seqlen_k, bool is_causal, double scale, double softcap,
                           double norm_eps, double dropout_p, MaybeTensor grad_query, MaybeTensor grad_key,
                           MaybeTensor grad_value, MaybeTensor grad_bias, MaybeTensor, MaybeTensor,
                           MaybeTensor grad_query_norm, MaybeTensor grad_key_norm) {
  const Current current(query);
  const Arguments a{query,        key,          value,        key_lengths,       range_start,     range_stop,
                    key_mask,     mask,         bias,         query_norm_weight, key_norm_weight, seed,
                    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,      is_causal,       scale,
                    softcap,      norm_eps,     dropout_p};
  const Tensor query_normed = normed(query, query_norm_weight, norm_eps, current.stream());
  const Tensor key_normed = normed(key, key_norm_weight, norm_eps, current.stream());
  AttentionBackward p{};
  set_problem(p, a, query_normed, key_normed);
  Tensor delta = empty_of_rows(query, query.size(1)), shift = empty_of_rows(query, query.size(1));
  p.out = rows_of(out);
  p.grad_out = rows_of(grad_out);
  p.logsumexp = view_of(logsumexp);
  p.delta = view_of(delta);
  p.shift = view_of(shift);
  p.grad_logsumexp = numbers_of(grad_logsumexp);
  // Through a norm, gradients stay in float32 until they are past it.
  MaybeTensor float_query, float_key;
  if (query_norm_weight && (grad_query || grad_query_norm)) float_query = floats_heads_last(query);
  if (key_norm_weight && (grad_key || grad_key_norm)) float_key = floats_heads_last(key);
  p.grad_query = rows_of(float_query ? float_query : grad_query);
  p.grad_key = rows_of(float_key ? float_key : grad_key);
  p.grad_value = rows_of(grad_value);
  attention_delta(p, current.stream());
  if (grad_bias) {
    // Tiles that nobody sees are not visited.
    torch::stable::zero_(*grad_bias);
    p.grad_bias = view_of(grad_bias);
    const int64_t* size = p.grad_bias.size;
    const bool is_whole = size[0] == p.batch && size[1] == p.heads() && size[2] == p.queries() && size[3] == p.keys();
    if (!is_whole) {
      const Tensor partials = new_empty(query, {attention_bias_partials(p)}, ScalarType::Float);
      attention_grad_bias(p, view_of(partials), current.stream());
      p.grad_bias = {};
    }
  }
  if (p.grad_query || p.grad_bias) attention_grad_query(p, current.stream());
  if (p.grad_key) attention_grad_key(p, current.stream());
  if (p.grad_value) attention_grad_value(p, current.stream());
  if (float_query)
    norm_backward(query, *query_norm_weight, *float_query, grad_query, grad_query_norm, norm_eps, current.stream());
  if (float_key) norm_backward(key, *key_norm_weight, *float_key, grad_key, grad_key_norm, norm_eps, current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "attention_forward", attention_forward_op);
  VELM_KERNEL(m, "attention_backward", attention_backward_op);
}

}  // namespace
}  // namespace velm::cuda
