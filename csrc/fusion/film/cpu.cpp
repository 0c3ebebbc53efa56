// film, (offset + gamma) * x + beta: each input and each gradient passes through the processor once.

#include "common/needed.h"
#include "fusion/regions_cpu.h"

namespace velm {
namespace {

// x or one of its kind as lines: (batch, regions) of dim, or (batch, dim) of regions. Contiguous if it is a result.
Lines lines_of(const Tensor& x, bool regions_contiguous) {
  return Lines(x, x.stride(0), x.stride(regions_contiguous ? 2 : 1));
}

// One number of any type.
float element(const Lines& lines, int64_t i, int64_t j) {
  float value;
  return *as_floats(lines.type, lines.at(i, j), 1, &value);
}

void film_forward(Tensor x, Tensor gamma, Tensor beta, bool regions_contiguous, double gamma_offset, Tensor out) {
  const int64_t batch = x.size(0), regions = x.size(1), dim = x.size(2);
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

void film_backward(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> gamma, bool regions_contiguous,
                   double gamma_offset, std::optional<Tensor> grad_x, std::optional<Tensor> grad_gamma,
                   std::optional<Tensor> grad_beta) {
  FilmGradients p{};
  p.batch = grad.size(0);
  p.regions = grad.size(1);
  p.dim = grad.size(2);
  p.size = static_cast<int64_t>(grad.element_size());
  p.offset = static_cast<float>(gamma_offset);
  p.wants_x = grad_x.has_value();
  p.wants_gamma = grad_gamma.has_value();
  p.wants_beta = grad_beta.has_value();
  const int64_t along = regions_contiguous ? p.regions : p.dim;
  p.grad = Lines(grad, p.regions * p.dim, along);
  if (grad_x) {
    p.grad_x = Lines(*grad_x, p.regions * p.dim, along);
    const Tensor& given = needed(gamma, "gamma");
    p.gamma = Lines(given, given.stride(0), 1);
  }
  if (grad_gamma) {
    p.grad_gamma = Lines(*grad_gamma, p.dim, 1);
    p.x = lines_of(needed(x, "x"), regions_contiguous);
  }
  if (grad_beta) p.grad_beta = Lines(*grad_beta, p.dim, 1);
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
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "film_forward", film_forward);
  VELM_KERNEL(m, "film_backward", film_backward);
}

}  // namespace
}  // namespace velm
