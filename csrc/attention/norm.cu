// RMS norm of queries and keys over head_dim (Zhang and Sennrich, 2019): one warp a row, one pass over memory.

#include "attention/norm_cuda.h"

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

bool fits(const RowSpan& rows, Dtype dtype, int width) {
  return is_aligned(rows.data, dtype, rows.batch, width) && rows.head % width == 0 && rows.row % width == 0;
}

}  // namespace

void rms_norm(const RmsNorm& p, Stream stream) {
  const int64_t count = p.batch * p.heads * p.rows;
  if (count == 0) return;
  constexpr int kWide = 4;
  const bool is_wide = p.dim % kWide == 0 && fits(p.x, p.dtype, kWide) && fits(p.y, p.dtype, kWide) &&
                       is_aligned(p.weight, p.dtype, 0, kWide);
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto width) {
      launch<norm_kernel<T, decltype(width)::value>>(
          static_cast<unsigned>((count + kWarps - 1) / kWarps), kThreads, 0, stream, rows_of<const T>(p.x),
          global<const T>(p.weight), rows_of<T>(p.y), count, static_cast<int>(p.heads), static_cast<int>(p.rows),
          static_cast<int>(p.dim), static_cast<float>(p.eps));
    };
    if (is_wide)
      run(std::integral_constant<int, kWide>{});
    else
      run(std::integral_constant<int, 1>{});
  });
}

}  // namespace velm::cuda
