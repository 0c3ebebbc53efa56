// add_at_tokens: rows of features added to rows of hidden states.

#include "sequence/rows_cpu.h"

namespace velm {
namespace {

using namespace simd;

// to = a + b, row by row; to may be a.
template <class T>
void add_rows(const char* a, const char* b, int64_t dim, char* to) {
  const auto *x = reinterpret_cast<const T*>(a), *y = reinterpret_cast<const T*>(b);
  auto* sum = reinterpret_cast<T*>(to);
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) store(sum + c, load(x + c) + load(y + c));
  for (; c < dim; ++c) store_scalar(sum + c, to_float(x[c]) + to_float(y[c]));
}

// With hidden itself as out, rows without a feature are not touched.
void add_at_tokens_forward(Tensor hidden, Tensor features, Tensor index, Tensor place, Tensor out) {
  const bool in_place = out.mutable_data_ptr() == hidden.const_data_ptr();
  if (!in_place) in_large_pages(out);
  const ByteRows base(hidden), added(features), target(out);
  const int32_t *number = const_data<int32_t>(index), *token_of = const_data<int32_t>(place);
  const int64_t dim = out.size(1);
  with_type(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if (in_place) {
      for_rows(added, [&](int64_t feature) {
        const int64_t token = token_of[feature];
        if (target.has(token)) add_rows<T>(target.at(token), added.at(feature), dim, target.at(token));
      });
      return;
    }
    for_rows(target, [&](int64_t token) {
      if (added.has(number[token])) {
        add_rows<T>(base.at(token), added.at(number[token]), dim, target.at(token));
      } else {
        std::memcpy(target.at(token), base.at(token), target.size);
      }
    });
  });
}

void add_at_tokens_backward(Tensor grad, Tensor, Tensor place, Tensor grad_features) {
  take_rows(grad, place, grad_features);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "add_at_tokens_forward", add_at_tokens_forward);
  VELM_KERNEL(m, "add_at_tokens_backward", add_at_tokens_backward);
}

}  // namespace
}  // namespace velm
