// The kernels of sequence on small shapes, for the sanitizers; their numbers are tested through the operators.

#include "sequence/cuda_rows.h"
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

}  // namespace

TEST(kernels_placed_rows) {
  check_rows<float>(200, 20);
  check_rows<__half>(75, 13);
  check_rows<__nv_bfloat16>(9, 1032);
}
