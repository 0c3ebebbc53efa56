// Bidirectional attention as torch operators on CUDA kernels.
//
// Forward is a pass of the attention kernel for each direction: the softmax of each runs along its own axis of the
// scores, and to serve both from one tile every block of rows of a would leave partial results of all of b, whose
// traffic costs more than the scores of the second pass. Backward needs no such results, and shares them.

#include "attention/bidirectional_attention/cuda.h"
#include "attention/cuda_tensors.h"

namespace velm::cuda {
namespace {

using namespace device;
using MaybeTensor = std::optional<Tensor>;
using torch::stable::new_empty;
using torch::stable::new_zeros;

Tensor zeros_heads_last(const Tensor& like) {
  return torch::stable::transpose(new_zeros(like, {like.size(0), like.size(2), like.size(1), like.size(3)}), 1, 2);
}

struct Settings {
  MaybeTensor seed;
  double scale, dropout_p;
};

// Attention of `query` over `key` and `value`, of which `mask` says what may be attended.
void set_direction(Attention& p, const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                   const Settings& settings, uint32_t direction) {
  p.query = rows_of(query);
  p.key = rows_of(key);
  p.value = rows_of(value);
  p.batch = query.size(0);
  p.longest_queries = p.queries();
  p.longest_keys = p.keys();
  if (p.queries() > INT32_MAX || p.keys() > INT32_MAX)
    throw std::runtime_error("velm: bidirectional attention: more than 2^31 - 1 tokens");
  p.key_mask = view_of(mask);
  p.scale = settings.scale;
  if (settings.dropout_p > 0) p.seed = view_of(settings.seed);
  p.dropout_p = settings.dropout_p;
  p.direction = direction;
}

void bidirectional_forward_op(Tensor query_a, Tensor query_b, Tensor value_a, Tensor value_b, MaybeTensor mask_a,
                              MaybeTensor mask_b, MaybeTensor seed, double scale, double dropout_p, Tensor out_a,
                              Tensor out_b, Tensor logsumexp_a, Tensor logsumexp_b) {
  const Current current(query_a);
  if (query_a.size(1) == 0) return;
  const Settings settings{seed, scale, dropout_p};
  const auto direction = [&](const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                             uint32_t number, const Tensor& out, const Tensor& logsumexp) {
    AttentionForward p{};
    set_direction(p, query, key, value, mask, settings, number);
    p.out = rows_of(out);
    p.logsumexp = view_of(logsumexp);
    run_forward(p, query, current.stream());
  };
  direction(query_a, query_b, value_b, mask_b, 0, out_a, logsumexp_a);
  direction(query_b, query_a, value_a, mask_a, 1, out_b, logsumexp_b);
}

// One direction, what its kernels take, and the tensors made for it.
struct Direction {
  AttentionBackward problem{};
  Tensor grad_out, delta, shift;
  // Whether its output or its logsumexp was used.
  bool is_used, out_is_used;

  Direction(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, const Tensor& out,
            const Tensor& logsumexp, const MaybeTensor& grad_out, const MaybeTensor& grad_logsumexp,
            const Settings& settings, uint32_t number, Stream stream)
      : grad_out(grad_out ? *grad_out : nothing(query)),
        delta(nothing(query)),
        shift(nothing(query)),
        is_used(grad_out || grad_logsumexp),
        out_is_used(grad_out.has_value()) {
    AttentionBackward& p = problem;
    set_direction(p, query, key, value, mask, settings, number);
    if (!is_used) return;
    if (!grad_out) this->grad_out = zeros_heads_last(out);
    delta = empty_of_rows(query, query.size(1));
    shift = empty_of_rows(query, query.size(1));
    p.out = rows_of(out);
    p.grad_out = rows_of(this->grad_out);
    p.logsumexp = view_of(logsumexp);
    p.delta = view_of(delta);
    p.shift = view_of(shift);
    p.grad_logsumexp = numbers_of(grad_logsumexp);
    attention_delta(p, stream);
  }
};

void bidirectional_backward_op(MaybeTensor grad_out_a, MaybeTensor grad_out_b, MaybeTensor grad_logsumexp_a,
                               MaybeTensor grad_logsumexp_b, Tensor query_a, Tensor query_b, Tensor value_a,
                               Tensor value_b, MaybeTensor mask_a, MaybeTensor mask_b, MaybeTensor seed, Tensor out_a,
                               Tensor out_b, Tensor logsumexp_a, Tensor logsumexp_b, double scale, double dropout_p,
                               MaybeTensor grad_query_a, MaybeTensor grad_query_b, MaybeTensor grad_value_a,
                               MaybeTensor grad_value_b) {
  const Current current(query_a);
  if (query_a.size(1) == 0) return;  // no heads: every gradient is empty
  const Stream stream = current.stream();
  const Settings settings{seed, scale, dropout_p};
  Direction a(query_a, query_b, value_b, mask_b, out_a, logsumexp_a, grad_out_a, grad_logsumexp_a, settings, 0, stream);
  Direction b(query_b, query_a, value_a, mask_a, out_b, logsumexp_b, grad_out_b, grad_logsumexp_b, settings, 1, stream);

  // The queries of a side are those of one direction and the keys of the other.
  const auto grad_query = [&](const MaybeTensor& grad, Direction& as_queries, Direction& as_keys) {
    if (!grad) return;
    if (as_queries.is_used) {
      as_queries.problem.grad_query = rows_of(*grad);
      if (as_keys.is_used) {
        const int64_t count = bidirectional_grad_query_partials(as_queries.problem, as_keys.problem);
        const Tensor partials = new_empty(query_a, {count}, ScalarType::Float);
        bidirectional_grad_query(as_queries.problem, as_keys.problem, view_of(partials), stream);
      } else {
        attention_grad_query(as_queries.problem, stream);
      }
    } else {
      as_keys.problem.grad_key = rows_of(*grad);
      attention_grad_key(as_keys.problem, stream);
    }
  };
  const auto grad_value = [&](const MaybeTensor& grad, Direction& direction) {
    if (!grad) return;
    if (!direction.out_is_used) {
      Tensor to = *grad;
      torch::stable::zero_(to);
      return;
    }
    direction.problem.grad_value = rows_of(*grad);
    attention_grad_value(direction.problem, stream);
  };
  grad_query(grad_query_a, a, b);
  grad_query(grad_query_b, b, a);
  grad_value(grad_value_a, b);
  grad_value(grad_value_b, a);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "bidirectional_attention_forward", bidirectional_forward_op);
  VELM_KERNEL(m, "bidirectional_attention_backward", bidirectional_backward_op);
}

}  // namespace
}  // namespace velm::cuda
