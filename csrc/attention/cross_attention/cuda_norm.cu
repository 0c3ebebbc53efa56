// RMS norm of queries and keys over head_dim (Zhang and Sennrich, 2019): one warp per row, one pass over memory.

#include "attention/cross_attention/cuda_norm.h"

#include "attention/cuda_arguments.h"
#include "device/launch.h"
#include "device/reduce.h"

namespace velm::cuda {
namespace {

constexpr int kMostDim = 256;

// Rows with the heads last, as results lie in memory.
struct Place {
  int batch, head, row;

  DEVICE_INLINE Place(int64_t at, int heads, int rows)
      : batch(static_cast<int>(at / heads / rows)),
        head(static_cast<int>(at % heads)),
        row(static_cast<int>(at / heads % rows)) {}
};

template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const Rows<const T> x, const ReadOnly<T> weight, const Rows<T> y, int64_t count, int heads, int rows,
                int dim, float eps) {
  constexpr int kSteps = kMostDim / 32 / Width;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= count) return;
  const Place place(at, heads, rows);
  const auto from = x.at(place.batch, place.head, place.row);
  const auto to = y.at(place.batch, place.head, place.row);
  float values[kSteps][Width] = {}, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int column = (i * 32 + lane) * Width;
    if (column >= dim) break;
    const auto part = load<Width>(from + column);
#pragma unroll
    for (int k = 0; k < Width; ++k) {
      values[i][k] = to_float(part[k]);
      squares = fmaf(values[i][k], values[i][k], squares);
    }
  }
  const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(dim) + eps);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int column = (i * 32 + lane) * Width;
    if (column >= dim) break;
    const auto w = load<Width>(weight + column);
    Vector<T, Width> part;
#pragma unroll
    for (int k = 0; k < Width; ++k) part[k] = from_float<T>(values[i][k] * scale * to_float(w[k]));
    store(to + column, part);
  }
}

constexpr int kMostBlocks = 256;

// With n = x / rms: grad_x = (w * grad_y - n * mean(w * grad_y * n)) / rms, and in `partials` for each warp its rows'
// sums of grad_y * n.
template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_backward_kernel(const Rows<const T> x, const ReadOnly<T> weight, const Rows<const float> grad_y,
                         const Rows<T> grad_x, const Global<float> partials, int64_t count, int heads, int rows,
                         int dim, float eps) {
  constexpr int kSteps = kMostDim / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, warps = int64_t{gridDim.x} * kWarps;
  float sums[kSteps] = {}, w[kSteps] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    if (i * 32 + lane < dim) w[i] = to_float(weight[i * 32 + lane]);
  for (int64_t at = warp; at < count; at += warps) {
    const Place place(at, heads, rows);
    const auto from = x.at(place.batch, place.head, place.row);
    const auto upstream = grad_y.at(place.batch, place.head, place.row);
    float grad[kSteps] = {}, n[kSteps] = {}, squares = 0.0f, products = 0.0f;
    bool live = false;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i * 32 + lane < dim) grad[i] = upstream[i * 32 + lane];
      live = live || grad[i] != 0.0f;
    }
    // A row whose gradient is all zero was not attended to: it is not read, as it may be NaN, and weights may be.
    live = __any_sync(kAll, live);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (live && i * 32 + lane < dim) n[i] = to_float(from[i * 32 + lane]);
      squares = fmaf(n[i], n[i], squares);
    }
    const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(dim) + eps);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      n[i] *= scale;
      sums[i] = fmaf(grad[i], n[i], sums[i]);
      grad[i] *= w[i];
      products = fmaf(grad[i], n[i], products);
    }
    const float mean = warp_sum(products) / static_cast<float>(dim);
    if (!grad_x.data) continue;
    const auto to = grad_x.at(place.batch, place.head, place.row);
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (i * 32 + lane < dim) to[i * 32 + lane] = from_float<T>(live ? (grad[i] - n[i] * mean) * scale : 0.0f);
  }
  if (!partials) return;
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    if (i * 32 + lane < dim) partials[warp * dim + i * 32 + lane] = sums[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_finish_kernel(const ReadOnly<float> partials, const Global<T> grad_weight, int64_t count, int dim) {
  const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (column >= dim) return;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += partials[i * dim + column];
  grad_weight[column] = from_float<T>(static_cast<float>(sum));
}

int64_t rows_in(const View& x) {
  return x.size[0] * x.size[1] * x.size[2];
}

int64_t backward_blocks(const RmsNormBackward& p) {
  return std::min<int64_t>((rows_in(p.x) + kWarps - 1) / kWarps, kMostBlocks);
}

}  // namespace

void rms_norm(const RmsNorm& p, Stream stream) {
  const int64_t count = rows_in(p.x);
  if (count == 0) return;
  constexpr int kVector = 4;
  const bool in_vectors = p.x.size[3] % kVector == 0 && is_aligned(p.x, kVector) && is_aligned(p.y, kVector) &&
                          is_aligned(p.weight, kVector);
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto width) {
      launch<norm_kernel<T, decltype(width)::value>>(
          static_cast<unsigned>((count + kWarps - 1) / kWarps), kThreads, 0, stream, rows_of<const T>(p.x),
          global<const T>(p.weight), rows_of<T>(p.y), count, static_cast<int>(p.x.size[1]),
          static_cast<int>(p.x.size[2]), static_cast<int>(p.x.size[3]), static_cast<float>(p.eps));
    };
    if (in_vectors)
      run(std::integral_constant<int, kVector>{});
    else
      run(std::integral_constant<int, 1>{});
  });
}

int64_t rms_norm_partials(const RmsNormBackward& p) {
  return backward_blocks(p) * kWarps * p.x.size[3];
}

void rms_norm_backward(const RmsNormBackward& p, Stream stream) {
  const int64_t count = rows_in(p.x), blocks = backward_blocks(p);
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    if (count > 0)
      launch<norm_backward_kernel<T>>(static_cast<unsigned>(blocks), kThreads, 0, stream, rows_of<const T>(p.x),
                                      global<const T>(p.weight), rows_of<const float>(p.grad_y), rows_of<T>(p.grad_x),
                                      global<float>(p.partials), count, static_cast<int>(p.x.size[1]),
                                      static_cast<int>(p.x.size[2]), static_cast<int>(p.x.size[3]),
                                      static_cast<float>(p.eps));
    if (p.grad_weight)
      launch<norm_finish_kernel<T>>(static_cast<unsigned>((p.x.size[3] + kThreads - 1) / kThreads), kThreads, 0, stream,
                                    global<const float>(p.partials), global<T>(p.grad_weight), blocks * kWarps,
                                    static_cast<int>(p.x.size[3]));
  });
}

}  // namespace velm::cuda
