// The attention operators on CUDA kernels.

#include <tuple>

#include "attention/forward_cuda.h"
#include "attention/norm_cuda.h"
#include "device/tensor.h"

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

RowSpan rows_of(const Tensor& t) {
  if (t.dim() == 3) return {span_of(t), 0, t.stride(1), t.stride(0)};
  return {span_of(t), t.stride(0), t.stride(1), t.stride(2)};
}

MatrixSpan matrix_of(const MaybeTensor& t) {
  MatrixSpan m;
  if (!t) return m;
  m.data = span_of(*t);
  if (t->scalar_type() != ScalarType::Bool) m.dtype = dtype_of(*t);
  for (int d = 0; d < 4; ++d) m.stride[d] = t->size(d) == 1 ? 0 : t->stride(d);
  return m;
}

// Uninitialised (batch, heads, rows, dim), in memory (batch, rows, heads, dim); (rows, heads, dim) of packed rows.
Tensor empty_heads_last(const Tensor& like, int64_t dim) {
  if (like.dim() == 3) return new_empty(like, {like.size(0), like.size(1), dim});
  return torch::stable::transpose(new_empty(like, {like.size(0), like.size(2), like.size(1), dim}), 1, 2);
}

// Floats for each row of a tensor that is shaped like `like`, of `heads` heads.
Tensor empty_of_rows(const Tensor& like, int64_t heads) {
  if (like.dim() == 3) return new_empty(like, {heads, like.size(0)}, ScalarType::Float);
  return new_empty(like, {like.size(0), heads, like.size(2)}, ScalarType::Float);
}

// x itself where there is no weight.
Tensor normed(const Tensor& x, const MaybeTensor& weight, double eps, Stream stream) {
  if (!weight) return x;
  const bool packed = x.dim() == 3;
  Tensor y = empty_heads_last(x, x.size(x.dim() - 1));
  RmsNorm p{};
  p.dtype = dtype_of(x);
  p.batch = packed ? 1 : x.size(0);
  p.heads = x.size(1);
  p.rows = x.size(packed ? 0 : 2);
  p.dim = x.size(x.dim() - 1);
  p.eps = eps;
  p.x = rows_of(x);
  p.y = rows_of(y);
  p.weight = span_of(*weight);
  rms_norm(p, stream);
  return y;
}

// With query and key as the norms leave them.
void set_problem(Attention& p, const Arguments& a, const Tensor& query, const Tensor& key) {
  const bool packed = a.packed();
  const int rows = packed ? 0 : 2, last = packed ? 2 : 3;
  p.dtype = dtype_of(query);
  p.batch = packed ? a.cu_seqlens_q->numel() - 1 : query.size(0);
  p.heads = query.size(1);
  p.kv_heads = key.size(1);
  p.queries = query.size(rows);
  p.keys = key.size(rows);
  p.head_dim = query.size(last);
  p.value_dim = a.value.size(last);
  p.longest_queries = packed ? a.max_seqlen_q : p.queries;
  p.longest_keys = packed ? a.max_seqlen_k : p.keys;
  if (p.queries > INT32_MAX || p.keys > INT32_MAX)
    throw std::runtime_error("velm: attention: more than 2^31 - 1 tokens");
  p.query = rows_of(query);
  p.key = rows_of(key);
  p.value = rows_of(a.value);
  p.key_lengths = span_of(a.key_lengths);
  p.range_start = span_of(a.range_start);
  p.range_stop = span_of(a.range_stop);
  p.cu_seqlens_q = span_of(a.cu_seqlens_q);
  p.cu_seqlens_k = span_of(a.cu_seqlens_k);
  p.key_mask = span_of(a.key_mask);
  p.mask = matrix_of(a.mask);
  p.bias = matrix_of(a.bias);
  if (a.dropout_p > 0) p.seed = span_of(a.seed);
  p.scale = a.scale;
  p.softcap = a.softcap;
  p.dropout_p = a.dropout_p;
  p.is_causal = a.is_causal;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward_op(
    Tensor query, Tensor key, Tensor value, MaybeTensor key_lengths, MaybeTensor range_start, MaybeTensor range_stop,
    MaybeTensor key_mask, MaybeTensor mask, MaybeTensor bias, MaybeTensor query_norm_weight,
    MaybeTensor key_norm_weight, MaybeTensor seed, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, bool is_causal, double scale, double softcap, double norm_eps,
    double dropout_p, bool return_key_mass) {
  if (return_key_mass) throw std::runtime_error("velm: attention_forward: no key mass on CUDA kernels");
  const Current current(query);
  const Arguments a{query,        key,          value,        key_lengths,       range_start,     range_stop,
                    key_mask,     mask,         bias,         query_norm_weight, key_norm_weight, seed,
                    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,      is_causal,       scale,
                    softcap,      norm_eps,     dropout_p};
  const Tensor query_normed = normed(query, query_norm_weight, norm_eps, current.stream());
  const Tensor key_normed = normed(key, key_norm_weight, norm_eps, current.stream());
  Tensor out = empty_heads_last(query, value.size(value.dim() - 1));
  Tensor logsumexp = empty_of_rows(query, query.size(1));
  AttentionForward p{};
  set_problem(p, a, query_normed, key_normed);
  p.out = rows_of(out);
  p.logsumexp = span_of(logsumexp);
  attention_forward(p, current.stream());
  return {out, logsumexp, new_empty(query, {0}, ScalarType::Float)};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward_op));
}

}  // namespace
}  // namespace velm::cuda
