// The kernels of the library on small shapes, for the sanitizers; their numbers are tested through the operators.

#include <cmath>

#include "attention/bidirectional_attention/cuda.h"
#include "attention/cross_attention/cuda_norm.h"
#include "attention/cuda_forward.h"
#include "attention/gated_residual/cuda.h"
#include "attention/merge_attention/cuda.h"
#include "attention/multiscale_deformable_attention/cuda.h"
#include "fusion/dropout_residual/cuda.h"
#include "tests/device_on_host/values.h"

using namespace velm::cuda;
using namespace velm::device;
using namespace testing;

namespace {

template <class T>
void check_gated_residual(int64_t rows, int64_t dim, bool gate_is_row, bool masked) {
  auto residual = random_values<T>(rows * dim), x = random_values<T>(rows * dim), grad = random_values<T>(rows * dim);
  auto gate = random_values<float>(gate_is_row ? dim : 1);
  std::vector<unsigned char> mask(static_cast<size_t>(rows), 1);
  for (size_t i = 0; i < mask.size(); i += 3) mask[i] = 0;
  std::vector<T> out(residual.size()), grad_x(residual.size());
  std::vector<float> grad_gate(gate.size());

  GatedResidual p{};
  p.gate = view(gate);
  if (masked) p.row_mask = view(mask);
  p.x = view(x, {rows, dim});
  p.residual = view(residual, {rows, dim});
  p.out = view(out, {rows, dim});
  gated_residual_forward(p, nullptr);
  p.grad = view(grad, {rows, dim});
  p.grad_x = view(grad_x, {rows, dim});
  p.grad_gate = view(grad_gate);
  std::vector<float> partials(static_cast<size_t>(gated_residual_partials(p)));
  p.partials = view(partials);
  gated_residual_backward(p, nullptr);

  std::vector<double> sums(gate.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < dim; ++j) {
      const auto at = static_cast<size_t>(i * dim + j);
      const size_t g = gate_is_row ? static_cast<size_t>(j) : 0;
      const bool dropped = masked && !mask[static_cast<size_t>(i)];
      const double t = dropped ? 0 : std::tanh(gate[g]);
      CHECK(close(to_float(out[at]), to_float(residual[at]) + t * to_float(x[at])));
      CHECK(close(to_float(grad_x[at]), t * to_float(grad[at])));
      if (!dropped) sums[g] += double{to_float(grad[at])} * to_float(x[at]);
    }
  for (size_t g = 0; g < gate.size(); ++g)
    CHECK(close(grad_gate[g], (1 - std::tanh(gate[g]) * std::tanh(gate[g])) * sums[g]));
}

// (1, heads, rows, dim), contiguous.
template <class T>
View heads_of(std::vector<T>& x, int64_t heads, int64_t rows, int64_t dim) {
  return view(x, {1, heads, rows, dim});
}

template <class T>
void check_merge(int64_t dim, int shards) {
  const int64_t heads = 2, queries = 5, rows = heads * queries;
  std::vector<std::vector<T>> outs, grads;
  std::vector<std::vector<float>> lses, grad_lses;
  std::vector<T> out(static_cast<size_t>(rows * dim));
  std::vector<float> lse(static_cast<size_t>(rows));
  Merge p{};
  p.shards = shards;
  for (int s = 0; s < shards; ++s) {
    outs.push_back(random_values<T>(rows * dim));
    grads.emplace_back(out.size());
    lses.push_back(random_values<float>(rows));
    // One row that no shard has, one that all but the first lack.
    lses.back()[3] = -INFINITY;
    if (s) lses.back()[4] = -INFINITY;
    grad_lses.emplace_back(lse.size());
  }
  for (int s = 0; s < shards; ++s) {
    const auto u = static_cast<size_t>(s);
    p.shard[s].out = heads_of(outs[u], heads, queries, dim);
    p.shard[s].grad_out = heads_of(grads[u], heads, queries, dim);
    p.shard[s].logsumexp = view(lses[u]);
    p.shard[s].grad_logsumexp = view(grad_lses[u]);
  }
  p.out = heads_of(out, heads, queries, dim);
  p.logsumexp = view(lse);
  merge_attention_forward(p, nullptr);
  auto grad = random_values<T>(rows * dim);
  p.out = heads_of(grad, heads, queries, dim);
  merge_attention_backward(p, nullptr);

  for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
    double sum = 0;
    for (const auto& of_shard : lses) sum += std::exp(of_shard[row]);
    CHECK(sum == 0 ? lse[row] == -INFINITY : close(lse[row], std::log(sum)));
    for (size_t j = row * static_cast<size_t>(dim); j < (row + 1) * static_cast<size_t>(dim); ++j) {
      double expected = 0;
      for (size_t s = 0; s < outs.size(); ++s) {
        const double w = sum == 0 ? 0 : std::exp(lses[s][row]) / sum;
        expected += w * to_float(outs[s][j]);
        CHECK(close(to_float(grads[s][j]), w * to_float(grad[j])));
      }
      CHECK(close(to_float(out[j]), expected));
    }
    // The weights sum to one, so a shift of all shards changes nothing.
    double total = 0;
    for (const auto& of_shard : grad_lses) total += of_shard[row];
    CHECK(std::abs(total) < 1e-4);
  }
}

// Attention of `queries` to the keys that a mask and causality show, after a norm of the queries, forward and backward,
// with a bias of each key.
template <class T>
void check_attention(int64_t queries, int64_t keys, int64_t dim) {
  const auto rows_of = [&](std::vector<T>& x, int64_t rows) { return heads_of(x, 1, rows, dim); };
  auto raw = random_values<T>(queries * dim), key = random_values<T>(keys * dim), value = random_values<T>(keys * dim);
  auto weight = random_values<T>(dim), grad = random_values<T>(queries * dim);
  auto bias = random_values<float>(keys);
  std::vector<T> query(raw.size()), out(raw.size()), grad_query(raw.size()), grad_key(key.size()),
      grad_value(key.size());
  std::vector<float> lse(static_cast<size_t>(queries)), delta(lse.size()), shift(lse.size()), grad_bias(bias.size()),
      mass(bias.size());
  std::vector<unsigned char> mask(static_cast<size_t>(keys), 1);
  for (size_t j = 0; j < mask.size(); j += 3) {
    mask[j] = 0;
    for (size_t d = 0; d < static_cast<size_t>(dim); ++d)
      key[j * static_cast<size_t>(dim) + d] = value[j * static_cast<size_t>(dim) + d] = from_float<T>(NAN);
  }
  rms_norm({rows_of(raw, queries), rows_of(query, queries), view(weight), 1e-5}, nullptr);

  const auto set = [&](Attention& p) {
    p.batch = 1;
    p.longest_queries = queries;
    p.longest_keys = keys;
    p.query = rows_of(query, queries);
    p.key = rows_of(key, keys);
    p.value = rows_of(value, keys);
    p.key_mask = view(mask);
    p.bias = view(bias);
    p.scale = 0.5;
    p.softcap = 3;
    p.is_causal = true;
  };
  options().bank_conflicts = true;
  device_on_host::take_launches();
  AttentionForward p{};
  set(p);
  p.out = rows_of(out, queries);
  p.logsumexp = view(lse);
  p.shift = view(shift);
  attention_forward(p, nullptr);
  attention_key_mass(p, view(lse), view(shift), view(mass), nullptr);
  AttentionBackward b{};
  set(b);
  b.out = p.out;
  b.grad_out = rows_of(grad, queries);
  b.logsumexp = view(lse);
  b.delta = view(delta);
  b.shift = view(shift);
  b.grad_query = rows_of(grad_query, queries);
  b.grad_key = rows_of(grad_key, keys);
  b.grad_value = rows_of(grad_value, keys);
  attention_delta(b, nullptr);
  attention_grad_query(b, nullptr);
  attention_grad_key(b, nullptr);
  attention_grad_value(b, nullptr);
  b.grad_bias = view(grad_bias);
  std::vector<float> partials(static_cast<size_t>(attention_bias_partials(b)));
  attention_grad_bias(b, view(partials), nullptr);
  for (const auto& launch : device_on_host::take_launches()) {
    // Few, where the sums of a row come together at the end of a block.
    const bool of_sums = std::string(launch.kernel).find("row_sums") != std::string::npos;
    CHECK(launch.counters.bank_conflicts <= (of_sums ? 4 : 0));
  }
  options().bank_conflicts = false;

  const auto at = [&](const std::vector<T>& x, int64_t i, int64_t d) {
    return double{to_float(x[static_cast<size_t>(i * dim + d)])};
  };
  const auto dot = [&](const std::vector<T>& x, int64_t i, const std::vector<T>& y, int64_t j) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += at(x, i, d) * at(y, j, d);
    return sum;
  };
  std::vector<double> to_query(raw.size()), to_key(key.size()), to_value(key.size()), to_bias(bias.size()),
      masses(bias.size());
  for (int64_t i = 0; i < queries; ++i) {
    const double rms = std::sqrt(dot(raw, i, raw, i) / static_cast<double>(dim) + 1e-5);
    for (int64_t d = 0; d < dim; ++d)
      CHECK(close(at(query, i, d), at(raw, i, d) / rms * to_float(weight[static_cast<size_t>(d)])));
    std::vector<double> slopes(mask.size()), weights(mask.size());
    double sum = 0;
    for (int64_t j = 0; j <= i && j < keys; ++j) {
      const auto u = static_cast<size_t>(j);
      if (!mask[u]) continue;
      const double t = std::tanh(0.5 * dot(query, i, key, j) / 3);
      slopes[u] = 0.5 * (1 - t * t);
      weights[u] = std::exp(3 * t + bias[u]);
      sum += weights[u];
    }
    CHECK(sum == 0 ? lse[static_cast<size_t>(i)] == -INFINITY : close(lse[static_cast<size_t>(i)], std::log(sum)));
    double mean = 0;
    for (int64_t j = 0; j < keys; ++j) {
      double& w = weights[static_cast<size_t>(j)];
      if (w == 0) continue;
      w /= sum;
      masses[static_cast<size_t>(j)] += w;
      mean += w * dot(grad, i, value, j);
    }
    for (int64_t d = 0; d < dim; ++d) {
      double expected = 0;
      for (int64_t j = 0; j < keys; ++j) {
        const auto u = static_cast<size_t>(j);
        if (weights[u] == 0) continue;
        expected += weights[u] * at(value, j, d);
        const double ds = weights[u] * (dot(grad, i, value, j) - mean);
        to_query[static_cast<size_t>(i * dim + d)] += ds * slopes[u] * at(key, j, d);
        to_key[static_cast<size_t>(j * dim + d)] += ds * slopes[u] * at(query, i, d);
        to_value[static_cast<size_t>(j * dim + d)] += weights[u] * at(grad, i, d);
        if (d == 0) to_bias[u] += ds;
      }
      CHECK(close(at(out, i, d), expected));
    }
  }
  for (size_t i = 0; i < to_query.size(); ++i) CHECK(close(to_float(grad_query[i]), to_query[i]));
  for (size_t i = 0; i < to_key.size(); ++i) CHECK(close(to_float(grad_key[i]), to_key[i]));
  for (size_t i = 0; i < to_value.size(); ++i) CHECK(close(to_float(grad_value[i]), to_value[i]));
  for (size_t j = 0; j < to_bias.size(); ++j) CHECK(close(grad_bias[j], to_bias[j]) && close(mass[j], masses[j]));
}

// One query of four heads, whose keys are split among two blocks.
void check_split_keys() {
  using T = __half;
  const int64_t heads = 4, keys = 512, dim = 8;
  auto query = random_values<T>(heads * dim), key = random_values<T>(keys * dim), value = random_values<T>(keys * dim);
  std::vector<T> out(query.size());
  std::vector<float> lse(static_cast<size_t>(heads)), partials;
  AttentionForward p{};
  p.query = heads_of(query, heads, 1, dim);
  p.key = heads_of(key, 1, keys, dim);
  p.value = heads_of(value, 1, keys, dim);
  p.batch = p.longest_queries = 1;
  p.longest_keys = keys;
  p.scale = 0.5;
  p.out = heads_of(out, heads, 1, dim);
  p.logsumexp = view(lse);
  partials.resize(static_cast<size_t>(attention_forward_partials(p)));
  CHECK(!partials.empty());
  p.partials = view(partials);
  attention_forward(p, nullptr);
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<double> sums(static_cast<size_t>(dim) + 1);
    for (int64_t j = 0; j < keys; ++j) {
      double score = 0;
      for (int64_t d = 0; d < dim; ++d)
        score +=
            0.5 * to_float(query[static_cast<size_t>(h * dim + d)]) * to_float(key[static_cast<size_t>(j * dim + d)]);
      for (int64_t d = 0; d < dim; ++d)
        sums[static_cast<size_t>(d)] += std::exp(score) * to_float(value[static_cast<size_t>(j * dim + d)]);
      sums.back() += std::exp(score);
    }
    CHECK(close(lse[static_cast<size_t>(h)], std::log(sums.back())));
    for (int64_t d = 0; d < dim; ++d)
      CHECK(close(to_float(out[static_cast<size_t>(h * dim + d)]), sums[static_cast<size_t>(d)] / sums.back()));
  }
}

// The gradient of the queries of a, which attends over b and b over it, where one row of either is hidden.
template <class T>
void check_bidirectional(int64_t rows_a, int64_t rows_b, int64_t dim) {
  struct Side {
    int64_t rows;
    std::vector<T> query, value, out, grad;
    std::vector<float> lse, delta, shift;
    std::vector<unsigned char> mask;
  };
  const auto side = [&](int64_t rows) {
    const auto count = static_cast<size_t>(rows);
    Side s{rows,
           random_values<T>(rows * dim),
           random_values<T>(rows * dim),
           std::vector<T>(count * dim),
           random_values<T>(rows * dim),
           std::vector<float>(count),
           std::vector<float>(count),
           std::vector<float>(count),
           std::vector<unsigned char>(count, 1)};
    s.mask[1] = 0;
    for (size_t d = 0; d < static_cast<size_t>(dim); ++d) s.value[static_cast<size_t>(dim) + d] = from_float<T>(NAN);
    return s;
  };
  Side a = side(rows_a), b = side(rows_b);
  std::vector<T> grad_query(a.query.size());
  const auto rows_of = [&](std::vector<T>& x) { return heads_of(x, 1, static_cast<int64_t>(x.size()) / dim, dim); };
  const auto set = [&](Attention& p, Side& from, Side& to) {
    p.batch = 1;
    p.longest_queries = from.rows;
    p.longest_keys = to.rows;
    p.query = rows_of(from.query);
    p.key = rows_of(to.query);
    p.value = rows_of(to.value);
    p.key_mask = view(to.mask);
    p.scale = 0.5;
  };
  const auto direction = [&](Side& from, Side& to) {
    AttentionForward f{};
    set(f, from, to);
    f.out = rows_of(from.out);
    f.logsumexp = view(from.lse);
    attention_forward(f, nullptr);
    AttentionBackward p{};
    set(p, from, to);
    p.out = f.out;
    p.grad_out = rows_of(from.grad);
    p.logsumexp = f.logsumexp;
    p.delta = view(from.delta);
    p.shift = view(from.shift);
    attention_delta(p, nullptr);
    return p;
  };
  options().bank_conflicts = true;
  AttentionBackward of_a = direction(a, b), of_b = direction(b, a);
  of_a.grad_query = rows_of(grad_query);
  device_on_host::take_launches();
  std::vector<float> partials(static_cast<size_t>(bidirectional_grad_query_partials(of_a, of_b)));
  bidirectional_grad_query(of_a, of_b, view(partials), nullptr);
  for (const auto& launch : device_on_host::take_launches()) {
    // Few, where the sums of a row come together at the end of a block.
    const bool of_sums = std::string(launch.kernel).find("row_sums") != std::string::npos;
    CHECK(launch.counters.bank_conflicts <= (of_sums ? 4 : 0));
  }
  options().bank_conflicts = false;

  const auto dot = [&](const std::vector<T>& x, int64_t i, const std::vector<T>& y, int64_t j) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d)
      sum += double{to_float(x[static_cast<size_t>(i * dim + d)])} * to_float(y[static_cast<size_t>(j * dim + d)]);
    return sum;
  };
  // The gradients of the scores of a direction, by its own rows.
  const auto score_gradients = [&](const Side& from, const Side& to) {
    std::vector<std::vector<double>> found;
    for (int64_t i = 0; i < from.rows; ++i) {
      std::vector<double> weights(static_cast<size_t>(to.rows));
      double sum = 0, mean = 0;
      for (int64_t j = 0; j < to.rows; ++j)
        if (to.mask[static_cast<size_t>(j)])
          sum += weights[static_cast<size_t>(j)] = std::exp(0.5 * dot(from.query, i, to.query, j));
      for (int64_t j = 0; j < to.rows; ++j)
        if (double& w = weights[static_cast<size_t>(j)]) mean += (w /= sum) * dot(from.grad, i, to.value, j);
      for (int64_t j = 0; j < to.rows; ++j)
        if (double& w = weights[static_cast<size_t>(j)]) w *= dot(from.grad, i, to.value, j) - mean;
      found.push_back(weights);
    }
    return found;
  };
  const auto by_a = score_gradients(a, b), by_b = score_gradients(b, a);
  for (int64_t i = 0; i < rows_a; ++i)
    for (int64_t d = 0; d < dim; ++d) {
      double expected = 0;
      for (int64_t j = 0; j < rows_b; ++j) {
        const auto u = static_cast<size_t>(i), v = static_cast<size_t>(j);
        expected +=
            0.5 * (by_a[u][v] + by_b[v][u]) * to_float(b.query[v * static_cast<size_t>(dim) + static_cast<size_t>(d)]);
      }
      CHECK(close(to_float(grad_query[static_cast<size_t>(i * dim + d)]), expected));
    }
}

template <class T>
void check_dropout(int64_t dim) {
  const int64_t rows = 5;
  auto x = random_values<T>(rows * dim), residual = random_values<T>(rows * dim);
  std::vector<T> out(x.size());
  std::vector<int64_t> seed{0x123456789abcdef};
  DropoutResidual p{};
  p.x = view(x, {rows, dim});
  p.residual = view(residual, {rows, dim});
  p.out = view(out, {rows, dim});
  p.seed = view(seed);
  p.dropout_p = 0.5;
  dropout_residual(p, nullptr);
  int kept = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double without = to_float(residual[i]), with = without + 2 * to_float(x[i]);
    CHECK(close(to_float(out[i]), without) || close(to_float(out[i]), with));
    kept += to_float(x[i]) != 0 && close(to_float(out[i]), with);
  }
  CHECK(kept > 0 && kept < rows * dim);
}

// Two levels, one of a single token. With sizes that do not fit the tokens nothing but them may be touched.
template <class T>
void check_deformable(int64_t queries, int64_t d, bool fits) {
  const int64_t heads = 2, points = 3, height = 5, width = 7, tokens = height * width + 1;
  std::vector<int64_t> shapes{fits ? height : height + 60, width, 1, 1};
  const int64_t samples = queries * heads * 2 * points;
  auto value = random_values<T>(tokens * heads * d), grad = random_values<T>(queries * heads * d);
  auto locations = random_values<float>(2 * samples);
  auto weights = random_values<__half>(samples);
  for (float& at : locations) at = 0.4f * at + 0.5f;
  std::vector<T> out(grad.size()), grad_value(value.size()), again(value.size());
  std::vector<float> grad_locations(locations.size());
  std::vector<__half> grad_weights(weights.size());
  Deformable p{};
  p.batch = 1, p.tokens = tokens, p.heads = heads, p.d = d, p.queries = queries, p.levels = 2, p.points = points;
  p.value = view(value, {1, tokens, heads, d});
  p.shapes = view(shapes);
  p.locations = view(locations);
  p.weights = view(weights);
  p.out = view(out, {1, queries, heads, d});
  deformable_forward(p, nullptr);
  p.grad = view(grad, {1, queries, heads, d});
  p.grad_locations = view(grad_locations);
  p.grad_weights = view(grad_weights);
  deformable_samples_backward(p, nullptr);
  for (std::vector<T>* to : {&grad_value, &again}) {
    // The same bits in any order of threads.
    options().reverse = to == &again;
    std::vector<int32_t> counts(static_cast<size_t>(heads * p.cells() * p.chunks()));
    std::vector<float> placed(static_cast<size_t>(heads * 2 * p.of_level() * 4));
    p.counts = view(counts);
    p.placed = view(placed);
    p.grad_value = view(*to, {1, tokens, heads, d});
    deformable_value_backward(p, nullptr);
  }
  options().reverse = false;
  if (!fits) return;

  std::vector<double> sums(value.size());
  for (int64_t q = 0; q < queries; ++q)
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<double> result(static_cast<size_t>(d));
      for (int64_t i = 0; i < 2 * points; ++i) {
        const int64_t sample = (q * heads + h) * 2 * points + i, level = i / points;
        const double w = level ? 1 : width, h_ = level ? 1 : height;
        const double x = locations[static_cast<size_t>(2 * sample)] * w - 0.5;
        const double y = locations[static_cast<size_t>(2 * sample + 1)] * h_ - 0.5;
        double of_weight = 0, of_x = 0;
        for (int64_t ty = 0; ty < h_; ++ty)
          for (int64_t tx = 0; tx < w; ++tx) {
            const double along = std::max(0.0, 1 - std::abs(x - tx)), down = std::max(0.0, 1 - std::abs(y - ty));
            const double slope = tx == std::floor(x) ? -1 : tx == std::floor(x) + 1 ? 1 : 0;
            const auto token = static_cast<size_t>(((level ? height * width : ty * width + tx) * heads + h) * d);
            for (int64_t c = 0; c < d; ++c) {
              const auto k = static_cast<size_t>(c);
              const double g = to_float(grad[static_cast<size_t>((q * heads + h) * d) + k]);
              const double v = to_float(value[token + k]), weight = to_float(weights[static_cast<size_t>(sample)]);
              result[k] += weight * along * down * v;
              sums[token + k] += weight * along * down * g;
              of_weight += along * down * g * v;
              of_x += weight * slope * down * g * v * w;
            }
          }
        CHECK(close(to_float(grad_weights[static_cast<size_t>(sample)]), of_weight));
        CHECK(close(grad_locations[static_cast<size_t>(2 * sample)], of_x));
      }
      for (int64_t c = 0; c < d; ++c)
        CHECK(close(to_float(out[static_cast<size_t>((q * heads + h) * d + c)]), result[static_cast<size_t>(c)]));
    }
  for (size_t i = 0; i < sums.size(); ++i) {
    CHECK(close(to_float(grad_value[i]), sums[i]));
    CHECK(to_float(grad_value[i]) == to_float(again[i]));
  }
}

}  // namespace

TEST(kernels_gated_residual) {
  for (const bool gate_is_row : {false, true})
    for (const bool masked : {false, true}) {
#if defined(__SANITIZE_THREAD__)
      // Starting the threads takes most of the time.
      if (masked != gate_is_row) continue;
#endif
      check_gated_residual<float>(40, 7, gate_is_row, masked);
      check_gated_residual<__half>(5, 64, gate_is_row, masked);
      check_gated_residual<__nv_bfloat16>(33, 16, gate_is_row, masked);
    }
}

TEST(kernels_attention) {
  // By copies of 16 and of 4 bytes, and by single elements.
  check_attention<__half>(66, 70, 24);
  check_attention<float>(20, 40, 9);
  check_attention<__nv_bfloat16>(5, 20, 17);
  check_split_keys();
}

TEST(kernels_bidirectional_attention) {
  check_bidirectional<__half>(20, 130, 24);
  check_bidirectional<float>(5, 40, 9);
}

TEST(kernels_merge_attention) {
  check_merge<float>(40, 3);
  check_merge<__half>(128, 2);
  check_merge<__nv_bfloat16>(300, 4);
  check_merge<float>(5, kMostShards);
}

TEST(kernels_dropout_residual) {
  check_dropout<float>(130);
  check_dropout<__half>(64);
  check_dropout<__nv_bfloat16>(37);
}

TEST(kernels_deformable) {
  // Several runs of samples, vectors and single columns, and more columns than a warp has at a time.
  check_deformable<float>(350, 8, true);
  check_deformable<__half>(5, 7, true);
  check_deformable<__nv_bfloat16>(9, 300, true);
  check_deformable<float>(20, 4, false);
}
