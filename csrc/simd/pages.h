// Large results in large pages.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace velm::simd {

// Asks for pages of 2 MiB where [data, data + bytes) covers some that were not touched yet. Memory fresh from the
// system is otherwise cleared 4 KiB at a time, each with a fault of its own: for a weight gradient of 256 MiB that
// takes longer than the products that fill it. A hint: without effect where the system has no such pages or always uses
// them.
inline void prefer_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  // Asking the system for fewer pages takes as long as touching them.
  if (end >= begin + 4 * kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace velm::simd
