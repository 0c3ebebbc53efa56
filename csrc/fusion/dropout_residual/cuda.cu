// residual + dropout(x), one pass; the random numbers are drawn again in backward.

#include "fusion/dropout_residual/cuda.h"

#include <type_traits>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/philox.h"

namespace velm::cuda {
namespace {

using namespace device;

// Columns that share counters: element c of a row takes word (c % 64) / 16 of counter (c / 64) * 16 + c % 16.
constexpr int kColumns = 64, kCounters = 16;
constexpr int kThreads = 128;

// A thread draws for `Width` neighbouring counters, that is for four groups of as many columns, 16 apart.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 8)
    dropout_kernel(ReadOnly<T> x, ReadOnly<T> residual, Global<T> out, ReadOnly<int64_t> seed, uint32_t threshold,
                   float scale, int64_t x_stride, int64_t residual_stride, int64_t rows, int64_t dim,
                   unsigned column_blocks) {
  // Along x over the counters of a row, along y over the rows.
  const int64_t row = int64_t{blockIdx.x / column_blocks} * blockDim.y + threadIdx.y;
  const int64_t first = (int64_t{blockIdx.x % column_blocks} * blockDim.x + threadIdx.x) * Width;
  if (row >= rows) return;
  const int64_t column = first / kCounters * kColumns + first % kCounters;
  if (column >= dim) return;
  uint32_t words[Width][4];
  const auto key = static_cast<uint64_t>(seed[0]);
#pragma unroll
  for (int k = 0; k < Width; ++k) {
    words[k][0] = static_cast<uint32_t>(first + k);
    words[k][1] = static_cast<uint32_t>(row);
    words[k][2] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
    words[k][3] = 0;
    philox(words[k], key);
  }
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    const int64_t at = column + group * kCounters;
    if (at >= dim) return;
    const auto value = load<Width>(x + (row * x_stride + at));
    Vector<T, Width> added{}, result;
    if (residual) added = load<Width>(residual + (row * residual_stride + at));
#pragma unroll
    for (int k = 0; k < Width; ++k) {
      const float kept = words[k][group] >= threshold ? to_float(value[k]) * scale : 0.0f;
      result[k] = from_float<T>(residual ? kept + to_float(added[k]) : kept);
    }
    store(out + (row * dim + at), result);
  }
}

}  // namespace

void dropout_residual(const DropoutResidual& p, Stream stream) {
  const int64_t rows = p.x.size[2], dim = p.x.size[3];
  if (rows == 0 || dim == 0) return;
  constexpr int kVector = 4;
  const bool fits =
      dim % kVector == 0 && is_aligned(p.x, kVector) && is_aligned(p.residual, kVector) && is_aligned(p.out, kVector);
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto w) {
      constexpr int kWidth = decltype(w)::value;
      const int64_t threads_a_row = (dim + kColumns - 1) / kColumns * (kCounters / kWidth);
      unsigned along = 1;
      while (along < kThreads && along < threads_a_row) along *= 2;
      const int64_t column_blocks = (threads_a_row + along - 1) / along;
      const dim3 block(along, kThreads / along);
      launch<dropout_kernel<T, kWidth>>(
          static_cast<unsigned>((rows + block.y - 1) / block.y * column_blocks), block, 0, stream, global<const T>(p.x),
          global<const T>(p.residual), global<T>(p.out), global<const int64_t>(p.seed),
          static_cast<uint32_t>(p.dropout_p * 4294967296.0), static_cast<float>(1.0 / (1.0 - p.dropout_p)),
          p.x.stride[2], p.residual.stride[2], rows, dim, static_cast<unsigned>(column_blocks));
    };
    if (fits)
      run(std::integral_constant<int, kVector>{});
    else
      run(std::integral_constant<int, 1>{});
  });
}

}  // namespace velm::cuda
