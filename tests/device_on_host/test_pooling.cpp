// The kernels of pooling on small shapes, for the sanitizers; their numbers are tested through the operators.

#include <cmath>

#include "pooling/attention_pool/cuda.h"
#include "pooling/gather_rows/cuda.h"
#include "pooling/match_rows/cuda.h"
#include "pooling/pool/cuda.h"
#include "tests/device_on_host/values.h"

using namespace velm::cuda;
using namespace velm::device;
using namespace testing;

namespace {

// The mean of the tokens that a mask leaves, and its gradient; then every mode, forward and backward.
template <class T>
void check_pool(int64_t tokens, int64_t dim, bool tokens_contiguous) {
  const int64_t segments = 2;
  auto x = random_values<T>(segments * tokens * dim), grad = random_values<T>(segments * dim);
  std::vector<unsigned char> mask(static_cast<size_t>(segments * tokens), 1);
  for (size_t i = 1; i < mask.size(); i += 3) mask[i] = 0;
  std::vector<T> out(grad.size()), grad_x(x.size());
  std::vector<float> stats(grad.size());
  std::vector<int32_t> counts(static_cast<size_t>(segments));
  Pool p{};
  p.p = 3.0f;
  p.mask = view(mask);
  p.x = view(x, {segments, tokens, dim});
  if (tokens_contiguous) p.x.stride[2] = 1, p.x.stride[3] = tokens;
  p.tokens_contiguous = tokens_contiguous;
  p.stats = view(stats);
  p.out = view(out, {segments, dim});
  p.grad = view(grad, {segments, dim});
  p.grad_x = view(grad_x, {segments, tokens, dim});
  p.counts = view(counts);
  for (const PoolMode mode : {kPoolMax, kPoolLogSumExp, kPoolGem, kPoolMean}) {
    p.mode = mode;
    pool_forward(p, nullptr);
    pool_backward(p, nullptr);
  }
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t c = 0; c < dim; ++c) {
      double sum = 0, count = 0;
      for (int64_t n = 0; n < tokens; ++n) {
        const bool live = mask[static_cast<size_t>(s * tokens + n)];
        const auto at = static_cast<size_t>(s * p.x.stride[1] + n * p.x.stride[2] + c * p.x.stride[3]);
        if (live) sum += to_float(x[at]);
        count += live;
      }
      CHECK(close(to_float(out[static_cast<size_t>(s * dim + c)]), sum / count));
      for (int64_t n = 0; n < tokens; ++n) {
        const bool live = mask[static_cast<size_t>(s * tokens + n)];
        const auto at = static_cast<size_t>(s * p.x.stride[1] + n * p.x.stride[2] + c * p.x.stride[3]);
        CHECK(close(to_float(grad_x[at]), live ? to_float(grad[static_cast<size_t>(s * dim + c)]) / count : 0));
      }
    }
}

// Equal scores weigh the tokens alike.
template <class T>
void check_attention_pool(int64_t rows, int64_t tokens, int64_t dim, bool is_shared) {
  const int64_t segments = 2;
  auto x = random_values<T>(segments * tokens * dim), grad = random_values<T>(segments * rows * dim);
  std::vector<T> queries(static_cast<size_t>((is_shared ? 1 : segments) * rows * dim)), grad_queries(queries.size());
  std::vector<T> out(grad.size()), grad_x(x.size());
  std::vector<int32_t> lengths{static_cast<int32_t>(tokens), static_cast<int32_t>(tokens - 1)};
  std::vector<float> weights(static_cast<size_t>(segments * rows * tokens)), grad_weights(weights.size());
  std::vector<float> logsumexp(static_cast<size_t>(segments * rows)), partials(is_shared ? grad.size() : 0);
  for (T& value : queries) value = from_float<T>(0.0f);
  AttentionPool p{};
  p.lengths = view(lengths);
  p.x = view(x, {segments, tokens, dim});
  p.queries = view(queries, {is_shared ? 1 : segments, rows, dim});
  p.out = view(out);
  p.logsumexp = view(logsumexp);
  p.weights = view(weights);
  attention_pool_forward(p, nullptr);
  p.grad_weights = view(grad_weights);
  p.grad = view(grad);
  p.grad_x = view(grad_x);
  p.grad_queries = view(grad_queries);
  if (is_shared) p.partials = view(partials);
  attention_pool_backward(p, nullptr);
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t count = lengths[static_cast<size_t>(s)];
    for (int64_t c = 0; c < dim; ++c) {
      double mean = 0, total = 0;
      for (int64_t n = 0; n < count; ++n) mean += to_float(x[static_cast<size_t>((s * tokens + n) * dim + c)]) / count;
      for (int64_t i = 0; i < rows; ++i) {
        const auto at = static_cast<size_t>((s * rows + i) * dim + c);
        CHECK(close(to_float(out[at]), mean));
        total += to_float(grad[at]) / count;
      }
      for (int64_t n = 0; n < tokens; ++n)
        CHECK(close(to_float(grad_x[static_cast<size_t>((s * tokens + n) * dim + c)]), n < count ? total : 0));
    }
  }
}

// Rows of a are twice those of b, so that each matches itself; then means of neighbours.
template <class T>
void check_tokens(int64_t rows, int64_t dim) {
  auto b = random_values<T>(rows * dim);
  std::vector<T> a(b.size()), out(b.size());
  for (size_t i = 0; i < b.size(); ++i) a[i] = from_float<T>(2.0f * to_float(b[i]));
  std::vector<float> norms_a(static_cast<size_t>(rows)), norms_b(norms_a.size()), similarity(norms_a.size());
  std::vector<int32_t> best(norms_a.size());
  const MatchedRows of_a{view(a, {rows, dim}), view(norms_a)}, of_b{view(b, {rows, dim}), view(norms_b)};
  match_rows({of_a, of_b, view(similarity), view(best)}, nullptr);
  // The mean of each row and of the one it is matched with.
  std::vector<int32_t> index, offsets{0};
  for (int64_t i = 0; i < rows; ++i) {
    CHECK(best[static_cast<size_t>(i)] == i && close(similarity[static_cast<size_t>(i)], 1));
    index.insert(index.end(), {static_cast<int32_t>(i), static_cast<int32_t>((i + 1) % rows)});
    offsets.push_back(static_cast<int32_t>(2 * (i + 1)));
  }
  std::vector<float> weight(index.size(), 0.5f);
  gather_rows({view(b, {rows, dim}), view(index), view(offsets), view(weight), view(out, {rows, dim})}, nullptr);
  for (int64_t i = 0; i < rows * dim; ++i) {
    const auto next = static_cast<size_t>((i + dim) % (rows * dim)), at = static_cast<size_t>(i);
    CHECK(close(to_float(out[at]), 0.5 * (to_float(b[at]) + to_float(b[next]))));
  }
}

}  // namespace

TEST(kernels_tokens) {
  check_tokens<float>(70, 68);
  check_tokens<__half>(35, 13);
}

TEST(kernels_pool) {
  check_pool<float>(9, 132, false);
  check_pool<__half>(11, 7, false);
  check_pool<__nv_bfloat16>(40, 5, true);
}

TEST(kernels_attention_pool) {
  check_attention_pool<float>(3, 40, 40, true);
  check_attention_pool<__half>(17, 5, 130, false);
}
