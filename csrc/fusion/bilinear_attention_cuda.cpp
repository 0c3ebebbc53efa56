// Bilinear attention as torch operators on CUDA kernels.

#include "fusion/bilinear_attention_cuda.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "device/tensor.h"
#include "fusion/bilinear_cuda.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int64_t kGradV = 1, kGradQ = 2, kGradH = 4, kGradBias = 8, kGradAttention = 4;
using Given = std::optional<Tensor>;

PairSide side_of(const Tensor& x, const Given& lengths, const Given& mask) {
  return {span_of(x), x.size(1), x.stride(0), x.stride(1), span_of(lengths), span_of(mask)};
}

Pairs pairs_of(const Tensor& v, const Tensor& q, int64_t glimpses, const Given& v_lengths, const Given& q_lengths,
               const Given& v_mask, const Given& q_mask) {
  const Pairs p{
      v.size(0), glimpses, v.size(2), dtype_of(v), side_of(v, v_lengths, v_mask), side_of(q, q_lengths, q_mask)};
  // Pairs of an entry of the batch are numbered by 32 bits, those of tiles that go past the ends included, and so are
  // the blocks that have a glimpse of an entry each.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2, kPast = 128;
  if (p.k > kMost || p.glimpses > kMost / 2 || p.batch > kMost / std::max<int64_t>(1, p.glimpses) ||
      p.v.rows + kPast > kMost / (p.q.rows + kPast))
    throw std::runtime_error(
        "velm: more than about 2^30 features, pairs of an entry of the batch, or glimpses of the whole batch");
  return p;
}

Tensor empty_pairs(const Tensor& like, const Pairs& p) {
  return torch::stable::new_empty(like, {p.batch, p.glimpses, p.v.rows, p.q.rows});
}
Tensor empty_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> forward(Tensor v, Tensor q, Tensor h, Given bias, Given v_lengths, Given q_lengths,
                                   Given v_mask, Given q_mask, bool return_logits) {
  const Current current(v);
  const Pairs p = pairs_of(v, q, h.size(0), v_lengths, q_lengths, v_mask, q_mask);
  Tensor maps = empty_pairs(v, p), logits = return_logits ? empty_pairs(v, p) : nothing(v);
  Tensor sums = empty_floats(v, pair_score_parts(p) * p.count());
  pair_scores(p, span_of(h), 0, span_of(sums), current.stream());
  pair_maps(p, {span_of(sums), span_of(bias), span_of(maps), span_of(logits)}, current.stream());
  return {maps, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Given grad_maps, Given grad_logits, Tensor maps, Tensor v, Tensor q,
                                                    Tensor h, Given v_lengths, Given q_lengths, Given v_mask,
                                                    Given q_mask, int64_t grad_mask) {
  const Current current(v);
  const Stream stream = current.stream();
  const Pairs p = pairs_of(v, q, h.size(0), v_lengths, q_lengths, v_mask, q_mask);
  Tensor grad_v = grad_mask & kGradV ? torch::stable::new_empty(v, {p.batch, p.v.rows, p.k}) : nothing(v);
  Tensor grad_q = grad_mask & kGradQ ? torch::stable::new_empty(v, {p.batch, p.q.rows, p.k}) : nothing(v);
  Tensor grad_h = grad_mask & kGradH ? torch::stable::new_empty(v, {p.glimpses, p.k}) : nothing(v);
  Tensor grad_bias = grad_mask & kGradBias ? torch::stable::new_empty(v, {p.glimpses}) : nothing(v);
  Tensor slopes = empty_pairs(v, p), of_bias = empty_floats(v, p.batch * p.glimpses);
  pair_slopes(p, {span_of(maps), span_of(grad_maps), span_of(grad_logits), span_of(slopes), span_of(of_bias)}, stream);
  const int64_t pieces = pair_joint_pieces(p) * p.batch;
  Tensor joint = empty_floats(v, grad_mask & kGradH ? pieces * p.glimpses * p.k : 0);
  pair_products(p, {true, span_of(slopes), span_of(h), span_of(grad_v), span_of(joint), 0, true}, stream);
  pair_products(p, {false, span_of(slopes), span_of(h), span_of(grad_q), {}, 0, true}, stream);
  sum_parts(span_of(joint), {}, span_of(grad_h), p.dtype, pieces, grad_h.numel(), 1, stream);
  sum_parts(span_of(of_bias), {}, span_of(grad_bias), p.dtype, p.batch, grad_bias.numel(), 1, stream);
  return {grad_v, grad_q, grad_h, grad_bias};
}

Tensor pool_forward(Tensor v, Tensor q, Tensor attention, Given v_lengths, Given q_lengths, Given v_mask,
                    Given q_mask) {
  const Current current(v);
  const Pairs p = pairs_of(v, q, attention.size(1), v_lengths, q_lengths, v_mask, q_mask);
  Tensor out = torch::stable::new_empty(v, {p.batch, p.glimpses, p.k});
  const int64_t pieces = pair_joint_pieces(p), count = out.numel();
  const bool is_wide = pieces > 1;
  Tensor partials = empty_floats(v, is_wide ? pieces * count : 0);
  pair_products(p, {true, span_of(attention), {}, {}, span_of(is_wide ? partials : out), 0, is_wide}, current.stream());
  if (is_wide) sum_parts(span_of(partials), {}, span_of(out), p.dtype, pieces, count, 1, current.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> pool_backward(Tensor grad, Tensor v, Tensor q, Tensor attention, Given v_lengths,
                                                 Given q_lengths, Given v_mask, Given q_mask, int64_t grad_mask) {
  const Current current(v);
  const Stream stream = current.stream();
  const Pairs p = pairs_of(v, q, attention.size(1), v_lengths, q_lengths, v_mask, q_mask);
  Tensor grad_v = grad_mask & kGradV ? torch::stable::new_empty(v, {p.batch, p.v.rows, p.k}) : nothing(v);
  Tensor grad_q = grad_mask & kGradQ ? torch::stable::new_empty(v, {p.batch, p.q.rows, p.k}) : nothing(v);
  Tensor grad_attention = grad_mask & kGradAttention ? empty_pairs(v, p) : nothing(v);
  const int64_t of_batch = p.glimpses * p.k;
  pair_products(p, {true, span_of(attention), span_of(grad), span_of(grad_v), {}, of_batch, false}, stream);
  pair_products(p, {false, span_of(attention), span_of(grad), span_of(grad_q), {}, of_batch, false}, stream);
  if (grad_mask & kGradAttention) {
    Tensor sums = empty_floats(v, pair_score_parts(p) * p.count());
    pair_scores(p, span_of(grad), of_batch, span_of(sums), stream);
    pair_maps(p, {span_of(sums), {}, {}, span_of(grad_attention)}, stream);
  }
  return {grad_v, grad_q, grad_attention};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  m.impl("bilinear_attention_forward", TORCH_BOX(&forward));
  m.impl("bilinear_attention_backward", TORCH_BOX(&backward));
  m.impl("bilinear_attention_pool_forward", TORCH_BOX(&pool_forward));
  m.impl("bilinear_attention_pool_backward", TORCH_BOX(&pool_backward));
}

}  // namespace
}  // namespace velm::cuda
