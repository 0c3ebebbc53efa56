// Loads and stores of single elements under a condition, without a branch.
#pragma once

#include "device/memory.h"

namespace velm::device {

#if defined(__CUDACC__)

// *p, or `otherwise` where the condition does not hold and nothing is read. Without a branch, so that the loads of an
// unrolled loop are on their way together. Of memory that no thread writes while the kernel runs.
template <class T>
DEVICE_INLINE T load_if(bool condition, const T* p, std::type_identity_t<T> otherwise) {
  using W = std::conditional_t<sizeof(T) == 4, unsigned, unsigned short>;
  static_assert(sizeof(T) == 1 || sizeof(T) == sizeof(W));
  union {
    W word;
    T value;
  } u{};
  u.value = otherwise;
  const auto wanted = static_cast<unsigned>(condition);
  if constexpr (sizeof(T) == 4)
    asm("{ .reg .pred q; setp.ne.u32 q, %1, 0; @q ld.global.nc.u32 %0, [%2]; }" : "+r"(u.word) : "r"(wanted), "l"(p));
  else if constexpr (sizeof(T) == 2)
    asm("{ .reg .pred q; setp.ne.u32 q, %1, 0; @q ld.global.nc.u16 %0, [%2]; }" : "+h"(u.word) : "r"(wanted), "l"(p));
  else
    asm("{ .reg .pred q; setp.ne.u32 q, %1, 0; @q ld.global.nc.u8 %0, [%2]; }" : "+h"(u.word) : "r"(wanted), "l"(p));
  return u.value;
}
// *p = value where the condition holds.
template <class T>
DEVICE_INLINE void store_if(bool condition, T* p, std::type_identity_t<T> value) {
  union {
    T value;
    typename Word<sizeof(T)>::type word;
  } u{value};
  const auto wanted = static_cast<unsigned>(condition);
  if constexpr (sizeof(T) == 4)
    asm volatile("{ .reg .pred q; setp.ne.u32 q, %0, 0; @q st.global.u32 [%1], %2; }"
                 :
                 : "r"(wanted), "l"(p), "r"(u.word)
                 : "memory");
  else
    asm volatile("{ .reg .pred q; setp.ne.u32 q, %0, 0; @q st.global.u16 [%1], %2; }"
                 :
                 : "r"(wanted), "l"(p), "h"(u.word)
                 : "memory");
}

#else

template <class T>
DEVICE_INLINE std::remove_const_t<T> load_if(bool condition, const Global<T>& p, std::remove_const_t<T> otherwise) {
  return condition ? std::remove_const_t<T>(p[0]) : otherwise;
}
template <class T>
DEVICE_INLINE void store_if(bool condition, const Global<T>& p, std::type_identity_t<T> value) {
  if (condition) p[0] = value;
}

#endif

}  // namespace velm::device
