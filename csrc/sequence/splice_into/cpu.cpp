// splice_into: rows of features among rows of embeddings. Rows are moved as they are.

#include "sequence/rows_cpu.h"

namespace velm {
namespace {

void splice_into_forward(Tensor embeddings, Tensor features, Tensor index, Tensor, Tensor out) {
  in_large_pages(out);
  const ByteRows of_text(embeddings), of_pictures(features), target(out);
  const int32_t* number = const_data<int32_t>(index);
  for_rows(target, [&](int64_t token) {
    const char* row = of_pictures.has(number[token]) ? of_pictures.at(number[token]) : of_text.at(token);
    std::memcpy(target.at(token), row, target.size);
  });
}

void splice_into_backward(Tensor grad, Tensor index, std::optional<Tensor> place, std::optional<Tensor> grad_embeddings,
                          std::optional<Tensor> grad_features) {
  if (grad_embeddings) {
    in_large_pages(*grad_embeddings);
    const ByteRows source(grad), target(*grad_embeddings);
    const int32_t* number = const_data<int32_t>(index);
    for_rows(target, [&](int64_t token) {
      if (number[token] >= 0) {
        std::memset(target.at(token), 0, target.size);
      } else {
        std::memcpy(target.at(token), source.at(token), target.size);
      }
    });
  }
  if (grad_features) take_rows(grad, *place, *grad_features);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "splice_into_forward", splice_into_forward);
  VELM_KERNEL(m, "splice_into_backward", splice_into_backward);
}

}  // namespace
}  // namespace velm
