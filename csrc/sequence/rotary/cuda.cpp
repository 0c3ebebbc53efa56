// rotary and normed_rotary as torch operators on CUDA kernels.

#include "sequence/rotary/cuda.h"

#include "common/needed.h"
#include "device/tensor.h"

namespace velm::cuda {
namespace {

using namespace device;
using Maybe = std::optional<Tensor>;

RotaryTables tables_of(const Tensor& cos, const Tensor& sin, int64_t layout) {
  return {view_of(cos), view_of(sin), layout};
}

void rotary_forward(Tensor query, Tensor key, Tensor cos, Tensor sin, int64_t layout, bool, bool, Tensor rotated_query,
                    Tensor rotated_key) {
  const Current current(query);
  rotary(tables_of(cos, sin, layout), false, {view_of(query), view_of(rotated_query)},
         {view_of(key), view_of(rotated_key)}, current.stream());
}

void rotary_backward(Tensor grad_rotated_query, Tensor grad_rotated_key, Maybe query, Maybe key, Tensor cos, Tensor sin,
                     int64_t layout, bool, bool, Maybe grad_query, Maybe grad_key, Maybe grad_cos, Maybe grad_sin) {
  const Current current(grad_rotated_query);
  const RotaryTables tables = tables_of(cos, sin, layout);
  const View of_query = view_of(grad_rotated_query), of_key = view_of(grad_rotated_key);
  rotary(tables, true, {of_query, view_of(grad_query)}, {of_key, view_of(grad_key)}, current.stream());
  if (!grad_cos && !grad_sin) return;
  rotary_table_gradients(tables,
                         {of_query, of_key, view_of(needed(query, "query")), view_of(needed(key, "key")),
                          view_of(grad_cos), view_of(grad_sin)},
                         current.stream());
}

void normed_rotary_forward(Tensor query, Tensor key, Tensor cos, Tensor sin, Maybe query_norm_weight,
                           Maybe key_norm_weight, double norm_eps, int64_t layout, bool, bool, Tensor rotated_query,
                           Tensor rotated_key) {
  const Current current(query);
  const RotaryTables tables = tables_of(cos, sin, layout);
  normed_rotary(tables, static_cast<float>(norm_eps),
                {view_of(query), view_of(rotated_query), view_of(query_norm_weight)},
                {view_of(key), view_of(rotated_key), view_of(key_norm_weight)}, current.stream());
  const auto plain = [](const Tensor& x, const Tensor& out, const Maybe& weight) {
    return weight ? RotarySide{} : RotarySide{view_of(x), view_of(out)};
  };
  rotary(tables, false, plain(query, rotated_query, query_norm_weight), plain(key, rotated_key, key_norm_weight),
         current.stream());
}

// One of query and key, and what backward makes of it.
struct Given {
  Tensor grad, x;
  Maybe weight, grad_x, grad_weight;
};

void normed_rotary_backward_op(Tensor grad_rotated_query, Tensor grad_rotated_key, Tensor query, Tensor key, Tensor cos,
                               Tensor sin, Maybe query_norm_weight, Maybe key_norm_weight, double norm_eps,
                               int64_t layout, bool, bool, Maybe grad_query, Maybe grad_key, Maybe grad_cos,
                               Maybe grad_sin, Maybe grad_query_norm_weight, Maybe grad_key_norm_weight) {
  const Current current(query);
  const RotaryTables tables = tables_of(cos, sin, layout);
  const auto eps = static_cast<float>(norm_eps);
  const Given given[2] = {{grad_rotated_query, query, query_norm_weight, grad_query, grad_query_norm_weight},
                          {grad_rotated_key, key, key_norm_weight, grad_key, grad_key_norm_weight}};
  NormedGradients normed[2] = {};
  RotarySide plain[2] = {};
  Maybe partials[2];
  for (int i = 0; i < 2; ++i) {
    const Given& side = given[i];
    if (!side.weight) {
      plain[i] = {view_of(side.grad), view_of(side.grad_x)};
      continue;
    }
    normed[i] = {view_of(side.x),      view_of(side.weight),      view_of(side.grad),
                 view_of(side.grad_x), view_of(side.grad_weight), {}};
    if (!side.grad_weight) continue;
    partials[i] = torch::stable::new_empty(side.grad, {normed_rotary_partials(tables, normed[i]), side.weight->size(0)},
                                           ScalarType::Float);
    normed[i].partials = view_of(partials[i]);
  }
  for (const NormedGradients& side : normed) normed_rotary_backward(tables, eps, side, current.stream());
  rotary(tables, true, plain[0], plain[1], current.stream());
  if (!grad_cos && !grad_sin) return;
  // What was rotated is made again: a norm without rotation.
  Maybe made[2];
  NormedSide again[2] = {};
  View rotated[2];
  for (int i = 0; i < 2; ++i) {
    rotated[i] = view_of(given[i].x);
    if (!given[i].weight) continue;
    const Tensor& x = given[i].x;
    made[i] = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    again[i] = {rotated[i], view_of(made[i]), view_of(given[i].weight)};
    rotated[i] = again[i].out;
  }
  RotaryTables none = tables;
  none.cos.size[3] = none.sin.size[3] = 0;
  normed_rotary(none, eps, again[0], again[1], current.stream());
  rotary_table_gradients(tables,
                         {view_of(grad_rotated_query), view_of(grad_rotated_key), rotated[0], rotated[1],
                          view_of(grad_cos), view_of(grad_sin)},
                         current.stream());
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, VELM_DISPATCH_KEY, m) {
  VELM_KERNEL(m, "rotary_forward", rotary_forward);
  VELM_KERNEL(m, "rotary_backward", rotary_backward);
  VELM_KERNEL(m, "normed_rotary_forward", normed_rotary_forward);
  VELM_KERNEL(m, "normed_rotary_backward", normed_rotary_backward_op);
}

}  // namespace
}  // namespace velm::cuda
