// The kernels of fusion on small shapes, for the sanitizers; their numbers are tested through the operators.

#include <limits>

#include "fusion/bilinear/cuda.h"
#include "fusion/bilinear_attention/cuda.h"
#include "fusion/cuda_sums.h"
#include "fusion/low_rank_fusion/cuda.h"
#include "tests/device_on_host/values.h"

using namespace velm::cuda;
using namespace velm::device;
using namespace testing;

namespace {

template <class T>
void check_bilinear(int64_t rows, int64_t dx, int64_t dy, int64_t out) {
  auto x = random_values<T>(rows * dx), y = random_values<T>(rows * dy), weight = random_values<T>(out * dx * dy);
  auto bias = random_values<T>(out), grad = random_values<T>(rows * out);
  std::vector<T> z(grad.size()), grad_x(x.size()), grad_y(y.size()), grad_weight(weight.size()), grad_bias(bias.size());
  Bilinear p{};
  p.x = view(x, {rows, dx});
  p.y = view(y, {rows, dy});
  p.weight = view(weight, {out, dx, dy});
  p.bias = view(bias);
  p.grad = view(grad, {rows, out});
  p.z = view(z, {rows, out});
  p.grad_x = view(grad_x, {rows, dx});
  p.grad_y = view(grad_y, {rows, dy});
  p.grad_weight = view(grad_weight, {out, dx, dy});
  p.grad_bias = view(grad_bias);
  std::vector<float> partials(static_cast<size_t>(bilinear_forward_partials(p)));
  p.partials = view(partials);
  options().bank_conflicts = true;
  device_on_host::take_launches();
  bilinear_forward(p, nullptr);
  std::vector<float> more(static_cast<size_t>(bilinear_backward_partials(p, true, true)));
  p.partials = view(more);
  bilinear_backward(p, nullptr);
  for (const auto& launch : device_on_host::take_launches()) CHECK(launch.counters.bank_conflicts == 0);
  options().bank_conflicts = false;

  const auto at = [](const std::vector<T>& values, int64_t i) {
    return double{to_float(values[static_cast<size_t>(i)])};
  };
  std::vector<double> to_z(z.size()), to_x(x.size()), to_y(y.size()), to_weight(weight.size()), to_bias(bias.size());
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t k = 0; k < out; ++k) {
      const double g = at(grad, b * out + k);
      to_bias[static_cast<size_t>(k)] += g;
      double sum = at(bias, k);
      for (int64_t i = 0; i < dx; ++i)
        for (int64_t j = 0; j < dy; ++j) {
          const int64_t n = (k * dx + i) * dy + j;
          const double w = at(weight, n), of_x = at(x, b * dx + i), of_y = at(y, b * dy + j);
          sum += of_x * w * of_y;
          to_x[static_cast<size_t>(b * dx + i)] += g * w * of_y;
          to_y[static_cast<size_t>(b * dy + j)] += g * w * of_x;
          to_weight[static_cast<size_t>(n)] += g * of_x * of_y;
        }
      to_z[static_cast<size_t>(b * out + k)] = sum;
    }
  const auto compare = [&](const std::vector<T>& found, const std::vector<double>& expected) {
    for (size_t i = 0; i < found.size(); ++i) CHECK(close(to_float(found[i]), expected[i]));
  };
  compare(z, to_z);
  compare(grad_x, to_x);
  compare(grad_y, to_y);
  compare(grad_weight, to_weight);
  compare(grad_bias, to_bias);
}

// Two inputs, of which the second has one row for `repeat` of the result and is projected first.
template <class T>
void check_low_rank(int64_t rows, int64_t repeat, int64_t dim, int64_t out, int64_t rank) {
  const int64_t count[2] = {rows, rows / repeat};
  std::vector<T> xs[2], factors[2], to[2];
  std::vector<float> projections[2];
  auto weight = random_values<T>(rank), bias = random_values<T>(out), grad = random_values<T>(rows * out);
  std::vector<T> z(grad.size());
  LowRankFusion p{};
  p.count = 2;
  LowRankGradients g{};
  g.count = 2;
  g.grad = view(grad, {rows, out});
  g.weight = view(weight);
  options().bank_conflicts = true;
  device_on_host::take_launches();
  for (int m = 0; m < 2; ++m) {
    xs[m] = random_values<T>(count[m] * dim);
    factors[m] = random_values<T>(rank * (1 + dim) * out);
    projections[m].resize(static_cast<size_t>(rank * count[m] * out));
    g.projections[m] = view(projections[m], {rank, count[m], out});
    p.inputs[m] = {view(xs[m], {count[m], dim}), view(factors[m], {rank, 1 + dim, out}), g.projections[m], m == 1};
  }
  for (int m = 0; m < 2; ++m) {
    to[m].resize(static_cast<size_t>(low_rank_gradient_rows(g, m) * rank * out));
    g.to[m] = view(to[m], {low_rank_gradient_rows(g, m), rank * out});
  }
  LowRankFusion first = p;
  first.count = 1;
  first.inputs[0] = p.inputs[1];
  first.inputs[0].is_projected = false;
  low_rank_fusion(first, nullptr);
  p.weight = view(weight);
  p.bias = view(bias);
  p.z = view(z, {rows, out});
  std::vector<float> partials(static_cast<size_t>(low_rank_partials(p)));
  p.partials = view(partials);
  low_rank_fusion(p, nullptr);
  const int64_t blocks = low_rank_gradient_blocks(g);
  std::vector<float> sums(static_cast<size_t>(rank * blocks));
  g.sums = view(sums);
  low_rank_gradients(g, nullptr);
  options().bank_conflicts = false;
  for (const auto& launch : device_on_host::take_launches()) CHECK(launch.counters.bank_conflicts == 0);

  const auto at = [](const std::vector<T>& values, int64_t i) {
    return double{to_float(values[static_cast<size_t>(i)])};
  };
  std::vector<double> of_second(projections[1].size()), of_ranks(weight.size());
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t o = 0; o < out; ++o) {
      double sum = at(bias, o);
      const double of_z = at(grad, row * out + o);
      for (int64_t r = 0; r < rank; ++r) {
        double projected[2];
        for (int m = 0; m < 2; ++m) {
          const int64_t of_m = m ? row / repeat : row;
          projected[m] = at(factors[m], r * (1 + dim) * out + o);
          for (int64_t i = 0; i < dim; ++i)
            projected[m] += at(xs[m], of_m * dim + i) * at(factors[m], (r * (1 + dim) + 1 + i) * out + o);
          CHECK(close(projections[m][static_cast<size_t>((r * count[m] + of_m) * out + o)], projected[m]));
        }
        sum += at(weight, r) * projected[0] * projected[1];
        CHECK(close(to_float(to[0][static_cast<size_t>((row * rank + r) * out + o)]),
                    of_z * at(weight, r) * projected[1]));
        of_second[static_cast<size_t>((row / repeat * rank + r) * out + o)] += of_z * at(weight, r) * projected[0];
        of_ranks[static_cast<size_t>(r)] += of_z * projected[0] * projected[1];
      }
      CHECK(close(to_float(z[static_cast<size_t>(row * out + o)]), sum));
    }
  const int64_t pieces = low_rank_gradient_rows(g, 1) / count[1];
  for (int64_t i = 0; i < count[1] * rank * out; ++i) {
    const int64_t row = i / (rank * out);
    double sum = 0.0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += at(to[1], i + (row * (pieces - 1) + piece) * rank * out);
    CHECK(close(static_cast<float>(sum), of_second[static_cast<size_t>(i)]));
  }
  for (int64_t r = 0; r < rank; ++r) {
    double sum = 0.0;
    for (int64_t i = 0; i < blocks; ++i) sum += double{sums[static_cast<size_t>(r * blocks + i)]};
    CHECK(close(static_cast<float>(sum), of_ranks[static_cast<size_t>(r)]));
  }
}

// The last row of each side does not count, nor does the second of v: NaN is there.
template <class T>
void check_pairs(int64_t batch, int64_t glimpses, int64_t regions, int64_t words, int64_t k) {
  const int64_t matrix = regions * words, count = batch * glimpses * matrix;
  auto v = random_values<T>(batch * regions * k), q = random_values<T>(batch * words * k);
  auto h = random_values<T>(glimpses * k), bias = random_values<T>(glimpses);
  auto grad_maps = random_values<T>(count), grad_logits = random_values<T>(count);
  std::vector<int32_t> v_lengths(static_cast<size_t>(batch), static_cast<int32_t>(regions - 1)),
      q_lengths(static_cast<size_t>(batch), static_cast<int32_t>(words - 1));
  std::vector<unsigned char> v_mask(static_cast<size_t>(batch * regions), 1);
  const auto is_there = [&](int64_t i, int64_t j) { return i != 1 && i < regions - 1 && j < words - 1; };
  const auto hide = [&](std::vector<T>& x, int64_t row) {
    for (int64_t i = 0; i < k; ++i) x[static_cast<size_t>(row * k + i)] = from_float<T>(NAN);
  };
  for (int64_t b = 0; b < batch; ++b) {
    v_mask[static_cast<size_t>(b * regions + 1)] = 0;
    hide(v, b * regions + 1);
    hide(v, (b + 1) * regions - 1);
    hide(q, (b + 1) * words - 1);
  }
  const Pairs p{glimpses,
                {view(v, {batch, regions, k}), view(v_lengths), view(v_mask)},
                {view(q, {batch, words, k}), view(q_lengths), {}}};
  std::vector<float> sums(static_cast<size_t>(pair_score_parts(p) * count)),
      of_bias(static_cast<size_t>(batch * glimpses));
  std::vector<float> joint(static_cast<size_t>(pair_joint_pieces(p) * batch * glimpses * k));
  std::vector<T> maps(grad_maps.size()), logits(maps.size()), slopes(maps.size()), grad_v(v.size()), grad_q(q.size());
  std::vector<T> grad_h(h.size());
  options().bank_conflicts = true;
  device_on_host::take_launches();
  const View of_h = view(h, {glimpses, k});
  pair_scores(p, of_h, view(sums), nullptr);
  pair_maps(p, {view(sums), view(bias), view(maps), view(logits)}, nullptr);
  pair_slopes(p, {view(maps), view(grad_maps), view(grad_logits), view(slopes), view(of_bias)}, nullptr);
  pair_products(p, {true, view(slopes), of_h, view(grad_v, {batch, regions, k}), view(joint)}, nullptr);
  pair_products(p, {false, view(slopes), of_h, view(grad_q, {batch, words, k}), {}}, nullptr);
  sum_parts(view(joint), {}, view(grad_h), pair_joint_pieces(p) * batch, nullptr);
  for (const auto& launch : device_on_host::take_launches()) CHECK(launch.counters.bank_conflicts == 0);
  options().bank_conflicts = false;

  const auto at = [](const std::vector<T>& values, int64_t i) {
    return double{to_float(values[static_cast<size_t>(i)])};
  };
  std::vector<double> to_v(v.size()), to_q(q.size()), to_h(h.size());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t g = 0; g < glimpses; ++g) {
      const int64_t first = (b * glimpses + g) * matrix;
      std::vector<double> score(static_cast<size_t>(matrix));
      double total = 0, along = 0, all = 0;
      for (int64_t n = 0; n < matrix; ++n) {
        const int64_t i = n / words, j = n % words;
        if (!is_there(i, j)) continue;
        double& sum = score[static_cast<size_t>(n)];
        sum = at(bias, g);
        for (int64_t c = 0; c < k; ++c)
          sum += at(h, g * k + c) * at(v, (b * regions + i) * k + c) * at(q, (b * words + j) * k + c);
        total += std::exp(sum);
        along += std::exp(sum) * at(grad_maps, first + n);
        all += at(grad_logits, first + n);
      }
      CHECK(close(of_bias[static_cast<size_t>(b * glimpses + g)], all));
      for (int64_t n = 0; n < matrix; ++n) {
        const int64_t i = n / words, j = n % words;
        if (!is_there(i, j)) {
          CHECK(at(maps, first + n) == 0 && at(slopes, first + n) == 0);
          CHECK(at(logits, first + n) == -std::numeric_limits<double>::infinity());
          continue;
        }
        const double map = std::exp(score[static_cast<size_t>(n)]) / total;
        CHECK(close(at(maps, first + n), map) && close(at(logits, first + n), score[static_cast<size_t>(n)]));
        const double slope = map * (at(grad_maps, first + n) - along / total) + at(grad_logits, first + n);
        CHECK(close(at(slopes, first + n), slope));
        for (int64_t c = 0; c < k; ++c) {
          const int64_t of_v = (b * regions + i) * k + c, of_q = (b * words + j) * k + c;
          to_v[static_cast<size_t>(of_v)] += slope * at(h, g * k + c) * at(q, of_q);
          to_q[static_cast<size_t>(of_q)] += slope * at(h, g * k + c) * at(v, of_v);
          to_h[static_cast<size_t>(g * k + c)] += slope * at(v, of_v) * at(q, of_q);
        }
      }
    }
  const auto compare = [&](const std::vector<T>& found, const std::vector<double>& expected) {
    for (size_t i = 0; i < found.size(); ++i) CHECK(close(to_float(found[i]), expected[i]));
  };
  compare(grad_v, to_v);
  compare(grad_q, to_q);
  compare(grad_h, to_h);
}

}  // namespace

TEST(kernels_bilinear) {
  // Rows in three pieces and i in two; outputs and y in two, rows of the weight at odd elements.
  check_bilinear<float>(65, 17, 5, 3);
  check_bilinear<__half>(5, 3, 71, 67);
}

TEST(kernels_low_rank) {
  // Rows, columns and features in two tiles, the rows of an entry in three pieces; rows of the factors at odd elements.
  check_low_rank<float>(68, 17, 33, 4, 2);
  check_low_rank<__half>(6, 3, 66, 67, 2);
}

TEST(kernels_pairs) {
  // Glimpses in two groups, words in two units, regions by two warps; k in two parts, regions in two blocks.
  check_pairs<float>(1, 9, 17, 18, 40);
  check_pairs<__half>(1, 1, 65, 3, 270);
}
