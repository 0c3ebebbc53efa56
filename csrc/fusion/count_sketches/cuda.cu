// Count sketches, gathered: a thread takes a bucket of some rows and adds its features in their order, without atomics.

#include "fusion/count_sketches/cuda.h"

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128, kRows = 8;

template <class T>
__global__ void __launch_bounds__(kThreads)
    count_sketch_kernel(ReadOnly<T> x, ReadOnly<int> order, ReadOnly<float> sign, Global<float> out, int64_t rows,
                        int64_t features, int64_t dim, int64_t stride, unsigned column_blocks) {
  const int64_t bucket = int64_t{blockIdx.x % column_blocks} * kThreads + threadIdx.x;
  if (bucket >= dim) return;
  const int64_t first = int64_t{blockIdx.x / column_blocks} * kRows;
  const int begin = order[features + bucket], end = order[features + bucket + 1];
  float sum[kRows] = {};
  for (int k = begin; k < end; ++k) {
    const int feature = order[k];
    const float factor = sign[feature];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (first + r < rows) sum[r] = fmaf(factor, to_float(x[(first + r) * stride + feature]), sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (first + r < rows) out[(first + r) * dim + bucket] = sum[r];
}

}  // namespace

void count_sketch(const CountSketch& p, Stream stream) {
  const int64_t rows = p.x.size[2], features = p.x.size[3], dim = p.out.size[3];
  if (rows == 0) return;
  const auto column_blocks = static_cast<unsigned>((dim + kThreads - 1) / kThreads);
  const auto row_blocks = static_cast<unsigned>((rows + kRows - 1) / kRows);
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    launch<count_sketch_kernel<T>>(row_blocks * column_blocks, kThreads, 0, stream, global<const T>(p.x),
                                   global<const int>(p.order), global<const float>(p.sign), global<float>(p.out), rows,
                                   features, dim, p.x.stride[2], column_blocks);
  });
}

}  // namespace velm::cuda
