// film and weighted_sum, forward and backward: each element passes through a register once. A block takes some regions
// of an entry and columns side by side; sums over regions are those of its threads, and then of the blocks in order.

#include "fusion/modulation_cuda.h"

#include <type_traits>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/reduce.h"

namespace velm::cuda {
namespace {

using namespace device;

// Loops over regions are unrolled, so that several loads are on their way at a time.
constexpr int kThreads = 128, kWarps = kThreads / 32;

unsigned divide_up(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

// What a thread works at: `Width` columns of the regions [first, last) of an entry.
struct Share {
  int64_t batch, first, last, column, part;

  DEVICE_INLINE Share(int64_t regions, unsigned blocks, unsigned column_blocks, int width) {
    part = blockIdx.x / column_blocks;
    batch = part / blocks;
    first = part % blocks * kModulatedRegions;
    last = first + kModulatedRegions < regions ? first + kModulatedRegions : regions;
    column = (int64_t{blockIdx.x % column_blocks} * kThreads + threadIdx.x) * width;
  }
};

template <int Width, class P>
DEVICE_INLINE void load_floats(const P& from, float (&to)[Width]) {
  const auto values = load<Width>(from);
#pragma unroll
  for (int k = 0; k < Width; ++k) to[k] = to_float(values[k]);
}
template <class T, int Width, class P>
DEVICE_INLINE void store_floats(const P& to, const float (&from)[Width]) {
  Vector<T, Width> values;
#pragma unroll
  for (int k = 0; k < Width; ++k) values[k] = from_float<T>(from[k]);
  store(to, values);
}

struct FilmShape {
  int64_t regions, dim, x_batch_stride, x_stride, gamma_stride, beta_stride;
  unsigned blocks, column_blocks;
  float offset;
};

template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    film_kernel(ReadOnly<T> x, ReadOnly<T> gamma, ReadOnly<T> beta, Global<T> out, FilmShape shape) {
  const Share at(shape.regions, shape.blocks, shape.column_blocks, Width);
  if (at.column >= shape.dim) return;
  float scale[Width], shift[Width];
  load_floats(gamma + (at.batch * shape.gamma_stride + at.column), scale);
  load_floats(beta + (at.batch * shape.beta_stride + at.column), shift);
#pragma unroll 4
  for (int64_t r = at.first; r < at.last; ++r) {
    float value[Width];
    load_floats(x + (at.batch * shape.x_batch_stride + r * shape.x_stride + at.column), value);
#pragma unroll
    for (int k = 0; k < Width; ++k) value[k] = fmaf(scale[k] + shape.offset, value[k], shift[k]);
    store_floats<T>(out + ((at.batch * shape.regions + r) * shape.dim + at.column), value);
  }
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    film_backward_kernel(ReadOnly<T> grad, ReadOnly<T> x, ReadOnly<T> gamma, Global<T> grad_x, Global<float> parts,
                         FilmShape shape) {
  const Share at(shape.regions, shape.blocks, shape.column_blocks, Width);
  if (at.column >= shape.dim) return;
  float scale[Width] = {}, of_gamma[Width] = {}, of_beta[Width] = {};
  if (grad_x) load_floats(gamma + (at.batch * shape.gamma_stride + at.column), scale);
#pragma unroll 4
  for (int64_t r = at.first; r < at.last; ++r) {
    const int64_t place = (at.batch * shape.regions + r) * shape.dim + at.column;
    float g[Width], value[Width];
    load_floats(grad + place, g);
    if (x) {
      load_floats(x + (at.batch * shape.x_batch_stride + r * shape.x_stride + at.column), value);
#pragma unroll
      for (int k = 0; k < Width; ++k) of_gamma[k] = fmaf(g[k], value[k], of_gamma[k]);
    }
#pragma unroll
    for (int k = 0; k < Width; ++k) {
      of_beta[k] += g[k];
      value[k] = g[k] * (scale[k] + shape.offset);
    }
    if (grad_x) store_floats<T>(grad_x + place, value);
  }
  if (!parts) return;
#pragma unroll
  for (int k = 0; k < Width; ++k) {
    parts[at.part * 2 * shape.dim + at.column + k] = of_gamma[k];
    parts[(at.part * 2 + 1) * shape.dim + at.column + k] = of_beta[k];
  }
}

// A warp takes the regions of one feature.
template <class T>
__global__ void __launch_bounds__(kThreads) film_along_kernel(ReadOnly<T> x, ReadOnly<T> gamma, ReadOnly<T> beta,
                                                              Global<T> out, FilmShape shape, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (row >= rows) return;
  const int64_t batch = row / shape.dim, k = row % shape.dim;
  const auto from = x + (batch * shape.x_batch_stride + k * shape.x_stride);
  const auto to = out + row * shape.regions;
  const float scale = to_float(gamma[batch * shape.gamma_stride + k]) + shape.offset;
  const float shift = to_float(beta[batch * shape.beta_stride + k]);
  for (int64_t r = threadIdx.x; r < shape.regions; r += 32)
    to[r] = from_float<T>(fmaf(scale, to_float(from[r]), shift));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    film_along_backward_kernel(ReadOnly<T> grad, ReadOnly<T> x, ReadOnly<T> gamma, Global<T> grad_x,
                               Global<T> grad_gamma, Global<T> grad_beta, FilmShape shape, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  // Whole warps leave.
  if (row >= rows) return;
  const int64_t batch = row / shape.dim, k = row % shape.dim;
  const auto from = grad + row * shape.regions;
  const int64_t in = batch * shape.x_batch_stride + k * shape.x_stride;
  const float scale = grad_x ? to_float(gamma[batch * shape.gamma_stride + k]) + shape.offset : 0.0f;
  float of_gamma = 0.0f, of_beta = 0.0f;
  for (int64_t r = threadIdx.x; r < shape.regions; r += 32) {
    const float g = to_float(from[r]);
    if (x) of_gamma = fmaf(g, to_float(x[in + r]), of_gamma);
    of_beta += g;
    if (grad_x) grad_x[row * shape.regions + r] = from_float<T>(g * scale);
  }
  of_gamma = warp_sum(of_gamma);
  of_beta = warp_sum(of_beta);
  if (threadIdx.x != 0) return;
  if (grad_gamma) grad_gamma[row] = from_float<T>(of_gamma);
  if (grad_beta) grad_beta[row] = from_float<T>(of_beta);
}

// to[o, i] = the sum over k of parts[o, k, i], in order; parts[o, k] are `stride` apart.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(ReadOnly<float> parts, Global<T> to, int64_t outer, int64_t count, int64_t inner, int64_t stride) {
  const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (number >= outer * inner) return;
  const int64_t o = number / inner, i = number % inner;
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k) sum += parts[(o * count + k) * stride + i];
  to[number] = from_float<T>(sum);
}

template <class T>
void add_parts(const Span& parts, int64_t offset, const Span& to, int64_t outer, int64_t count, int64_t inner,
               int64_t stride, Stream stream) {
  if (outer * inner == 0) return;
  auto from = global<const float>(parts);
  if (count) from = from + offset;
  launch<add_parts_kernel<T>>(divide_up(outer * inner, kThreads), kThreads, 0, stream, from, global<T>(to), outer,
                              count, inner, stride);
}

template <class T>
struct FeatureRows {
  ReadOnly<T> from;
  Global<T> grad;
  int64_t batch_stride, region_stride;
  bool is_broadcast;
};

template <class T>
struct Features {
  int count;
  int64_t regions, dim;
  unsigned blocks, column_blocks;
  FeatureRows<T> feature[kMostFeatures];
};

template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(const Features<T> all, ReadOnly<float> weights, Global<T> out) {
  const Share at(all.regions, all.blocks, all.column_blocks, Width);
  if (at.column >= all.dim) return;
  for (int64_t r = at.first; r < at.last; ++r) {
    float sum[Width] = {};
    for (int i = 0; i < all.count; ++i) {
      const auto& feature = all.feature[i];
      const float weight = weights[at.batch * all.count + i];
      float value[Width];
      load_floats(feature.from + (at.batch * feature.batch_stride + r * feature.region_stride + at.column), value);
#pragma unroll
      for (int k = 0; k < Width; ++k) sum[k] = fmaf(weight, value[k], sum[k]);
    }
    store_floats<T>(out + ((at.batch * all.regions + r) * all.dim + at.column), sum);
  }
}

struct Storage {
  // Taken by turns, so that a feature does not wait for all warps to have read what the one before left.
  BlockSum<float> products[2];
};

// The gradient is read once from memory, and by the features after the first from a cache.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_backward_kernel(const Features<T> all, ReadOnly<T> grad, ReadOnly<float> weights,
                                 Global<float> products, Global<float> parts) {
  auto& shared = static_shared<Storage>();
  const Share at(all.regions, all.blocks, all.column_blocks, Width);
  const bool is_inside = at.column < all.dim;
  int turn = 0;
  for (int i = 0; i < all.count; ++i) {
    const auto& feature = all.feature[i];
    if (feature.is_broadcast) continue;
    const float weight = weights[at.batch * all.count + i];
    float product = 0.0f;
    for (int64_t r = at.first; r < at.last && is_inside; ++r) {
      const int64_t place = (at.batch * all.regions + r) * all.dim + at.column;
      float g[Width], value[Width];
      load_floats(grad + place, g);
      if (products) {
        load_floats(feature.from + (at.batch * feature.batch_stride + r * feature.region_stride + at.column), value);
#pragma unroll
        for (int k = 0; k < Width; ++k) product = fmaf(g[k], value[k], product);
      }
      if (feature.grad) {
#pragma unroll
        for (int k = 0; k < Width; ++k) value[k] = g[k] * weight;
        store_floats<T>(feature.grad + place, value);
      }
    }
    if (products) {
      product = block_sum(product, shared.products[turn++ % 2]);
      if (threadIdx.x == 0) products[int64_t{blockIdx.x} * all.count + i] = product;
    }
  }
  if (!parts || !is_inside) return;
  float sum[Width] = {};
#pragma unroll 4
  for (int64_t r = at.first; r < at.last; ++r) {
    float g[Width];
    load_floats(grad + ((at.batch * all.regions + r) * all.dim + at.column), g);
#pragma unroll
    for (int k = 0; k < Width; ++k) sum[k] += g[k];
  }
#pragma unroll
  for (int k = 0; k < Width; ++k) parts[at.part * all.dim + at.column + k] = sum[k];
}

// What features with one region of several get from the sum of the gradient over the regions: a block an entry.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_broadcast_kernel(const Features<T> all, ReadOnly<float> sums, ReadOnly<float> weights,
                                  Global<float> grad_weights) {
  auto& shared = static_shared<Storage>();
  const int64_t batch = blockIdx.x;
  int turn = 0;
  for (int i = 0; i < all.count; ++i) {
    const auto& feature = all.feature[i];
    if (!feature.is_broadcast) continue;
    const float weight = weights[batch * all.count + i];
    float product = 0.0f;
    for (int64_t c = threadIdx.x; c < all.dim; c += kThreads) {
      const float sum = sums[batch * all.dim + c];
      if (feature.grad) feature.grad[batch * all.dim + c] = from_float<T>(sum * weight);
      if (grad_weights) product = fmaf(sum, to_float(feature.from[batch * feature.batch_stride + c]), product);
    }
    if (!grad_weights) continue;
    product = block_sum(product, shared.products[turn++ % 2]);
    if (threadIdx.x == 0) grad_weights[batch * all.count + i] = product;
  }
}

template <class T, class F>
void with_width(bool fits, const F& run) {
  if (fits) return run(std::integral_constant<int, 16 / sizeof(T)>{});
  run(std::integral_constant<int, 1>{});
}

template <class T>
bool is_wide(const Span& span, Dtype dtype, int64_t a, int64_t b) {
  constexpr int kWidth = 16 / sizeof(T);
  return is_aligned(span, dtype, a, kWidth) && b % kWidth == 0;
}

template <class T>
bool is_wide(const Film& p) {
  const int64_t dim = p.dim;
  return is_wide<T>(p.x, p.dtype, p.x_batch_stride, p.x_stride) && is_wide<T>(p.gamma, p.dtype, p.gamma_stride, dim) &&
         is_wide<T>(p.beta, p.dtype, p.beta_stride, dim) && is_wide<T>(p.out, p.dtype, dim, dim) &&
         is_wide<T>(p.grad, p.dtype, dim, dim) && is_wide<T>(p.grad_x, p.dtype, dim, dim);
}

FilmShape shape_of(const Film& p, int width) {
  return {p.regions,
          p.dim,
          p.x_batch_stride,
          p.x_stride,
          p.gamma_stride,
          p.beta_stride,
          static_cast<unsigned>(modulated_blocks(p.regions)),
          divide_up(p.dim, kThreads * width),
          p.offset};
}

unsigned grid_of(int64_t batch, const FilmShape& shape) {
  return static_cast<unsigned>(batch) * shape.blocks * shape.column_blocks;
}

template <class T>
Features<T> features_of(const WeightedSum& p, int width) {
  Features<T> all{};
  all.count = p.count;
  all.regions = p.regions;
  all.dim = p.dim;
  all.blocks = static_cast<unsigned>(modulated_blocks(p.regions));
  all.column_blocks = divide_up(p.dim, kThreads * width);
  for (int i = 0; i < p.count; ++i) {
    const WeightedFeature& f = p.feature[i];
    all.feature[i] = {global<const T>(f.from), global<T>(f.grad), f.batch_stride, f.region_stride, f.is_broadcast};
  }
  return all;
}

template <class T>
bool is_wide(const WeightedSum& p) {
  bool fits = is_wide<T>(p.out, p.dtype, p.dim, p.dim) && is_wide<T>(p.grad, p.dtype, p.dim, p.dim);
  for (int i = 0; i < p.count; ++i)
    fits = fits && is_wide<T>(p.feature[i].from, p.dtype, p.feature[i].batch_stride, p.feature[i].region_stride) &&
           is_wide<T>(p.feature[i].grad, p.dtype, p.dim, p.dim);
  return fits;
}

}  // namespace

void film_forward(const Film& p, Stream stream) {
  if (p.batch * p.regions * p.dim == 0) return;
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto x = global<const T>(p.x), gamma = global<const T>(p.gamma), beta = global<const T>(p.beta);
    const auto out = global<T>(p.out);
    const int64_t rows = p.batch * p.dim;
    if (p.regions_contiguous)
      return launch<film_along_kernel<T>>(divide_up(rows, kWarps), dim3(32, kWarps), 0, stream, x, gamma, beta, out,
                                          shape_of(p, 1), rows);
    with_width<T>(is_wide<T>(p), [&](auto width) {
      const FilmShape shape = shape_of(p, width);
      launch<film_kernel<T, width>>(grid_of(p.batch, shape), kThreads, 0, stream, x, gamma, beta, out, shape);
    });
  });
}

void film_backward(const Film& p, Stream stream) {
  if (p.batch * p.dim == 0) return;
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto grad = global<const T>(p.grad), x = global<const T>(p.x), gamma = global<const T>(p.gamma);
    const auto grad_x = global<T>(p.grad_x);
    const int64_t rows = p.batch * p.dim, blocks = modulated_blocks(p.regions);
    if (p.regions_contiguous)
      return launch<film_along_backward_kernel<T>>(divide_up(rows, kWarps), dim3(32, kWarps), 0, stream, grad, x, gamma,
                                                   grad_x, global<T>(p.grad_gamma), global<T>(p.grad_beta),
                                                   shape_of(p, 1), rows);
    if (p.regions != 0)
      with_width<T>(is_wide<T>(p), [&](auto width) {
        const FilmShape shape = shape_of(p, width);
        launch<film_backward_kernel<T, width>>(grid_of(p.batch, shape), kThreads, 0, stream, grad, x, gamma, grad_x,
                                               global<float>(p.parts), shape);
      });
    if (p.grad_gamma) add_parts<T>(p.parts, 0, p.grad_gamma, p.batch, blocks, p.dim, 2 * p.dim, stream);
    if (p.grad_beta) add_parts<T>(p.parts, p.dim, p.grad_beta, p.batch, blocks, p.dim, 2 * p.dim, stream);
  });
}

void weighted_sum_forward(const WeightedSum& p, Stream stream) {
  if (p.batch * p.regions * p.dim == 0) return;
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(is_wide<T>(p), [&](auto width) {
      const Features<T> all = features_of<T>(p, width);
      launch<weighted_sum_kernel<T, width>>(static_cast<unsigned>(p.batch) * all.blocks * all.column_blocks, kThreads,
                                            0, stream, all, global<const float>(p.weights), global<T>(p.out));
    });
  });
}

void weighted_sum_backward(const WeightedSum& p, Stream stream) {
  if (p.batch == 0) return;
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto weights = global<const float>(p.weights);
    const int64_t blocks = modulated_blocks(p.regions);
    int64_t column_blocks = 0;
    if (p.regions * p.dim != 0)
      with_width<T>(is_wide<T>(p), [&](auto width) {
        const Features<T> all = features_of<T>(p, width);
        column_blocks = all.column_blocks;
        launch<weighted_sum_backward_kernel<T, width>>(static_cast<unsigned>(p.batch) * all.blocks * all.column_blocks,
                                                       kThreads, 0, stream, all, global<const T>(p.grad), weights,
                                                       global<float>(p.products), global<float>(p.parts));
      });
    if (p.grad_weights)
      add_parts<float>(p.products, 0, p.grad_weights, p.batch, blocks * column_blocks, p.count, p.count, stream);
    if (!p.sums) return;
    add_parts<float>(p.parts, 0, p.sums, p.batch, blocks, p.dim, p.dim, stream);
    launch<weighted_sum_broadcast_kernel<T>>(static_cast<unsigned>(p.batch), kThreads, 0, stream, features_of<T>(p, 1),
                                             global<const float>(p.sums), weights, global<float>(p.grad_weights));
  });
}

}  // namespace velm::cuda
