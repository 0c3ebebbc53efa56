// add_at_tokens: rows of features added to rows of hidden states.

#include "sequence/rows_cpu.h"

namespace velm {
namespace {

using namespace simd;

void add_at_tokens_forward(Tensor hidden, Tensor features, Tensor index, Tensor, Tensor out) {
  in_large_pages(out);
  const ByteRows base(hidden), added(features), target(out);
  const int32_t* number = const_data<int32_t>(index);
  const int64_t dim = out.size(1);
  with_type(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    for_rows(target, [&](int64_t token) {
      if (!added.has(number[token])) {
        std::memcpy(target.at(token), base.at(token), target.size);
        return;
      }
      const auto *a = reinterpret_cast<const T*>(base.at(token)),
                 *b = reinterpret_cast<const T*>(added.at(number[token]));
      auto* to = reinterpret_cast<T*>(target.at(token));
      int64_t c = 0;
      for (; c + kLanes <= dim; c += kLanes) store(to + c, load(a + c) + load(b + c));
      for (; c < dim; ++c) store_scalar(to + c, to_float(a[c]) + to_float(b[c]));
    });
  });
}

void add_at_tokens_backward(Tensor grad, Tensor, Tensor place, Tensor grad_features) {
  take_rows(grad, place, grad_features);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("add_at_tokens_forward", TORCH_BOX(&add_at_tokens_forward));
  m.impl("add_at_tokens_backward", TORCH_BOX(&add_at_tokens_backward));
}

}  // namespace
}  // namespace velm
