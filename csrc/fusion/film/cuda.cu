// film, forward and backward: each element passes through a register once. A block takes some regions of an entry and
// columns side by side.

#include "fusion/film/cuda.h"

#include "fusion/regions_cuda.h"

namespace velm::cuda {
namespace {

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

template <class T>
bool fits_vectors(const Film& p) {
  bool fits = p.dim() % kVector<T> == 0;
  for (const View* view : {&p.x, &p.gamma, &p.beta, &p.out, &p.grad, &p.grad_x})
    fits = fits && is_aligned(*view, kVector<T>);
  return fits;
}

FilmShape shape_of(const Film& p, int width) {
  return {p.regions(),
          p.dim(),
          p.x.stride[1],
          p.x.stride[p.regions_contiguous ? 3 : 2],
          p.gamma.stride[2],
          p.beta.stride[2],
          static_cast<unsigned>(region_blocks(p.regions())),
          divide_up(p.dim(), kThreads * width),
          p.offset};
}

unsigned grid_of(int64_t batch, const FilmShape& shape) {
  return static_cast<unsigned>(batch) * shape.blocks * shape.column_blocks;
}

}  // namespace

void film_forward(const Film& p, Stream stream) {
  if (p.batch() * p.regions() * p.dim() == 0) return;
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto x = global<const T>(p.x), gamma = global<const T>(p.gamma), beta = global<const T>(p.beta);
    const auto out = global<T>(p.out);
    const int64_t rows = p.batch() * p.dim();
    if (p.regions_contiguous)
      return launch<film_along_kernel<T>>(divide_up(rows, kWarps), dim3(32, kWarps), 0, stream, x, gamma, beta, out,
                                          shape_of(p, 1), rows);
    with_width<T>(fits_vectors<T>(p), [&](auto width) {
      const FilmShape shape = shape_of(p, width);
      launch<film_kernel<T, width>>(grid_of(p.batch(), shape), kThreads, 0, stream, x, gamma, beta, out, shape);
    });
  });
}

void film_backward(const Film& p, Stream stream) {
  if (p.batch() * p.dim() == 0) return;
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto grad = global<const T>(p.grad), x = global<const T>(p.x), gamma = global<const T>(p.gamma);
    const auto grad_x = global<T>(p.grad_x);
    const int64_t rows = p.batch() * p.dim(), blocks = region_blocks(p.regions());
    if (p.regions_contiguous)
      return launch<film_along_backward_kernel<T>>(divide_up(rows, kWarps), dim3(32, kWarps), 0, stream, grad, x, gamma,
                                                   grad_x, global<T>(p.grad_gamma), global<T>(p.grad_beta),
                                                   shape_of(p, 1), rows);
    if (p.regions() != 0)
      with_width<T>(fits_vectors<T>(p), [&](auto width) {
        const FilmShape shape = shape_of(p, width);
        launch<film_backward_kernel<T, width>>(grid_of(p.batch(), shape), kThreads, 0, stream, grad, x, gamma, grad_x,
                                               global<float>(p.parts), shape);
      });
    if (p.grad_gamma) add_parts<T>(p.parts, 0, p.grad_gamma, p.batch(), blocks, p.dim(), 2 * p.dim(), stream);
    if (p.grad_beta) add_parts<T>(p.parts, p.dim(), p.grad_beta, p.batch(), blocks, p.dim(), 2 * p.dim(), stream);
  });
}

}  // namespace velm::cuda
