// bilinear_attention and bilinear_attention_pool as torch operators on CUDA kernels.

#include "fusion/bilinear_attention/cuda.h"

#include <algorithm>
#include <limits>

#include "device/tensor.h"
#include "fusion/cuda_sums.h"

namespace velm::cuda {
namespace {

using namespace device;

using Given = std::optional<Tensor>;

PairSide side_of(const Tensor& x, const Given& lengths, const Given& mask) {
  return {view_of(x), view_of(lengths), view_of(mask)};
}

Pairs pairs_of(const Tensor& v, const Tensor& q, int64_t glimpses, const Given& v_lengths, const Given& q_lengths,
               const Given& v_mask, const Given& q_mask) {
  const Pairs p{glimpses, side_of(v, v_lengths, v_mask), side_of(q, q_lengths, q_mask)};
  // Pairs of an entry of the batch are numbered by 32 bits, those of tiles that go past the ends included, and so are
  // the blocks that have a glimpse of an entry each.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2, kPast = 128;
  if (p.k() > kMost || p.glimpses > kMost / 2 || p.batch() > kMost / std::max<int64_t>(1, p.glimpses) ||
      p.v.rows() + kPast > kMost / (p.q.rows() + kPast))
    throw std::runtime_error(
        "velm: more than about 2^30 features, pairs of an entry of the batch, or glimpses of the whole batch");
  return p;
}

Tensor empty_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

void forward(Tensor v, Tensor q, Tensor h, Given bias, Given v_lengths, Given q_lengths, Given v_mask, Given q_mask,
             bool, Tensor maps, Given logits) {
  const Current current(v);
  const Pairs p = pairs_of(v, q, h.size(0), v_lengths, q_lengths, v_mask, q_mask);
  Tensor sums = empty_floats(v, pair_score_parts(p) * p.count());
  pair_scores(p, view_of(h), view_of(sums), current.stream());
  pair_maps(p, {view_of(sums), view_of(bias), view_of(maps), view_of(logits)}, current.stream());
}

void backward(Given grad_maps, Given grad_logits, Tensor v, Tensor q, Tensor h, Given v_lengths, Given q_lengths,
              Given v_mask, Given q_mask, Tensor maps, bool, Given grad_v, Given grad_q, Given grad_h,
              Given grad_bias) {
  const Current current(v);
  const Stream stream = current.stream();
  const Pairs p = pairs_of(v, q, h.size(0), v_lengths, q_lengths, v_mask, q_mask);
  Tensor slopes = torch::stable::new_empty(v, {p.batch(), p.glimpses, p.v.rows(), p.q.rows()});
  Tensor of_bias = empty_floats(v, p.batch() * p.glimpses);
  pair_slopes(p, {view_of(maps), view_of(grad_maps), view_of(grad_logits), view_of(slopes), view_of(of_bias)}, stream);
  const int64_t pieces = pair_joint_pieces(p) * p.batch();
  Tensor joint = empty_floats(v, grad_h ? pieces * p.glimpses * p.k() : 0);
  pair_products(p, {true, view_of(slopes), view_of(h), view_of(grad_v), view_of(joint)}, stream);
  pair_products(p, {false, view_of(slopes), view_of(h), view_of(grad_q), {}}, stream);
  sum_parts(view_of(joint), {}, view_of(grad_h), pieces, stream);
  sum_parts(view_of(of_bias), {}, view_of(grad_bias), p.batch(), stream);
}

void pool_forward(Tensor v, Tensor q, Tensor attention, Given v_lengths, Given q_lengths, Given v_mask, Given q_mask,
                  Tensor out) {
  const Current current(v);
  const Pairs p = pairs_of(v, q, attention.size(1), v_lengths, q_lengths, v_mask, q_mask);
  const int64_t pieces = pair_joint_pieces(p);
  const bool has_parts = pieces > 1;
  Tensor partials = empty_floats(v, has_parts ? pieces * out.numel() : 0);
  pair_products(p, {true, view_of(attention), {}, {}, view_of(has_parts ? partials : out)}, current.stream());
  if (has_parts) sum_parts(view_of(partials), {}, view_of(out), pieces, current.stream());
}

void pool_backward(Tensor grad, Tensor v, Tensor q, Tensor attention, Given v_lengths, Given q_lengths, Given v_mask,
                   Given q_mask, Given grad_v, Given grad_q, Given grad_attention) {
  const Current current(v);
  const Stream stream = current.stream();
  const Pairs p = pairs_of(v, q, attention.size(1), v_lengths, q_lengths, v_mask, q_mask);
  pair_products(p, {true, view_of(attention), view_of(grad), view_of(grad_v), {}}, stream);
  pair_products(p, {false, view_of(attention), view_of(grad), view_of(grad_q), {}}, stream);
  if (grad_attention) {
    Tensor sums = empty_floats(v, pair_score_parts(p) * p.count());
    pair_scores(p, view_of(grad), view_of(sums), stream);
    pair_maps(p, {view_of(sums), {}, {}, view_of(grad_attention)}, stream);
  }
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "bilinear_attention_forward", forward);
  VELM_KERNEL(m, "bilinear_attention_backward", backward);
  VELM_KERNEL(m, "bilinear_attention_pool_forward", pool_forward);
  VELM_KERNEL(m, "bilinear_attention_pool_backward", pool_backward);
}

}  // namespace
}  // namespace velm::cuda
