// Registration of the attention operators.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "attention/cpu_forward.h"

namespace velm::attention {

namespace {

using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    Tensor query, Tensor key, Tensor value, MaybeTensor key_lengths, MaybeTensor range_start, MaybeTensor range_stop,
    MaybeTensor key_mask, MaybeTensor mask, MaybeTensor bias, MaybeTensor query_norm_weight,
    MaybeTensor key_norm_weight, MaybeTensor seed, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, int64_t, int64_t,
    bool is_causal, double scale, double softcap, double norm_eps, double dropout_p, bool return_key_mass) {
  const Arguments arguments{query,     key,     value, key_lengths,       range_start,     range_stop,
                            key_mask,  mask,    bias,  query_norm_weight, key_norm_weight, seed,
                            cu_seqlens_q, cu_seqlens_k, is_causal, scale, softcap, norm_eps, dropout_p};
  Problem p(arguments);
  Tensor out = new_heads_last(query, p.value_dim);
  const bool varlen = p.varlen;
  Tensor logsumexp = varlen ? torch::stable::new_empty(query, {p.heads, p.queries}, ScalarType::Float)
                            : torch::stable::new_empty(query, {p.batch, p.heads, p.queries}, ScalarType::Float);
  Tensor key_mass = !return_key_mass ? torch::stable::new_empty(query, {0}, ScalarType::Float)
                    : varlen         ? torch::stable::new_empty(query, {p.heads, p.keys}, ScalarType::Float)
                                     : torch::stable::new_empty(query, {p.batch, p.heads, p.keys}, ScalarType::Float);
  float* lse = static_cast<float*>(logsumexp.mutable_data_ptr());
  if (varlen) torch::stable::zero_(out);
  forward(p, rows_of(out, varlen), lse);
  return {out, logsumexp, key_mass};
}

}  // namespace

}  // namespace velm::attention

#define VELM_IMPL_(name, dispatch, m) STABLE_TORCH_LIBRARY_IMPL(name, dispatch, m)
#define VELM_IMPL(name, dispatch, m) VELM_IMPL_(name, dispatch, m)

VELM_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&velm::attention::attention_forward));
}
