// Global memory as launchers receive it, and the loads and stores of several elements at once.
#pragma once

#include "device/language.h"
#include "device/view.h"

namespace velm::device {

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert((N & (N - 1)) == 0 && sizeof(T) * N <= 16, "one instruction moves 1, 2, 4, 8 or 16 bytes");
  T values[N];
  DEVICE_INLINE T& operator[](int i) { return values[i]; }
  DEVICE_INLINE const T& operator[](int i) const { return values[i]; }
};

#if defined(__CUDACC__)

template <class T>
inline T* global(const View& view) {
  return static_cast<T*>(view.data);
}

template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <int N, class T>
DEVICE_INLINE auto load(T* p) {
  using Value = std::remove_const_t<T>;
  using W = typename Word<sizeof(T) * N>::type;
  union {
    W word;
    Vector<Value, N> vector;
  } u{*reinterpret_cast<const W*>(p)};
  return u.vector;
}
template <int N, class T>
DEVICE_INLINE void store(T* p, const Vector<T, N>& vector) {
  using W = typename Word<sizeof(T) * N>::type;
  union {
    Vector<T, N> vector;
    W word;
  } u{vector};
  *reinterpret_cast<W*>(p) = u.word;
}

#else

template <class T>
inline Global<T> global(const View& view) {
  return Global<T>(static_cast<T*>(view.data), {static_cast<const char*>(view.data), view.bytes});
}

template <int N, class T, device_on_host::Space S>
DEVICE_INLINE auto load(const device_on_host::Pointer<T, S>& p) {
  return device_on_host::load_checked<Vector<std::remove_const_t<T>, N>, S>(p.raw(), p.extent());
}
template <int N, class T, device_on_host::Space S>
DEVICE_INLINE void store(const device_on_host::Pointer<T, S>& p, const Vector<T, N>& vector) {
  device_on_host::store_checked<Vector<T, N>, S>(p.raw(), p.extent(), vector);
}

#endif

}  // namespace velm::device
