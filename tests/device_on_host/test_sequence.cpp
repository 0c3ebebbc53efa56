// The kernels of sequence on small shapes, for the sanitizers; their numbers are tested through the operators.

#include <cmath>

#include "sequence/cuda_rows.h"
#include "sequence/rotary/cuda.h"
#include "tests/device_on_host/values.h"

using namespace velm::cuda;
using namespace velm::device;
using namespace testing;

namespace {

// Every third token takes a feature: copied, added, taken back, and the others' rows summed by keys that repeat.
template <class T>
void check_rows(int64_t tokens, int64_t dim) {
  auto base = random_values<T>(tokens * dim), features = random_values<T>((tokens + 2) / 3 * dim);
  std::vector<T> out(base.size()), taken(features.size());
  std::vector<int32_t> index(static_cast<size_t>(tokens), -1), place, keys, order;
  for (int32_t token = 0; token < tokens; token += 3) {
    index[static_cast<size_t>(token)] = token / 3;
    place.push_back(token);
  }
  const auto count = static_cast<int64_t>(place.size());
  PlacedRows p{view(base, {tokens, dim}), {}, view(features, {count, dim}), count, view(index),
               view(out, {tokens, dim})};
  const auto at = [&](const std::vector<T>& rows, int64_t row, int64_t c) {
    return to_float(rows[static_cast<size_t>(row * dim + c)]);
  };
  const auto each = [&](const auto& f) {
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t c = 0; c < dim; ++c) f(token, c);
  };
  place_rows(p, nullptr);
  each([&](int64_t t, int64_t c) { CHECK(at(out, t, c) == (t % 3 == 0 ? at(features, t / 3, c) : at(base, t, c))); });
  take_rows(view(out, {tokens, dim}), view(place), view(taken, {count, dim}), nullptr);
  for (size_t i = 0; i < taken.size(); ++i) CHECK(to_float(taken[i]) == to_float(features[i]));
  add_rows(p, nullptr);
  std::vector<T> in_place = base;
  add_rows_in_place(view(in_place, {tokens, dim}), p.features, view(place), nullptr);
  each([&](int64_t t, int64_t c) {
    CHECK(close(at(out, t, c), at(base, t, c) + (t % 3 == 0 ? at(features, t / 3, c) : 0)));
    CHECK(at(out, t, c) == at(in_place, t, c));
  });
  // Keys 0, 0, .., 1, 1, .. of the tokens from behind, the last ones of no row.
  const int64_t rows = 2, half = tokens / 2;
  for (int32_t token = 0; token < tokens; ++token) {
    keys.push_back(token < half ? 0 : token + 3 < tokens ? 1 : static_cast<int32_t>(rows));
    order.push_back(static_cast<int32_t>(tokens) - 1 - token);
  }
  std::vector<T> sums(static_cast<size_t>(rows * dim), from_float<T>(0.0f));
  SummedRows s{view(base, {tokens, dim}), view(keys), view(order), view(sums, {rows, dim}), {}};
  std::vector<float> open(static_cast<size_t>(s.stretches() * 2 * dim));
  s.open = view(open);
  sum_rows(s, nullptr);
  std::vector<double> exact(sums.size(), 0.0);
  each([&](int64_t e, int64_t c) {
    const int32_t key = keys[static_cast<size_t>(e)];
    if (key < rows) exact[static_cast<size_t>(key * dim + c)] += at(base, order[static_cast<size_t>(e)], c);
  });
  for (size_t i = 0; i < sums.size(); ++i) CHECK(close(to_float(sums[i]), exact[i]));
}

// Rotated by angles and back again, which leaves what it was; behind a norm every row has the length of ones.
template <class T>
void check_rotary(int64_t layout, int64_t heads, int64_t tokens, int64_t head_dim, int64_t rotated, bool over_heads) {
  auto query = random_values<T>(heads * tokens * head_dim), key = random_values<T>(tokens * head_dim);
  std::vector<T> to_query(query.size()), to_key(key.size()), again(query.size()), again_key(key.size());
  std::vector<T> cos(static_cast<size_t>(tokens * rotated)), sin(cos.size()), grad_cos(cos.size()),
      grad_sin(cos.size());
  const int64_t quarter = rotated / 4;
  for (int64_t i = 0; i < tokens * rotated; ++i) {
    const int64_t column = i % rotated, half = rotated / 2;
    const int64_t pair = layout == kPairs    ? column / 2
                         : layout == kHalves ? column % half
                                             : column % quarter + column / half * quarter;
    const float angle = static_cast<float>(i / rotated + 1) / static_cast<float>(pair + 1);
    cos[static_cast<size_t>(i)] = from_float<T>(std::cos(angle));
    sin[static_cast<size_t>(i)] = from_float<T>(std::sin(angle));
  }
  const RotaryTables tables{view(cos, {1, tokens, rotated}), view(sin, {1, tokens, rotated}), layout};
  const View q = view(query, {1, heads, tokens, head_dim}), k = view(key, {1, 1, tokens, head_dim});
  const View to_q = view(to_query, {1, heads, tokens, head_dim}), to_k = view(to_key, {1, 1, tokens, head_dim});
  const View again_q = view(again, {1, heads, tokens, head_dim}), again_k = view(again_key, {1, 1, tokens, head_dim});
  rotary(tables, false, {q, to_q}, {k, to_k}, nullptr);
  rotary(tables, true, {to_q, again_q}, {to_k, again_k}, nullptr);
  for (size_t i = 0; i < query.size(); ++i) CHECK(close(to_float(again[i]), to_float(query[i])));
  for (size_t i = 0; i < key.size(); ++i) CHECK(close(to_float(again_key[i]), to_float(key[i])));
  const View of_cos = view(grad_cos, {1, tokens, rotated}), of_sin = view(grad_sin, {1, tokens, rotated});
  rotary_table_gradients(tables, {q, k, q, k, of_cos, of_sin}, nullptr);
  // x * x to cos; to sin -x * its partner and partner * x, which cancel.
  double squares = 0, all = 0, turned = 0;
  for (size_t i = 0; i < grad_cos.size(); ++i) all += to_float(grad_cos[i]), turned += to_float(grad_sin[i]);
  for (const auto* values : {&query, &key})
    for (size_t i = 0; i < values->size(); ++i)
      if (static_cast<int64_t>(i) % head_dim < rotated) squares += std::pow(to_float((*values)[i]), 2);
  CHECK(close(all, squares) && std::abs(turned) < 1e-2 * squares);

  std::vector<float> weight(static_cast<size_t>((over_heads ? heads : 1) * head_dim), 1.0f), of_weight(weight.size());
  const View w = view(weight);
  normed_rotary(tables, 1e-6f, {q, to_q, w}, {}, nullptr);
  double length = 0;
  for (const T x : to_query) length += to_float(x) * to_float(x);
  CHECK(close(length / static_cast<double>(to_query.size()), 1));
  // The gradient of half the squares of what came out: nothing along x.
  NormedGradients gradients{q, w, to_q, again_q, view(of_weight), {}};
  std::vector<float> partials(static_cast<size_t>(normed_rotary_partials(tables, gradients)) * weight.size());
  gradients.partials = view(partials);
  normed_rotary_backward(tables, 1e-6f, gradients, nullptr);
  for (const T x : again) CHECK(std::abs(to_float(x)) < 0.05f);
  double total = 0;
  for (const float x : of_weight) total += x;
  CHECK(close(total, length));
}

}  // namespace

TEST(kernels_rotary) {
  check_rotary<float>(kHalves, 9, 5, 24, 16, false);
  check_rotary<__half>(kPairs, 3, 45, 40, 32, false);
  check_rotary<__nv_bfloat16>(kQuarters, 4, 9, 22, 12, true);
}

TEST(kernels_placed_rows) {
  check_rows<float>(200, 20);
  check_rows<__half>(75, 13);
  check_rows<__nv_bfloat16>(9, 1032);
}
