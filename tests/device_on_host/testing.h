// Tests of the execution model: a program runs the tests named on its command line, or lists them.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "device/launch.h"
#include "device/memory.h"

namespace testing {

using device_on_host::options;
using velm::device::View;

std::map<std::string, std::function<void()>>& tests();

struct Registration {
  Registration(const char* name, std::function<void()> run) { tests()[name] = std::move(run); }
};

#define TEST(name)                                                            \
  static void test_##name();                                                  \
  static const testing::Registration registration_##name(#name, test_##name); \
  static void test_##name()

[[noreturn]] inline void failed(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  std::exit(1);
}

#define CHECK(condition) \
  if (!(condition)) testing::failed(__FILE__, __LINE__, #condition)

// The message of the Fault that `f` must end with.
template <class F>
std::string fault_of(const F& f) {
  try {
    f();
  } catch (const device_on_host::Fault& fault) {
    return fault.what();
  }
  return "no fault";
}

#define CHECK_FAULT(f, expected)                                                                 \
  if (const std::string found = testing::fault_of(f); found.find(expected) == std::string::npos) \
  testing::failed(__FILE__, __LINE__, "expected a fault with\n  " + std::string(expected) + "\ngot\n  " + found)

template <class T>
constexpr velm::device::Dtype dtype_of() {
  using velm::device::Dtype;
  if constexpr (std::is_same_v<T, __half>) return Dtype::float16;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return Dtype::bfloat16;
  if constexpr (std::is_integral_v<T>)
    return sizeof(T) == 1 ? Dtype::boolean : sizeof(T) == 4 ? Dtype::int32 : Dtype::int64;
  return Dtype::float32;
}
// Contiguous: a row of all values, or what these sizes say.
template <class T>
View view(std::vector<T>& values, std::initializer_list<int64_t> sizes) {
  View view{values.data(), values.size() * sizeof(T), dtype_of<T>()};
  std::copy_backward(sizes.begin(), sizes.end(), view.size + 4);
  int64_t stride = 1;
  for (int i = 3; i >= 0; stride *= view.size[i--]) view.stride[i] = view.size[i] == 1 ? 0 : stride;
  return view;
}
template <class T>
View view(std::vector<T>& values) {
  return view(values, {static_cast<int64_t>(values.size())});
}
template <class T>
velm::device::Global<T> global(std::vector<T>& values) {
  return velm::device::global<T>(View{values.data(), values.size() * sizeof(T)});
}

inline uint32_t random_bits() {
  static uint64_t state = 0x9E3779B97F4A7C15u;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}
// In [-1, 1), with few enough bits to be exact in every type.
inline float random_number() {
  return static_cast<float>(static_cast<int>(random_bits() % 128) - 64) / 64;
}

}  // namespace testing
