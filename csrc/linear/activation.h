// The activations of velm::linear and their derivatives, on vectors.
#pragma once

#include <stdexcept>
#include <string_view>

#include "simd/math.h"
#include "simd/vec.h"

namespace velm::linear {

using simd::Vec;

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kQuickGelu, kSilu, kTanh };

// Calls f with the activation as a type, so that loops over elements contain no choice.
template <class F>
inline auto with_activation(std::string_view name, F&& f) {
  using enum Activation;
  if (name.empty()) return f(std::integral_constant<Activation, kNone>{});
  if (name == "relu") return f(std::integral_constant<Activation, kRelu>{});
  if (name == "gelu") return f(std::integral_constant<Activation, kGelu>{});
  if (name == "gelu_tanh") return f(std::integral_constant<Activation, kGeluTanh>{});
  if (name == "quick_gelu") return f(std::integral_constant<Activation, kQuickGelu>{});
  if (name == "silu") return f(std::integral_constant<Activation, kSilu>{});
  if (name == "tanh") return f(std::integral_constant<Activation, kTanh>{});
  throw std::runtime_error("velm: unknown activation");
}

// The derivative is computed from activation(z) for these and from z for the others.
template <Activation A>
inline constexpr bool kFromOutput = A == Activation::kRelu;

inline constexpr float kSqrtHalf = 0.70710678f;
inline constexpr float kSqrtTwoOverPi = 0.79788456f;
inline constexpr float kInverseSqrtTwoPi = 0.39894228f;
inline constexpr float kGeluCubic = 0.044715f;
inline constexpr float kQuickRate = 1.702f;

VELM_INLINE Vec sigmoid(Vec x) {
  return 1.0f / (1.0f + simd::exp(-x));
}

template <Activation A>
VELM_INLINE Vec activate(Vec z) {
  using enum Activation;
  if constexpr (A == kRelu) {
    // the comparison is false for NaN, which stays
    return simd::select(z <= simd::zero(), simd::zero(), z);
  } else if constexpr (A == kGelu) {
    return 0.5f * z * (1.0f + simd::erf(z * kSqrtHalf));
  } else if constexpr (A == kGeluTanh) {
    const Vec inner = kSqrtTwoOverPi * z * simd::fma(z * z, Vec(kGeluCubic), Vec(1.0f));
    return 0.5f * z * (1.0f + simd::tanh(inner));
  } else if constexpr (A == kQuickGelu) {
    return z * sigmoid(kQuickRate * z);
  } else if constexpr (A == kSilu) {
    return z * sigmoid(z);
  } else if constexpr (A == kTanh) {
    return simd::tanh(z);
  } else {
    return z;
  }
}

// grad * activation'(z), from what forward saved.
template <Activation A>
VELM_INLINE Vec activation_gradient(Vec grad, Vec saved) {
  using enum Activation;
  if constexpr (A == kRelu) {
    return simd::select(saved <= simd::zero(), simd::zero(), grad);
  } else if constexpr (A == kGelu) {
    const Vec density = kInverseSqrtTwoPi * simd::exp(-0.5f * saved * saved);
    const Vec distribution = 0.5f * (1.0f + simd::erf(saved * kSqrtHalf));
    return grad * simd::fma(saved, density, distribution);
  } else if constexpr (A == kGeluTanh) {
    const Vec square = saved * saved;
    const Vec t = simd::tanh(kSqrtTwoOverPi * saved * simd::fma(square, Vec(kGeluCubic), Vec(1.0f)));
    const Vec slope = kSqrtTwoOverPi * simd::fma(square, Vec(3.0f * kGeluCubic), Vec(1.0f));
    return grad * (0.5f * (1.0f + t) + 0.5f * saved * (1.0f - t * t) * slope);
  } else if constexpr (A == kQuickGelu || A == kSilu) {
    const float rate = A == kQuickGelu ? kQuickRate : 1.0f;
    const Vec s = sigmoid(rate * saved);
    return grad * s * simd::fma(rate * saved, 1.0f - s, Vec(1.0f));
  } else if constexpr (A == kTanh) {
    const Vec t = simd::tanh(saved);
    return grad * (1.0f - t * t);
  } else {
    return grad;
  }
}

}  // namespace velm::linear
