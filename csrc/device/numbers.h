// Element types of tensors, computed with in float.
#pragma once

#include <stdexcept>

#include "device/language.h"
#include "device/view.h"

namespace velm::device {

// Calls f with a value of the type of numbers `dtype`.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float16:
      return f(__half{});
    case Dtype::bfloat16:
      return f(__nv_bfloat16{});
    default:
      break;
  }
  throw std::runtime_error("velm: expected float32, bfloat16 or float16");
}

DEVICE_INLINE float to_float(float x) {
  return x;
}
DEVICE_INLINE float to_float(__half x) {
  return __half2float(x);
}
DEVICE_INLINE float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
DEVICE_INLINE T from_float(float x);
template <>
DEVICE_INLINE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE_INLINE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
DEVICE_INLINE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 2^x to 2 units in the last place, and 0 where that is not a normal number.
DEVICE_INLINE float exp2_approximate(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

}  // namespace velm::device
