// Rows of the result as weighted sums of rows of the input, by index: a warp takes a row of the result, 16 bytes per
// lane where rows begin at multiples of them.

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "pooling/gather_rows/cuda.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int kWarps = 4;

struct Shape {
  int64_t rows, dim, entries, out_rows, all_rows, batch_stride, row_stride;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(32 * kWarps)
    gather_rows_kernel(ReadOnly<T> x, ReadOnly<int32_t> index, ReadOnly<int32_t> offsets, ReadOnly<float> weight,
                       Global<T> out, Shape shape) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (row >= shape.all_rows) return;
  const int64_t batch = row / shape.out_rows, m = row % shape.out_rows;
  int64_t first = m, last = m + 1;
  if (offsets) {
    const int64_t at = batch * (shape.out_rows + 1) + m;
    first = offsets[at] < 0 ? 0 : offsets[at];
    last = offsets[at + 1] > shape.entries ? shape.entries : offsets[at + 1];
  }
  for (int64_t c = int64_t{threadIdx.x} * kWidth; c < shape.dim; c += 32 * kWidth) {
    float sum[kWidth] = {};
    for (int64_t e = first; e < last; ++e) {
      const int64_t from = index[batch * shape.entries + e];
      if (from < 0 || from >= shape.rows) continue;
      const auto values = load<kWidth>(x + (batch * shape.batch_stride + from * shape.row_stride + c));
      const float w = weight ? float{weight[batch * shape.entries + e]} : 1.0f;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(to_float(values[i]), w, sum[i]);
    }
    Vector<T, kWidth> result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result[i] = from_float<T>(sum[i]);
    store(out + (row * shape.dim + c), result);
  }
}

}  // namespace

void gather_rows(const GatherRows& p, Stream stream) {
  const int64_t batch = p.x.size[1], dim = p.x.size[3], out_rows = p.out.size[2];
  const Shape shape{p.x.size[2], dim, p.index.size[3], out_rows, batch * out_rows, p.x.stride[1], p.x.stride[2]};
  if (shape.all_rows == 0 || dim == 0) return;
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const auto run = [&](auto width) {
      launch<gather_rows_kernel<T, width()>>(static_cast<unsigned>((shape.all_rows + kWarps - 1) / kWarps),
                                             dim3(32, kWarps), 0, stream, global<const T>(p.x),
                                             global<const int32_t>(p.index), global<const int32_t>(p.offsets),
                                             global<const float>(p.weight), global<T>(p.out), shape);
    };
    const bool fits = dim % kVector == 0 && is_aligned(p.x, kVector) && is_aligned(p.out, kVector);
    fits ? run(std::integral_constant<int, kVector>{}) : run(std::integral_constant<int, 1>{});
  });
}

}  // namespace velm::cuda
