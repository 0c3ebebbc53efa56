// sum_r w_r prod_m ([1; x_m] F_m[r]) + b and its gradients.
//
// The products of matrices are torch's, for a few ranks at a time; between them, one pass over memory makes the sum
// over ranks of products over modalities, or the gradients d_m of the factors of these products. The gradients of x_m
// and F_m are d_m F_m^T and [1; x_m]^T d_m.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/tensor.h"
#include "simd/layout.h"
#include "simd/pages.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm {
namespace {

using namespace simd;

constexpr int kMost = 4;
// Numbers of the products of one modality that exist at a time, unless one rank has more: a second-level cache or two.
constexpr int64_t kProducts = 1 << 19;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;
// Columns of one task of the gradients.
constexpr int64_t kColumns = 8 * kLanes;

using Optional = std::optional<Tensor>;

Tensor view(float* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) {
  using Array = torch::headeronly::IntHeaderOnlyArrayRef;
  return torch::stable::from_blob(data, Array(sizes), Array(strides),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

// c = a b for every matrix of a stack.
void multiply(const Tensor& a, const Tensor& b, const Tensor& c) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(c.get(), a.get(), b.get()));
}

// One modality: x (rows, dim), its factor (rank, 1 + dim, out), and memory for some ranks of what is made of them. A
// row of x serves `repeat` neighbouring rows of the result.
struct Modality {
  Tensor factor;
  int64_t rows, depth, out, repeat;
  float* with_one;   // (rows, 1 + dim)
  float* converted;  // for some ranks of a factor that is not fp32
  float* room;       // (some ranks, rows, out)
  float* kept;       // (rank, rows, out) or nothing

  Modality(const Tensor& x, const Tensor& factor, int64_t result_rows, int64_t ranks, Scratch& memory)
      : factor(factor),
        rows(x.size(0)),
        depth(factor.size(1)),
        out(factor.size(2)),
        repeat(result_rows / std::max<int64_t>(1, rows)),
        with_one(memory.take(rows * depth)),
        converted(factor.scalar_type() == ScalarType::Float ? nullptr : memory.take(ranks * depth * out)),
        room(memory.take(ranks * rows * out)),
        kept(nullptr) {
    with_type(x.scalar_type(), [&](auto t) {
      const auto* from = const_data<decltype(t)>(x);
      parallel_ranges(rows, kGrain / depth, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          with_one[row * depth] = 1.0f;
          convert(with_one + row * depth + 1, from + row * x.stride(0), depth - 1);
        }
      });
    });
  }

  int64_t size() const { return rows * factor.size(0) * out; }

  // The factor of some ranks.
  float* ranks(int64_t first, int64_t count) const {
    const int64_t size = depth * out;
    if (!converted) return mutable_data<float>(factor) + first * size;
    with_type(factor.scalar_type(), [&](auto t) {
      const auto* from = const_data<decltype(t)>(factor) + first * size;
      parallel_ranges(count * size, kGrain,
                      [&](int64_t begin, int64_t end) { convert(converted + begin, from + begin, end - begin); });
    });
    return converted;
  }

  float* products(int64_t first, int64_t count, bool compute) const {
    float* to = kept ? kept + first * rows * out : room;
    if (compute)
      multiply(view(with_one, {count, rows, depth}, {0, depth, 1}),
               view(ranks(first, count), {count, depth, out}, {depth * out, out, 1}),
               view(to, {count, rows, out}, {rows * out, out, 1}));
    return to;
  }
};

struct Problem {
  Scratch memory;
  std::vector<Modality> inputs;
  std::vector<float> weight;
  int64_t rows, rank, out;
  int64_t step;  // ranks at a time

  Problem(const Tensor& x0, const Tensor& x1, const Optional& x2, const Optional& x3, const Tensor& factor0,
          const Tensor& factor1, const Optional& factor2, const Optional& factor3, const Tensor& weights, int64_t rows)
      : weight(static_cast<size_t>(weights.size(0))),
        rows(rows),
        rank(weights.size(0)),
        out(factor0.size(2)),
        step(std::clamp<int64_t>(kProducts / std::max<int64_t>(1, rows * out), 1, std::max<int64_t>(1, rank))) {
    with_type(weights.scalar_type(), [&](auto t) { convert(weight.data(), const_data<decltype(t)>(weights), rank); });
    inputs.emplace_back(x0, factor0, rows, step, memory);
    inputs.emplace_back(x1, factor1, rows, step, memory);
    if (x2) inputs.emplace_back(*x2, *factor2, rows, step, memory);
    if (x3) inputs.emplace_back(*x3, *factor3, rows, step, memory);
  }

  bool empty() const { return rows == 0 || out == 0 || rank == 0; }
  void keep(const Tensor& kept) {
    if (kept.numel() == 0) return;
    float* to = mutable_data<float>(kept);
    for (Modality& m : inputs) {
      m.kept = to;
      to += m.size();
    }
  }
};

// The products of all modalities with some ranks of their factors: (ranks, rows of m, out) each.
struct Products {
  int count = 0;
  int64_t ranks;
  float* data[kMost] = {};
  int64_t rows[kMost] = {}, repeat[kMost] = {};

  Products(const Problem& p, int64_t first, int64_t ranks, bool compute) : ranks(ranks) {
    for (const Modality& m : p.inputs) {
      data[count] = m.products(first, ranks, compute);
      rows[count] = m.rows;
      repeat[count++] = m.repeat;
    }
  }
};

template <class F>
VELM_INLINE void for_vectors(int64_t first, int64_t last, const F& f) {
  int64_t o = first;
  for (; o + kLanes <= last; o += kLanes) f(o, std::integral_constant<int, kLanes>{});
  if (o < last) f(o, static_cast<int>(last - o));
}
template <class N>
VELM_INLINE Vec load_some(const float* p, N n) {
  if constexpr (std::is_same_v<N, int>)
    return load_first(p, n);
  else
    return load(p);
}
template <class N>
VELM_INLINE void store_some(float* p, Vec x, N n) {
  if constexpr (std::is_same_v<N, int>)
    store_first(p, x, n);
  else
    store(p, x);
}

// sums (rows, out) += the sum over ranks of weight[r] times the product over modalities, in the order of the ranks.
void add_products(const Products& p, int64_t rows, int64_t out, const float* weight, float* sums) {
  parallel_ranges(rows, kGrain / (p.ranks * out), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t r = 0; r < p.ranks; ++r) {
        const float* of[kMost];
        for (int m = 0; m < p.count; ++m) of[m] = p.data[m] + (r * p.rows[m] + row / p.repeat[m]) * out;
        const Vec factor(weight[r]);
        for_vectors(0, out, [&](int64_t o, auto lanes) VELM_INLINE_LAMBDA {
          Vec product = factor;
          unroll<kMost>([&](auto m) VELM_INLINE_LAMBDA {
            if (m < p.count) product *= load_some(of[m] + o, lanes);
          });
          store_some(sums + row * out + o, load_some(sums + row * out + o, lanes) + product, lanes);
        });
      }
    }
  });
}

// d_m = grad weight[r] times the products of the other modalities, summed over the rows of the result that a row of m
// serves; to[m] may be the product of m. grad_weight gets, for every rank, the sum over rows and columns of grad times
// the product of all.
void gradients_of_products(const Products& p, int64_t rows, int64_t out, const float* grad, const float* weight,
                           const std::array<float*, kMost>& gradients, float* grad_weight) {
  const int64_t ranks = p.ranks;
  // Rows of the result that belong together, because one row of some modality serves them.
  const int64_t unit = *std::max_element(p.repeat, p.repeat + p.count);
  const int64_t chunks = divide_up(out, kColumns), tasks = rows / unit * ranks * chunks;
  std::vector<float> sums(static_cast<size_t>(tasks));
  parallel_ranges(tasks, kGrain / (unit * kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t entry = task / (ranks * chunks), r = task / chunks % ranks;
      const int64_t first = task % chunks * kColumns, last = std::min(first + kColumns, out);
      const Vec scale(weight[r]);
      const float* from[kMost];
      float* to[kMost];
      int64_t step[kMost];  // from a row of the result to the next
      for (int m = 0; m < p.count; ++m) {
        step[m] = p.repeat[m] > 1 ? 0 : out;
        const int64_t at = (r * p.rows[m] + (step[m] ? entry * unit : entry)) * out;
        from[m] = p.data[m] + at;
        to[m] = gradients[m] + at;
      }
      Vec sum = zero();
      for_vectors(first, last, [&](int64_t o, auto lanes) VELM_INLINE_LAMBDA {
        Vec held[kMost];
        unroll<kMost>([&](auto m) VELM_INLINE_LAMBDA { held[m] = zero(); });
        for (int64_t t = 0; t < unit; ++t) {
          Vec product[kMost], others[kMost];
          Vec before = load_some(grad + (entry * unit + t) * out + o, lanes);
          unroll<kMost>([&](auto m) VELM_INLINE_LAMBDA {
            if (m >= p.count) return;
            product[m] = load_some(from[m] + t * step[m] + o, lanes);
            others[m] = before;
            before *= product[m];
          });
          sum += before;
          Vec after = scale;
          unroll<kMost>([&](auto i) VELM_INLINE_LAMBDA {
            constexpr int m = kMost - 1 - i;
            if (m >= p.count) return;
            const Vec gradient = others[m] * after;
            after *= product[m];
            if (step[m])
              store_some(to[m] + t * step[m] + o, gradient, lanes);
            else
              held[m] += gradient;
          });
        }
        unroll<kMost>([&](auto m) VELM_INLINE_LAMBDA {
          if (m < p.count && !step[m]) store_some(to[m] + o, held[m], lanes);
        });
      });
      sums[static_cast<size_t>(task)] = sum_lanes(sum);
    }
  });
  std::vector<double> totals(static_cast<size_t>(ranks));
  for (int64_t task = 0; task < tasks; ++task)
    totals[static_cast<size_t>(task / chunks % ranks)] += sums[static_cast<size_t>(task)];
  std::copy(totals.begin(), totals.end(), grad_weight);
}

void low_rank_fusion_forward(Tensor x0, Tensor x1, Optional x2, Optional x3, Tensor factor0, Tensor factor1,
                             Optional factor2, Optional factor3, Tensor weight, Optional bias, int64_t rows, bool,
                             Tensor out, Optional kept) {
  Problem p(x0, x1, x2, x3, factor0, factor1, factor2, factor3, weight, rows);
  in_large_pages(kept);
  if (kept) p.keep(*kept);
  with_type(x0.scalar_type(), [&](auto t) {
    using T = decltype(t);
    std::vector<float> start(static_cast<size_t>(p.out));
    if (bias) convert(start.data(), const_data<T>(*bias), p.out);
    T* to = mutable_data<T>(out);
    float* sums = std::is_same_v<T, float> ? reinterpret_cast<float*>(to) : p.memory.take(rows * p.out);
    for (int64_t row = 0; row < rows; ++row) std::copy(start.begin(), start.end(), sums + row * p.out);
    for (int64_t r = 0; r < p.rank && !p.empty(); r += p.step)
      add_products(Products(p, r, std::min(p.step, p.rank - r), true), rows, p.out, p.weight.data() + r, sums);
    if constexpr (!std::is_same_v<T, float>) convert(to, sums, rows * p.out);
  });
}

// The gradient of a matrix in fp32: its own memory if that is fp32, else some apart, to be rounded at the end.
float* start_of(const Optional& gradient, Scratch& memory) {
  if (!gradient) return nullptr;
  const int64_t numbers = gradient->numel();
  float* to = gradient->scalar_type() == ScalarType::Float ? mutable_data<float>(*gradient) : memory.take(numbers);
  prefer_huge_pages(to, static_cast<size_t>(numbers) * sizeof(float));
  return to;
}
void round_to(const Optional& gradient, const float* from) {
  if (!gradient || gradient->scalar_type() == ScalarType::Float) return;
  with_type(gradient->scalar_type(), [&](auto t) {
    auto* to = mutable_data<decltype(t)>(*gradient);
    parallel_ranges(gradient->numel(), kGrain,
                    [&](int64_t begin, int64_t end) { convert(to + begin, from + begin, end - begin); });
  });
}

// (rows, dim) = or += d_m F_m^T over some ranks.
void gradient_of_x(const Modality& m, const float* d, int64_t first, int64_t count, float* to) {
  const int64_t dim = m.depth - 1;
  if (dim == 0) return;
  float* factor = m.ranks(first, count);
  const Tensor sum = view(to, {m.rows, dim}, {dim, 1});
  for (int64_t r = 0; r < count; ++r)
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
        sum.get(), sum.get(), view(const_cast<float*>(d) + r * m.rows * m.out, {m.rows, m.out}, {m.out, 1}).get(),
        view(factor + (r * m.depth + 1) * m.out, {m.out, dim}, {1, m.out}).get(), first + r == 0 ? 0.0 : 1.0, 1.0));
}

// (some ranks, 1 + dim, out) = [1; x_m]^T d_m.
void gradient_of_factor(const Modality& m, float* d, int64_t count, float* to) {
  multiply(view(m.with_one, {count, m.depth, m.rows}, {0, 1, m.depth}),
           view(d, {count, m.rows, m.out}, {m.rows * m.out, m.out, 1}),
           view(to, {count, m.depth, m.out}, {m.depth * m.out, m.out, 1}));
}

// grad is contiguous.
void low_rank_fusion_backward(Tensor grad, Tensor x0, Tensor x1, Optional x2, Optional x3, Tensor factor0,
                              Tensor factor1, Optional factor2, Optional factor3, Tensor weight, Tensor kept,
                              int64_t rows, bool, Optional grad_x0, Optional grad_x1, Optional grad_x2,
                              Optional grad_x3, Optional grad_factor0, Optional grad_factor1, Optional grad_factor2,
                              Optional grad_factor3, Optional grad_weight, Optional grad_bias) {
  Problem p(x0, x1, x2, x3, factor0, factor1, factor2, factor3, weight, rows);
  p.keep(kept);
  const std::array<Optional, kMost> of_x{grad_x0, grad_x1, grad_x2, grad_x3},
      of_factor{grad_factor0, grad_factor1, grad_factor2, grad_factor3};
  std::array<float*, kMost> to_x{}, to_factor{}, gradients{};
  bool wants_products = grad_weight.has_value();
  for (size_t m = 0; m < kMost; ++m) {
    to_x[m] = start_of(of_x[m], p.memory);
    to_factor[m] = start_of(of_factor[m], p.memory);
    wants_products |= to_x[m] || to_factor[m];
    if (m < p.inputs.size()) gradients[m] = p.inputs[m].room;
  }
  float* g = nullptr;
  with_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = const_data<T>(grad);
    if constexpr (std::is_same_v<T, float>) {
      g = const_cast<float*>(from);
    } else {
      g = p.memory.take(rows * p.out);
      convert(g, from, rows * p.out);
    }
  });
  std::vector<float> of_ranks(static_cast<size_t>(p.rank));
  if (p.empty()) {
    for (size_t m = 0; m < kMost; ++m) {
      if (of_x[m]) std::fill_n(to_x[m], of_x[m]->numel(), 0.0f);
      if (of_factor[m]) std::fill_n(to_factor[m], of_factor[m]->numel(), 0.0f);
    }
  }
  for (int64_t r = 0; r < p.rank && wants_products && !p.empty(); r += p.step) {
    const int64_t count = std::min(p.step, p.rank - r);
    gradients_of_products(Products(p, r, count, kept.numel() == 0), rows, p.out, g, p.weight.data() + r, gradients,
                          of_ranks.data() + r);
    for (size_t m = 0; m < p.inputs.size(); ++m) {
      const Modality& input = p.inputs[m];
      if (of_x[m]) gradient_of_x(input, gradients[m], r, count, to_x[m]);
      if (of_factor[m]) gradient_of_factor(input, gradients[m], count, to_factor[m] + r * input.depth * p.out);
    }
  }
  for (size_t m = 0; m < kMost; ++m) {
    round_to(of_x[m], to_x[m]);
    round_to(of_factor[m], to_factor[m]);
  }
  with_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if (grad_weight) convert(mutable_data<T>(*grad_weight), of_ranks.data(), p.rank);
    if (!grad_bias) return;
    std::vector<double> sums(static_cast<size_t>(p.out));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t o = 0; o < p.out; ++o) sums[static_cast<size_t>(o)] += g[row * p.out + o];
    const std::vector<float> rounded(sums.begin(), sums.end());
    convert(mutable_data<T>(*grad_bias), rounded.data(), p.out);
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "low_rank_fusion_forward", low_rank_fusion_forward);
  VELM_KERNEL(m, "low_rank_fusion_backward", low_rank_fusion_backward);
}

}  // namespace
}  // namespace velm
