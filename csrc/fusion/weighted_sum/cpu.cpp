// weighted_sum, the sum of weights[i] * features[i]: each input and each gradient passes through the processor once.

#include <vector>

#include "fusion/regions_cpu.h"

namespace velm {
namespace {

// A tensor of weighted_sum and its gradient; a feature with one region of several has region stride 0.
struct Feature {
  Lines from, grad;
  bool is_broadcast = false, wants_grad = false;
};

Lines feature_lines(const Tensor& t, int64_t regions) {
  return Lines(t, t.stride(0), t.size(1) == regions ? t.stride(1) : 0);
}

void weighted_sum_forward(std::vector<Tensor> features, Tensor weights, Tensor out) {
  const int64_t batch = out.size(0), regions = out.size(1), dim = out.size(2);
  const auto count = static_cast<int64_t>(features.size());
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

void weighted_sum_backward(Tensor grad, std::vector<Tensor> features, Tensor weights, std::vector<bool> broadcast,
                           std::vector<std::optional<Tensor>> grad_features, std::optional<Tensor> grad_weights) {
  const int64_t batch = grad.size(0), regions = grad.size(1), dim = grad.size(2), count = weights.size(1);
  std::vector<Feature> all(static_cast<size_t>(count));
  bool needs_sums = false;
  for (size_t i = 0; i < all.size(); ++i) {
    Feature& feature = all[i];
    feature.is_broadcast = broadcast[i];
    feature.wants_grad = grad_features[i].has_value();
    if (feature.wants_grad) feature.grad = Lines(*grad_features[i], (broadcast[i] ? 1 : regions) * dim, dim);
    if (grad_weights) feature.from = feature_lines(features[i], regions);
    needs_sums = needs_sums || (feature.is_broadcast && (grad_weights || feature.wants_grad));
  }
  const int64_t blocks = divide_up(regions, kRegions);
  const auto* w = const_data<float>(weights);
  Scratch memory;
  float* products = grad_weights ? memory.take(batch * blocks * count) : nullptr;
  float* sums = needs_sums ? memory.take(batch * blocks * dim) : nullptr;
  weighted_sum_rows(grad, all, w, products, sums);
  if (products) add_parts(products, batch, blocks, count, count, Lines(*grad_weights, count, 1));
  if (needs_sums) {
    float* total = memory.take(batch * dim);
    Lines to;
    to.data = reinterpret_cast<char*>(total);
    to.outer = dim * static_cast<int64_t>(sizeof(float));
    to.inner = sizeof(float);
    add_parts(sums, batch, blocks, dim, dim, to);
    weighted_sum_broadcast(total, batch, dim, grad.scalar_type(), all, w,
                           grad_weights ? mutable_data<float>(*grad_weights) : nullptr);
  }
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "weighted_sum_forward", weighted_sum_forward);
  VELM_KERNEL(m, "weighted_sum_backward", weighted_sum_backward);
}

}  // namespace
}  // namespace velm
