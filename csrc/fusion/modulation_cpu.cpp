// film, (offset + gamma) * x + beta, and weighted_sum, the sum of weights[i] * features[i]: each input and each
// gradient passes through the processor once.

#include <algorithm>
#include <tuple>
#include <vector>

#include "attention/small_ops.h"
#include "simd/lines.h"
#include "simd/parallel.h"
#include "simd/scratch.h"
#include "simd/vec.h"

namespace velm {
namespace {

using namespace simd;

constexpr int64_t kGradX = 1, kGradGamma = 2, kGradBeta = 4;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 8192;
// Regions whose sums are added in float32, one after the other; sums over more are sums of these, in float64.
constexpr int64_t kRegions = 32;
// Elements of a row that are summed lane by lane before they go into float64; pixels are converted so many at a time.
constexpr int64_t kRun = 512;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
// Items of so many elements that a thread takes at least.
int64_t grain(int64_t elements) {
  return kGrain / std::max<int64_t>(elements, 1);
}

// Calls f(column, load, store) for the vectors of a row; the last one may be part of one, its other lanes zero.
template <class F>
VELM_INLINE void for_vectors(int64_t n, const F& f) {
  const auto whole = [](const float* p) VELM_INLINE_LAMBDA { return load(p); };
  const auto write = [](float* p, Vec x) VELM_INLINE_LAMBDA { store(p, x); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, whole, write);
  const int left = static_cast<int>(n - i);
  if (left)
    f(
        i, [left](const float* p) VELM_INLINE_LAMBDA { return load_first(p, left); },
        [left](float* p, Vec x) VELM_INLINE_LAMBDA { store_first(p, x, left); });
}

double sum_of_products(const float* a, const float* b, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    Vec sum = zero();
    for_vectors(std::min(kRun, n - start), [&](int64_t c, auto read, auto) VELM_INLINE_LAMBDA {
      sum = fma(read(a + start + c), read(b + start + c), sum);
    });
    total += sum_lanes(sum);
  }
  return total;
}

double sum_of(const float* a, int64_t n) {
  Vec sum = zero();
  for_vectors(n, [&](int64_t c, auto read, auto) VELM_INLINE_LAMBDA { sum += read(a + c); });
  return sum_lanes(sum);
}

void multiply(const float* a, float factor, int64_t n, float* to) {
  for_vectors(n, [&](int64_t c, auto read, auto write) VELM_INLINE_LAMBDA { write(to + c, read(a + c) * factor); });
}

// total += a, or a itself where there is none yet.
void accumulate(bool is_first, const float* a, int64_t n, float* total) {
  if (is_first) return static_cast<void>(std::copy(a, a + n, total));
  for_vectors(
      n, [&](int64_t c, auto read, auto write) VELM_INLINE_LAMBDA { write(total + c, read(total + c) + read(a + c)); });
}

// Where results of a row go: to their place if that is float32, else into `memory`, from where finish() takes them.
struct Result {
  ScalarType type;
  void* place;
  float* values;

  Result(ScalarType type, void* place, float* memory)
      : type(type), place(place), values(type == ScalarType::Float ? static_cast<float*>(place) : memory) {}
  void finish(int64_t n) const {
    if (values != place) from_floats(type, place, values, n);
  }
};

// to[o, i] = the sum over k of parts[o, k, i], in order; parts[o, k] are `stride` apart.
void add_parts(const float* parts, int64_t outer, int64_t count, int64_t inner, int64_t stride, const Lines& to) {
  constexpr int64_t kBlock = 64;
  const int64_t blocks = divide_up(inner, kBlock);
  parallel_ranges(outer * blocks, grain(kBlock * count), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t o = item / blocks, first = item % blocks * kBlock, width = std::min(kBlock, inner - first);
      double sums[kBlock] = {};
      for (int64_t k = 0; k < count; ++k) {
        const float* part = parts + (o * count + k) * stride + first;
        for (int64_t i = 0; i < width; ++i) sums[i] += part[i];
      }
      float rounded[kBlock];
      for (int64_t i = 0; i < width; ++i) rounded[i] = static_cast<float>(sums[i]);
      from_floats(to.type, to.at(o, first), rounded, width);
    }
  });
}

// x or one of its kind as lines: (batch, regions) of dim, or (batch, dim) of regions. Contiguous if it is a result.
Tensor empty_rows(const Tensor& like, bool regions_contiguous) {
  const int64_t batch = like.size(0), regions = like.size(1), dim = like.size(2);
  if (!regions_contiguous) return torch::stable::new_empty(like, {batch, regions, dim});
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, dim, regions}), 1, 2);
}
Lines lines_of(const Tensor& x, bool regions_contiguous) {
  return Lines(x, x.stride(0), x.stride(regions_contiguous ? 2 : 1));
}

// One number of any type.
float element(const Lines& lines, int64_t i, int64_t j) {
  float value;
  return *as_floats(lines.type, lines.at(i, j), 1, &value);
}

Tensor film_forward(Tensor x, Tensor gamma, Tensor beta, bool regions_contiguous, double gamma_offset) {
  const int64_t batch = x.size(0), regions = x.size(1), dim = x.size(2);
  Tensor out = empty_rows(x, regions_contiguous);
  const auto offset = static_cast<float>(gamma_offset);
  const ScalarType type = x.scalar_type();
  const Lines from = lines_of(x, regions_contiguous), scales(gamma, gamma.stride(0), 1),
              shifts(beta, beta.stride(0), 1);
  const int64_t along = regions_contiguous ? regions : dim, across = regions_contiguous ? dim : regions;
  const Lines to(out, across * along, along);
  const auto size = static_cast<int64_t>(x.element_size());
  parallel_ranges(batch * across, grain(along), [&](int64_t begin, int64_t end) {
    Scratch memory;
    float *in = memory.take(std::max(dim, kRun)), *result = memory.take(std::max(dim, kRun));
    float *factors = memory.take(dim), *of_shifts = memory.take(dim);
    const float* summands = nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / across, k = row % across;
      if (regions_contiguous) {
        const Vec factor(element(scales, b, k) + offset), summand(element(shifts, b, k));
        for (int64_t start = 0; start < regions; start += kRun) {
          const int64_t n = std::min(kRun, regions - start);
          const float* values = as_floats(type, from.at(b, k) + start * size, n, in);
          const Result line(type, to.at(b, k) + start * size, result);
          for_vectors(n, [&](int64_t c, auto read, auto write)
                             VELM_INLINE_LAMBDA { write(line.values + c, fma(factor, read(values + c), summand)); });
          line.finish(n);
        }
        continue;
      }
      if (row == begin || k == 0) {
        const float* given = as_floats(type, scales.at(b, 0), dim, factors);
        for (int64_t c = 0; c < dim; ++c) factors[c] = given[c] + offset;
        summands = as_floats(type, shifts.at(b, 0), dim, of_shifts);
      }
      const float* values = as_floats(type, from.at(b, k), dim, in);
      const Result line(type, to.at(b, k), result);
      for_vectors(dim, [&](int64_t c, auto read, auto write) VELM_INLINE_LAMBDA {
        write(line.values + c, fma(read(factors + c), read(values + c), read(summands + c)));
      });
      line.finish(dim);
    }
  });
  return out;
}

struct FilmGradients {
  Lines grad, x, gamma, grad_x, grad_gamma, grad_beta;
  bool wants_x, wants_gamma, wants_beta;
  float offset;
  int64_t batch, regions, dim, size;
};

// Rows of regions: the sums of a row are all there is.
void film_backward_along(const FilmGradients& p) {
  const ScalarType type = p.grad.type;
  parallel_ranges(p.batch * p.dim, grain(p.regions), [&](int64_t begin, int64_t end) {
    float of_grad[kRun], of_x[kRun], result[kRun];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.dim, k = row % p.dim;
      const float factor = p.wants_x ? element(p.gamma, b, k) + p.offset : 0.0f;
      double of_gamma = 0, of_beta = 0;
      for (int64_t start = 0; start < p.regions; start += kRun) {
        const int64_t n = std::min(kRun, p.regions - start), at = start * p.size;
        const float* g = as_floats(type, p.grad.at(b, k) + at, n, of_grad);
        if (p.wants_gamma) of_gamma += sum_of_products(g, as_floats(type, p.x.at(b, k) + at, n, of_x), n);
        if (p.wants_beta) of_beta += sum_of(g, n);
        if (p.wants_x) {
          const Result line(type, p.grad_x.at(b, k) + at, result);
          multiply(g, factor, n, line.values);
          line.finish(n);
        }
      }
      const auto sum_of_gamma = static_cast<float>(of_gamma), sum_of_beta = static_cast<float>(of_beta);
      if (p.wants_gamma) from_floats(type, p.grad_gamma.at(b, k), &sum_of_gamma, 1);
      if (p.wants_beta) from_floats(type, p.grad_beta.at(b, k), &sum_of_beta, 1);
    }
  });
}

// Rows of features: the sums of a few rows are left in `parts`, (batch, blocks, 2, dim).
void film_backward_across(const FilmGradients& p, float* parts) {
  const ScalarType type = p.grad.type;
  const int64_t dim = p.dim, blocks = divide_up(p.regions, kRegions);
  parallel_ranges(p.batch * blocks, grain(dim * kRegions), [&](int64_t begin, int64_t end) {
    Scratch memory;
    float *of_grad = memory.take(dim), *of_x = memory.take(dim), *result = memory.take(dim);
    float* factors = memory.take(dim);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, first = item % blocks * kRegions, last = std::min(first + kRegions, p.regions);
      float *of_gamma = parts + item * 2 * dim, *of_beta = of_gamma + dim;
      if (p.wants_x) {
        const float* given = as_floats(type, p.gamma.at(b, 0), dim, factors);
        for (int64_t c = 0; c < dim; ++c) factors[c] = given[c] + p.offset;
      }
      for (int64_t r = first; r < last; ++r) {
        const float* g = as_floats(type, p.grad.at(b, r), dim, of_grad);
        if (p.wants_x) {
          const Result line(type, p.grad_x.at(b, r), result);
          for_vectors(dim, [&](int64_t c, auto read, auto write)
                               VELM_INLINE_LAMBDA { write(line.values + c, read(g + c) * read(factors + c)); });
          line.finish(dim);
        }
        if (p.wants_gamma) {
          const float* x = as_floats(type, p.x.at(b, r), dim, of_x);
          if (r == first) std::fill_n(of_gamma, dim, 0.0f);
          for_vectors(dim, [&](int64_t c, auto read, auto write) VELM_INLINE_LAMBDA {
            write(of_gamma + c, fma(read(g + c), read(x + c), read(of_gamma + c)));
          });
        }
        if (p.wants_beta) accumulate(r == first, g, dim, of_beta);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> film_backward(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> gamma,
                                                 bool regions_contiguous, double gamma_offset, int64_t grad_mask) {
  FilmGradients p{};
  p.batch = grad.size(0);
  p.regions = grad.size(1);
  p.dim = grad.size(2);
  p.size = static_cast<int64_t>(grad.element_size());
  p.offset = static_cast<float>(gamma_offset);
  p.wants_x = grad_mask & kGradX;
  p.wants_gamma = grad_mask & kGradGamma;
  p.wants_beta = grad_mask & kGradBeta;
  Tensor grad_x = p.wants_x ? empty_rows(grad, regions_contiguous) : nothing(grad);
  Tensor grad_gamma = p.wants_gamma ? torch::stable::new_empty(grad, {p.batch, p.dim}) : nothing(grad);
  Tensor grad_beta = p.wants_beta ? torch::stable::new_empty(grad, {p.batch, p.dim}) : nothing(grad);
  const int64_t along = regions_contiguous ? p.regions : p.dim;
  p.grad = Lines(grad, p.regions * p.dim, along);
  p.grad_x = Lines(grad_x, p.regions * p.dim, along);
  p.grad_gamma = Lines(grad_gamma, p.dim, 1);
  p.grad_beta = Lines(grad_beta, p.dim, 1);
  if (p.wants_gamma) p.x = lines_of(*x, regions_contiguous);
  if (p.wants_x) p.gamma = Lines(*gamma, gamma->stride(0), 1);
  if (regions_contiguous) {
    film_backward_along(p);
  } else {
    const int64_t blocks = divide_up(p.regions, kRegions);
    Scratch memory;
    float* parts = memory.take(p.wants_gamma || p.wants_beta ? p.batch * blocks * 2 * p.dim : 0);
    film_backward_across(p, parts);
    if (p.wants_gamma) add_parts(parts, p.batch, blocks, p.dim, 2 * p.dim, p.grad_gamma);
    if (p.wants_beta) add_parts(parts + p.dim, p.batch, blocks, p.dim, 2 * p.dim, p.grad_beta);
  }
  return {grad_x, grad_gamma, grad_beta};
}

// A tensor of weighted_sum and its gradient; a feature with one region of several has region stride 0.
struct Feature {
  Lines from, grad;
  bool is_broadcast = false, wants_grad = false;
};

Lines feature_lines(const Tensor& t, int64_t regions) {
  return Lines(t, t.stride(0), t.size(1) == regions ? t.stride(1) : 0);
}

Tensor weighted_sum_forward(std::vector<Tensor> features, Tensor weights) {
  const int64_t batch = features[0].size(0), dim = features[0].size(2);
  const auto count = static_cast<int64_t>(features.size());
  int64_t regions = 0;
  for (const Tensor& value : features) regions = std::max(regions, value.size(1));
  Tensor out = torch::stable::new_empty(features[0], {batch, regions, dim});
  const ScalarType type = out.scalar_type();
  std::vector<Lines> lines;
  for (const Tensor& value : features) lines.push_back(feature_lines(value, regions));
  const auto* all_weights = const_data<float>(weights);
  const Lines to(out, regions * dim, dim);
  // Of half precision a piece of each feature is converted at a time.
  const int64_t piece = type == ScalarType::Float ? dim : std::min(dim, kRun),
                size = static_cast<int64_t>(out.element_size());
  parallel_ranges(batch * regions, grain(dim * count), [&](int64_t begin, int64_t end) {
    Scratch memory;
    float* converted = memory.take(type == ScalarType::Float ? 0 : (count + 1) * kRun);
    std::vector<const float*> rows(lines.size());
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / regions, r = row % regions;
      const float* w = all_weights + b * count;
      for (int64_t start = 0; start < dim; start += piece) {
        const int64_t n = std::min(piece, dim - start);
        for (int64_t i = 0; i < count; ++i)
          rows[i] = as_floats(type, lines[i].at(b, r) + start * size, n, converted + i * kRun);
        const Result line(type, to.at(b, r) + start * size, converted + count * kRun);
        for_vectors(n, [&](int64_t c, auto read, auto write) VELM_INLINE_LAMBDA {
          Vec sum = read(rows[0] + c) * w[0];
          for (int64_t i = 1; i < count; ++i) sum = fma(Vec(w[i]), read(rows[i] + c), sum);
          write(line.values + c, sum);
        });
        line.finish(n);
      }
    }
  });
  return out;
}

// The sums over a few rows are left in `products`, (batch, blocks, count), and in `sums`, (batch, blocks, dim).
void weighted_sum_rows(const Tensor& grad, const std::vector<Feature>& all, const float* weights, float* products,
                       float* sums) {
  const int64_t batch = grad.size(0), regions = grad.size(1), dim = grad.size(2), blocks = divide_up(regions, kRegions);
  const auto count = static_cast<int64_t>(all.size());
  const ScalarType type = grad.scalar_type();
  const Lines from(grad, regions * dim, dim);
  parallel_ranges(batch * blocks, grain(dim * count * kRegions), [&](int64_t begin, int64_t end) {
    Scratch memory;
    float *of_grad = memory.take(dim), *of_feature = memory.take(dim), *result = memory.take(dim);
    std::vector<double> product(all.size());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, first = item % blocks * kRegions, last = std::min(first + kRegions, regions);
      std::fill(product.begin(), product.end(), 0.0);
      for (int64_t r = first; r < last; ++r) {
        const float* g = as_floats(type, from.at(b, r), dim, of_grad);
        for (int64_t i = 0; i < count; ++i) {
          const Feature& feature = all[i];
          if (feature.is_broadcast) continue;
          if (products) product[i] += sum_of_products(g, as_floats(type, feature.from.at(b, r), dim, of_feature), dim);
          if (feature.wants_grad) {
            const Result line(type, feature.grad.at(b, r), result);
            multiply(g, weights[b * count + i], dim, line.values);
            line.finish(dim);
          }
        }
        if (sums) accumulate(r == first, g, dim, sums + item * dim);
      }
      if (products) std::copy(product.begin(), product.end(), products + item * count);
    }
  });
}

// What features with one region of several get from the sum of the gradient over the regions.
void weighted_sum_broadcast(const float* sums, int64_t batch, int64_t dim, ScalarType type,
                            const std::vector<Feature>& all, const float* weights, float* grad_weights) {
  const auto count = static_cast<int64_t>(all.size());
  parallel_ranges(batch, grain(dim), [&](int64_t begin, int64_t end) {
    Scratch memory;
    float *of_feature = memory.take(dim), *result = memory.take(dim);
    for (int64_t b = begin; b < end; ++b) {
      const float* sum = sums + b * dim;
      for (int64_t i = 0; i < count; ++i) {
        const Feature& feature = all[i];
        if (!feature.is_broadcast) continue;
        if (feature.wants_grad) {
          const Result line(type, feature.grad.at(b, 0), result);
          multiply(sum, weights[b * count + i], dim, line.values);
          line.finish(dim);
        }
        if (grad_weights)
          grad_weights[b * count + i] =
              static_cast<float>(sum_of_products(sum, as_floats(type, feature.from.at(b, 0), dim, of_feature), dim));
      }
    }
  });
}

std::tuple<std::vector<Tensor>, Tensor> weighted_sum_backward(Tensor grad, std::vector<Tensor> features, Tensor weights,
                                                              int64_t broadcast, int64_t grad_mask) {
  const int64_t batch = grad.size(0), regions = grad.size(1), dim = grad.size(2), count = weights.size(1);
  const bool wants_weights = grad_mask & 1;
  Tensor grad_weights = wants_weights ? torch::stable::new_empty(weights, {batch, count}) : nothing(weights);
  std::vector<Tensor> grads;
  std::vector<Feature> all(static_cast<size_t>(count));
  bool needs_sums = false;
  for (int64_t i = 0; i < count; ++i) {
    Feature& feature = all[i];
    feature.is_broadcast = broadcast >> i & 1;
    feature.wants_grad = grad_mask >> (i + 1) & 1;
    const int64_t own = feature.is_broadcast ? 1 : regions;
    grads.push_back(feature.wants_grad ? torch::stable::new_empty(grad, {batch, own, dim}) : nothing(grad));
    feature.grad = Lines(grads.back(), own * dim, dim);
    if (wants_weights) feature.from = feature_lines(features[i], regions);
    needs_sums = needs_sums || (feature.is_broadcast && (wants_weights || feature.wants_grad));
  }
  const int64_t blocks = divide_up(regions, kRegions);
  const auto* w = const_data<float>(weights);
  Scratch memory;
  float* products = wants_weights ? memory.take(batch * blocks * count) : nullptr;
  float* sums = needs_sums ? memory.take(batch * blocks * dim) : nullptr;
  weighted_sum_rows(grad, all, w, products, sums);
  if (products) add_parts(products, batch, blocks, count, count, Lines(grad_weights, count, 1));
  if (needs_sums) {
    float* total = memory.take(batch * dim);
    Lines to;
    to.data = reinterpret_cast<char*>(total);
    to.outer = dim * static_cast<int64_t>(sizeof(float));
    to.inner = sizeof(float);
    add_parts(sums, batch, blocks, dim, dim, to);
    weighted_sum_broadcast(total, batch, dim, grad.scalar_type(), all, w,
                           wants_weights ? mutable_data<float>(grad_weights) : nullptr);
  }
  return {grads, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("film_forward", TORCH_BOX(&film_forward));
  m.impl("film_backward", TORCH_BOX(&film_backward));
  m.impl("weighted_sum_forward", TORCH_BOX(&weighted_sum_forward));
  m.impl("weighted_sum_backward", TORCH_BOX(&weighted_sum_backward));
}

}  // namespace
}  // namespace velm
