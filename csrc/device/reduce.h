// Sums over a warp and over a block, in an order that depends on nothing but the number of threads.
#pragma once

#include "device/language.h"

namespace velm::device {

// The sum over groups of `Lanes` neighbouring lanes, in every lane. The whole warp takes part.
template <int Lanes = 32, class T>
DEVICE_INLINE T warp_sum(T value) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T>
struct BlockSum {
  SharedArray<T, 32> of_warp;
};

// The sum over a block of whole warps, in every thread. The storage may be used again after the next barrier.
template <class T>
DEVICE_INLINE T block_sum(T value, BlockSum<T>& storage) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int thread = static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  const int warps = threads / 32, warp = thread / 32, lane = thread % 32;
  value = warp_sum(value);
  if (lane == 0) storage.of_warp[warp] = value;
  __syncthreads();
  value = T(0);
  if (lane < warps) value = storage.of_warp[lane];
  return warp_sum(value);
}

}  // namespace velm::device
