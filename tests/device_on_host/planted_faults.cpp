// What the runtime cannot see and a sanitizer must: each of these ends the program of the sanitizer it is for.

#include "tests/device_on_host/testing.h"

using namespace velm::device;
using namespace testing;

namespace {

struct Exchange {
  SharedArray<int, 64> values;
};

template <bool HasBarrier>
__global__ void exchange(Global<int> out) {
  auto& shared = static_shared<Exchange>();
  shared.values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (HasBarrier) __syncthreads();
  out[threadIdx.x] = shared.values[63 - threadIdx.x];
}

template <bool HasSyncwarp>
__global__ void exchange_in_warps(Global<int> out) {
  auto& shared = static_shared<Exchange>();
  shared.values[threadIdx.x] = static_cast<int>(threadIdx.x);
  // Lanes meet here, but a shuffle orders no memory.
  const int value = __shfl_xor_sync(~0u, 1, 1);
  if (HasSyncwarp) __syncwarp();
  out[threadIdx.x] = shared.values[threadIdx.x ^ 1] + value;
}

template <bool HasSecondBarrier>
__global__ void reuse(Global<int> out) {
  auto& shared = static_shared<Exchange>();
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    shared.values[threadIdx.x] = i;
    __syncthreads();
    sum += shared.values[63 - threadIdx.x];
    if (HasSecondBarrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool Atomic>
__global__ void add_from_blocks(Global<int> total) {
  // Another thread in each block: what one thread of the host does in two blocks has an order.
  if (threadIdx.x != blockIdx.x) return;
  if (Atomic)
    atomicAdd(total, 1);
  else
    total[0] += 1;
}

__global__ void raw_global(int* p, int index) {
  p[index] = 1;
}
__global__ void raw_shared(int offset) {
  reinterpret_cast<unsigned char*>(&static_shared<Exchange>())[offset] = 1;
}
__global__ void local_array(Global<int> out, int index) {
  int values[4] = {1, 2, 3, 4};
  __syncthreads();
  // The compiler, and with it UBSan, forgets what the pointer points into.
  int* p = values;
  asm volatile("" : "+r"(p)::"memory");
  out[threadIdx.x] = p[index];
}
__global__ void shift(Global<int> out, int by) {
  out[threadIdx.x] = 1 << by;
}

}  // namespace

#define PLANTED(name, ...)                       \
  TEST(planted_##name) {                         \
    std::vector<int> out(64);                    \
    [[maybe_unused]] const auto g = global(out); \
    __VA_ARGS__;                                 \
  }

PLANTED(missing_barrier, launch<exchange<false>>(1, 64, 0, nullptr, g))
PLANTED(missing_syncwarp, launch<exchange_in_warps<false>>(1, 64, 0, nullptr, g))
PLANTED(missing_second_barrier, launch<reuse<false>>(1, 64, 0, nullptr, g))
PLANTED(race_between_blocks, launch<add_from_blocks<false>>(3, 32, 0, nullptr, g))
PLANTED(global_overflow, launch<raw_global>(1, 1, 0, nullptr, out.data(), 64))
PLANTED(shared_overflow, launch<raw_shared>(1, 1, 0, nullptr, 256))
PLANTED(stack_overflow, launch<local_array>(1, 64, 0, nullptr, g, 4))
PLANTED(shift, launch<shift>(1, 1, 0, nullptr, g, 32))

// The same kernels without their faults.
TEST(sound_kernels) {
  std::vector<int> out(64);
  const auto g = global(out);
  launch<exchange<true>>(2, 64, 0, nullptr, g);
  CHECK(out[5] == 58);
  launch<exchange_in_warps<true>>(2, 64, 0, nullptr, g);
  CHECK(out[5] == 5);
  launch<reuse<true>>(2, 64, 0, nullptr, g);
  CHECK(out[5] == 3);
  out[0] = 0;
  launch<add_from_blocks<true>>(3, 32, 0, nullptr, g);
  CHECK(out[0] == 3);
  launch<raw_global>(1, 1, 0, nullptr, out.data(), 63);
  launch<raw_shared>(1, 1, 0, nullptr, 255);
  launch<local_array>(1, 64, 0, nullptr, g, 3);
  CHECK(out[0] == 4);
  launch<shift>(1, 1, 0, nullptr, g, 30);
}
