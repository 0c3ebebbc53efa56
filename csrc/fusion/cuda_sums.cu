// Sums of a few rows, in float32 and in their order.

#include "fusion/cuda_sums.h"

#include <algorithm>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kAcross = 32, kDown = kThreads / kAcross;
struct SumStorage {
  SharedArray<float, kDown, kAcross> sums;
};

// The sum of `count` rows, and of the bias that every `period` elements have.
template <class From, class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(ReadOnly<From> partials, ReadOnly<T> bias, Global<T> to, int64_t count, int64_t stride,
                        int64_t elements, int period) {
  auto& shared = static_shared<SumStorage>();
  const int64_t at = int64_t{blockIdx.x} * kAcross + threadIdx.x;
  float sum = 0.0f;
  if (at < elements)
    for (int64_t part = threadIdx.y; part < count; part += kDown) sum += to_float(partials[part * stride + at]);
  shared.sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || at >= elements) return;
  for (int i = 1; i < kDown; ++i) {
    const float more = shared.sums[i][threadIdx.x];
    sum += more;
  }
  if (bias) sum += to_float(bias[at % period]);
  to[at] = from_float<T>(sum);
}

template <class From, class T>
void add(const View& partials, const View& bias, const View& to, int64_t count, int64_t stride, Stream stream) {
  const int64_t elements = to.numel();
  if (elements == 0) return;
  launch<sum_partials_kernel<From, T>>(static_cast<unsigned>((elements + kAcross - 1) / kAcross), dim3(kAcross, kDown),
                                       0, stream, global<const From>(partials), global<const T>(bias), global<T>(to),
                                       count, stride, elements, static_cast<int>(std::max<int64_t>(1, bias.numel())));
}

}  // namespace

void sum_parts(const View& partials, const View& bias, const View& to, int64_t parts, Stream stream) {
  with_type(to.dtype, [&](auto t) { add<float, decltype(t)>(partials, bias, to, parts, to.numel(), stream); });
}

void sum_rows(const View& rows, const View& to, Stream stream) {
  with_type(rows.dtype, [&](auto t) {
    using T = decltype(t);
    add<T, T>(rows, {}, to, rows.size[2], rows.stride[2], stream);
  });
}

}  // namespace velm::cuda
