// splice_tokens: rows of features among rows of an embedding.

#include <vector>

#include "sequence/rows_cpu.h"
#include "simd/scratch.h"

namespace velm {
namespace {

void splice_tokens_forward(Tensor token_ids, Tensor weight, Tensor features, Tensor index, Tensor, Tensor out) {
  in_large_pages(out);
  const ByteRows of_vocabulary(weight), of_pictures(features), target(out);
  const int32_t *ids = const_data<int32_t>(token_ids), *number = const_data<int32_t>(index);
  for_rows(target, [&](int64_t token) {
    if (of_pictures.has(number[token])) {
      std::memcpy(target.at(token), of_pictures.at(number[token]), target.size);
    } else if (of_vocabulary.rows > 0) {
      const int64_t id = std::clamp<int64_t>(ids[token], 0, of_vocabulary.rows - 1);
      std::memcpy(target.at(token), of_vocabulary.at(id), target.size);
    } else {
      std::memset(target.at(token), 0, target.size);
    }
  });
}

// The numbers of the text tokens in the order of their ids, of one id in their own.
struct ById {
  struct Run {
    int64_t id, begin, end;
  };
  std::vector<int32_t> tokens;
  std::vector<Run> runs;

  ById(const int32_t* ids, const int32_t* number, int64_t count, int64_t vocabulary) {
    const auto id_of = [&](int32_t token) { return std::clamp<int64_t>(ids[token], 0, vocabulary - 1); };
    for (int64_t token = 0; token < count; ++token)
      if (number[token] < 0) tokens.push_back(static_cast<int32_t>(token));
    std::stable_sort(tokens.begin(), tokens.end(), [&](int32_t a, int32_t b) { return id_of(a) < id_of(b); });
    const auto size = static_cast<int64_t>(tokens.size());
    for (int64_t i = 0; i < size; ++i) {
      const int64_t id = id_of(tokens[static_cast<size_t>(i)]);
      if (runs.empty() || runs.back().id != id) runs.push_back({id, i, i});
      runs.back().end = i + 1;
    }
  }
};

// Sums of the rows of each id; ids without a token have zeros.
void weight_gradient(const Tensor& grad, const ById& text, const Tensor& grad_weight) {
  using namespace simd;
  in_large_pages(grad_weight);
  const ByteRows target(grad_weight);
  const int64_t dim = grad.size(1);
  for_rows(target, [&](int64_t row) { std::memset(target.at(row), 0, target.size); });
  with_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = const_data<T>(grad);
    const int64_t stride = grad.stride(0);
    parallel_ranges(static_cast<int64_t>(text.runs.size()), target.grain(), [&](int64_t begin, int64_t end) {
      Scratch memory;
      float* sum = memory.take(dim);
      for (int64_t i = begin; i < end; ++i) {
        const ById::Run& run = text.runs[static_cast<size_t>(i)];
        auto* row = reinterpret_cast<T*>(target.at(run.id));
        const T* first = from + text.tokens[static_cast<size_t>(run.begin)] * stride;
        if (run.end - run.begin == 1) {
          std::memcpy(row, first, target.size);
          continue;
        }
        convert(sum, first, dim);
        for (int64_t k = run.begin + 1; k < run.end; ++k) {
          const T* next = from + text.tokens[static_cast<size_t>(k)] * stride;
          int64_t c = 0;
          for (; c + kLanes <= dim; c += kLanes) store(sum + c, load(sum + c) + load(next + c));
          for (; c < dim; ++c) sum[c] += to_float(next[c]);
        }
        convert(row, sum, dim);
      }
    });
  });
}

void splice_tokens_backward(Tensor grad, std::optional<Tensor> token_ids, Tensor index, std::optional<Tensor> place,
                            int64_t vocabulary, std::optional<Tensor> grad_weight,
                            std::optional<Tensor> grad_features) {
  if (grad_weight && vocabulary > 0) {
    const ById text(const_data<int32_t>(*token_ids), const_data<int32_t>(index), grad.size(0), vocabulary);
    weight_gradient(grad, text, *grad_weight);
  }
  if (grad_features) take_rows(grad, *place, *grad_features);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "splice_tokens_forward", splice_tokens_forward);
  VELM_KERNEL(m, "splice_tokens_backward", splice_tokens_backward);
}

}  // namespace
}  // namespace velm
