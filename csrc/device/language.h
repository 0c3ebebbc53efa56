// What every kernel includes. nvcc finds CUDA here; any other compiler finds the same language for threads of the host
// (device_on_host), in which pointers know what they point into.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define DEVICE_INLINE __device__ __forceinline__

namespace velm::device {

template <class T>
using Global = T*;
// Of memory that no thread writes while the kernel runs.
template <class T>
using ReadOnly = const T* __restrict__;
template <class T>
using Shared = T*;

template <class T, int... Sizes>
struct ArrayOf {
  using type = T;
};
template <class T, int Size, int... Rest>
struct ArrayOf<T, Size, Rest...> {
  using type = typename ArrayOf<T, Rest...>::type[Size];
};
template <class T, int... Sizes>
using SharedArray = typename ArrayOf<T, Sizes...>::type;

// The `Storage` of the running block: one struct with all shared memory of a kernel. Static memory is limited to
// 48 KiB; dynamic memory is what the launch asked for.
template <class Storage>
DEVICE_INLINE Storage& static_shared() {
  __shared__ Storage storage;
  return storage;
}
extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
template <class Storage>
DEVICE_INLINE Storage& dynamic_shared() {
  return *reinterpret_cast<Storage*>(dynamic_shared_bytes);
}

template <class U, class T>
DEVICE_INLINE U* pointer_cast(T* p) {
  return reinterpret_cast<U*>(p);
}

// What a barrier other than __syncthreads is for: `threads`, a multiple of 32, take part, some perhaps without waiting.
DEVICE_INLINE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE_INLINE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace velm::device

#else

#include "device_on_host/language.h"

#define DEVICE_INLINE inline __attribute__((always_inline))

namespace velm::device {

template <class T>
using Global = device_on_host::Pointer<T, device_on_host::Space::global>;
template <class T>
using ReadOnly = device_on_host::Pointer<const T, device_on_host::Space::global>;
template <class T>
using Shared = device_on_host::Pointer<T, device_on_host::Space::shared>;
template <class T, int... Sizes>
using SharedArray = device_on_host::SharedArray<T, Sizes...>;

template <class Storage>
inline Storage& static_shared() {
  static_assert(sizeof(Storage) <= 48 * 1024, "static shared memory ends at 48 KiB");
  static const char key = 0;
  return *static_cast<Storage*>(device_on_host::static_shared_memory(&key, sizeof(Storage)));
}
template <class Storage>
inline Storage& dynamic_shared() {
  return *static_cast<Storage*>(device_on_host::dynamic_shared_memory(sizeof(Storage)));
}

template <class U, class T, device_on_host::Space S>
inline device_on_host::Pointer<U, S> pointer_cast(const device_on_host::Pointer<T, S>& p) {
  return p.template as<U>();
}

inline void named_barrier_sync(int id, int threads) {
  device_on_host::barrier_wait(id, threads, false, true);
}
inline void named_barrier_arrive(int id, int threads) {
  device_on_host::barrier_wait(id, threads, false, false);
}

}  // namespace velm::device

#endif
