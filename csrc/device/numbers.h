// Element types of tensors, computed with in float.
#pragma once

#include "device/language.h"

namespace velm::device {

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

}  // namespace velm::device
