// Pointers to global and shared memory that know the array they point into. Where nvcc compiles a kernel they are raw
// pointers (device/language.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "device_on_host/runtime.h"

namespace device_on_host __attribute__((visibility("default"))) {

  enum class Space : uint8_t { global, shared };

  struct Extent {
    const char* begin;
    std::size_t bytes;

    // What lies before the beginning is far behind the end as an unsigned number.
    bool holds(const void* at, std::size_t wanted) const {
      const auto offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(begin);
      return offset <= bytes && bytes - offset >= wanted;
    }
  };

  [[noreturn, gnu::cold, gnu::noinline]] void bad_access(Space space, const void* at, std::size_t bytes,
                                                         std::size_t alignment, const Extent& extent, bool writes);
  [[noreturn, gnu::cold, gnu::noinline]] void bad_index(long long index, long long size);

  template <Space S>
  [[gnu::always_inline]] inline void check_access(const void* at, std::size_t bytes, std::size_t alignment,
                                                  const Extent& extent, bool writes) {
    if (!extent.holds(at, bytes) || reinterpret_cast<uintptr_t>(at) % alignment) [[unlikely]]
      bad_access(S, at, bytes, alignment, extent, writes);
    if constexpr (S == Space::global)
      (writes ? self->counters->global_bytes_written : self->counters->global_bytes_read) += bytes;
    else if (self->watches_banks) [[unlikely]]
      note_shared_access(at, static_cast<unsigned>(bytes));
  }

  // Several elements that one instruction reads or writes, aligned to their size.
  template <class V, Space S>
  [[gnu::always_inline]] inline V load_checked(const void* at, const Extent& extent) {
    check_access<S>(at, sizeof(V), alignof(V), extent, false);
    V value;
    __builtin_memcpy(&value, __builtin_assume_aligned(at, alignof(V)), sizeof(V));
    return value;
  }
  template <class V, Space S>
  [[gnu::always_inline]] inline void store_checked(void* at, const Extent& extent, const V& value) {
    check_access<S>(at, sizeof(V), alignof(V), extent, true);
    __builtin_memcpy(__builtin_assume_aligned(at, alignof(V)), &value, sizeof(V));
  }

  // The 16 bytes that ldmatrix reads in the name of this lane.
  inline void check_matrix_row(const void* at, const Extent& extent) {
    if (!extent.holds(at, 16) || reinterpret_cast<uintptr_t>(at) % 16)
      bad_access(Space::shared, at, 16, 16, extent, false);
    note_read_16(at);
  }

  template <class T, Space S>
  class Pointer;

  // An element that can be assigned to. It must be used where it is named: `auto x = a[i]` would hold a value on the
  // device and would follow the array here, so what is kept of a reference refuses to be read.
  template <class T, Space S>
  class Reference {
   public:
    Reference(T* at, const Extent& extent) : at_(at), extent_(extent) {}
    Reference(const Reference&) = default;

    operator T() const&& { return load_checked<T, S>(at_, extent_); }
    T operator=(T value) const&& {
      store_checked<T, S>(at_, extent_, value);
      return value;
    }
    T operator=(const Reference& other) const&& {
      const T value = load_checked<T, S>(other.at_, other.extent_);
      store_checked<T, S>(at_, extent_, value);
      return value;
    }
    T operator+=(T value) const&& {
      return change([&](T old) { return static_cast<T>(old + value); });
    }
    T operator-=(T value) const&& {
      return change([&](T old) { return static_cast<T>(old - value); });
    }
    T operator*=(T value) const&& {
      return change([&](T old) { return static_cast<T>(old * value); });
    }
    Pointer<T, S> operator&() const&& { return Pointer<T, S>(at_, extent_); }

   private:
    template <class F>
    T change(const F& f) const {
      const T value = f(load_checked<T, S>(at_, extent_));
      store_checked<T, S>(at_, extent_, value);
      return value;
    }

    T* at_;
    Extent extent_;
  };

  template <class T, Space S>
  class Pointer {
   public:
    using Value = std::remove_const_t<T>;

    Pointer() = default;
    Pointer(std::nullptr_t) {}
    Pointer(T* at, const Extent& extent) : at_(at), extent_(extent) {}
    template <class U>
      requires(std::is_same_v<const U, T> && !std::is_const_v<U>)
    Pointer(const Pointer<U, S>& other) : at_(other.raw()), extent_(other.extent()) {}

    // What a kernel that only reads gets is the value itself.
    [[gnu::always_inline]] decltype(auto) operator[](std::ptrdiff_t i) const {
      if constexpr (std::is_const_v<T>)
        return load_checked<Value, S>(at_ + i, extent_);
      else
        return Reference<T, S>(at_ + i, extent_);
    }
    [[gnu::always_inline]] decltype(auto) operator*() const { return (*this)[0]; }

    Pointer operator+(std::ptrdiff_t n) const { return Pointer(at_ + n, extent_); }
    Pointer operator-(std::ptrdiff_t n) const { return Pointer(at_ - n, extent_); }
    Pointer& operator+=(std::ptrdiff_t n) {
      at_ += n;
      return *this;
    }
    Pointer& operator-=(std::ptrdiff_t n) {
      at_ -= n;
      return *this;
    }
    Pointer& operator++() { return *this += 1; }
    std::ptrdiff_t operator-(const Pointer& other) const { return at_ - other.at_; }
    bool operator==(const Pointer& other) const { return at_ == other.at_; }
    bool operator==(std::nullptr_t) const { return at_ == nullptr; }
    explicit operator bool() const { return at_ != nullptr; }

    // The same address as another type of element.
    template <class U>
    Pointer<U, S> as() const {
      return Pointer<U, S>(reinterpret_cast<U*>(at_), extent_);
    }

    T* raw() const { return at_; }
    const Extent& extent() const { return extent_; }

   private:
    T* at_ = nullptr;
    Extent extent_{nullptr, 0};
  };

  // One index into an array of several dimensions; the last gives the element.
  template <class T, int... Sizes>
  class Row;

  template <class T, int Size, int... Rest>
  class Row<T, Size, Rest...> {
   public:
    Row(T* at, const Extent& extent) : at_(at), extent_(extent) {}

    [[gnu::always_inline]] auto operator[](std::ptrdiff_t i) const {
      if (i < 0 || i >= Size) [[unlikely]]
        bad_index(i, Size);
      if constexpr (sizeof...(Rest) == 0)
        return Reference<T, Space::shared>(at_ + i, extent_);
      else
        return Row<T, Rest...>(at_ + i * (Rest * ...), extent_);
    }
    operator Pointer<T, Space::shared>() const
      requires(sizeof...(Rest) == 0)
    {
      return Pointer<T, Space::shared>(at_, extent_);
    }

   private:
    T* at_;
    Extent extent_;
  };

  // An array inside a struct in shared memory, with the layout of T[Size][Rest]...
  template <class T, int Size, int... Rest>
  struct SharedArray {
    T data[Size * (Rest * ... * 1)];

    [[gnu::always_inline]] auto operator[](std::ptrdiff_t i) { return Row<T, Size, Rest...>(data, extent())[i]; }
    operator Pointer<T, Space::shared>()
      requires(sizeof...(Rest) == 0)
    {
      return Pointer<T, Space::shared>(data, extent());
    }
    Extent extent() const { return {reinterpret_cast<const char*>(data), sizeof data}; }
  };

}  // namespace device_on_host
