// cp.async: copies from global to shared memory that go on while the thread does something else.
#pragma once

#include "device/language.h"

namespace velm::device {

#if defined(__CUDACC__)

// Copies `Bytes` (4, 8 or 16) of which the last Bytes - size are zeros instead. 16 bytes pass by the L1 cache.
template <int Bytes, class T>
DEVICE_INLINE void cp_async(T* to, const T* from, int size = Bytes) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes), "r"(size)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes), "r"(size)
                 : "memory");
}
// The copies since the last commit become a group.
DEVICE_INLINE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread but the latest `Groups`. Other threads see the data after a barrier.
template <int Groups>
DEVICE_INLINE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

#else

template <int Bytes, class T, class From>
DEVICE_INLINE void cp_async(const Shared<T>& to, const From& from, int size = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  using namespace device_on_host;
  if (size < 0 || size > Bytes) fail("cp.async of " + std::to_string(size) + " of " + std::to_string(Bytes) + " bytes");
  PendingCopy copy{to.raw(), Bytes, 0, {}};
  if (size) check_access<Space::global>(from.raw(), static_cast<std::size_t>(size), Bytes, from.extent(), false);
  for (int i = 0; i < size; ++i) copy.data[i] = reinterpret_cast<const unsigned char*>(from.raw())[i];
  check_access<Space::shared>(to.raw(), Bytes, Bytes, to.extent(), true);
  std::memset(to.raw(), 0xff, Bytes);
  async_add(copy);
}
DEVICE_INLINE void cp_async_commit() {
  device_on_host::async_commit();
}
template <int Groups>
DEVICE_INLINE void cp_async_wait() {
  std::size_t count = 0;
  const device_on_host::PendingCopy* due = device_on_host::async_due(Groups, count);
  for (std::size_t i = 0; i < count; ++i) std::memcpy(due[i].to, due[i].data, due[i].bytes);
  device_on_host::async_drop(count);
}

#endif

}  // namespace velm::device
