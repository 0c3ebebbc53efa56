// The activations of velm::linear and their derivatives, on vectors.
#pragma once

#include <stdexcept>
#include <string_view>
#include <type_traits>

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

// The derivative is computed from activation(z) for these and from z for the others. Of tanh not in 16 bits: beside a
// value rounded to 1 nothing is left of 1 - tanh^2.
template <Activation A, class T>
inline constexpr bool kFromValue = A == Activation::kRelu || (A == Activation::kTanh && sizeof(T) > 2);

inline constexpr float kHalfLog2E = 0.72134752f;
inline constexpr float kSqrtTwoOverPi = 0.79788456f;
inline constexpr float kInverseSqrtTwoPi = 0.39894228f;
inline constexpr float kGeluCubic = 0.044715f;
inline constexpr float kQuickRate = 1.702f;

VELM_INLINE Vec sigmoid(Vec x) {
  return 1.0f / (1.0f + simd::exp(-x));
}

// The standard normal distribution at -|z|, where it is small and nothing cancels, and exp(-z^2 / 2).
struct NormalTail {
  Vec tail, bell;
};

VELM_INLINE NormalTail normal_tail(Vec z) {
  // Up to there neither is subnormal; from there on both vanish beside z in float32, and are 0, whatever they are
  // multiplied with.
  const Vec size = simd::stdx::abs(z), a = simd::least_keep_nan(size, 12.5f);
  // exp(t^2 / 2) * tail on [0, 5.5], to 3e-8 of max(tail, t * tail)
  const Vec t = simd::least_keep_nan(a, 5.5f);
  const Vec ratio = simd::polynomial(t, -2.442004058e-07f, 6.287181729e-06f, -7.276457848e-05f, 5.074461015e-04f,
                                     -2.429960456e-03f, 8.716888072e-03f, -2.514877621e-02f, 6.170242594e-02f,
                                     -1.327193090e-01f, 2.499556815e-01f, -3.989393456e-01f, 4.999999679e-01f);
  const Vec bell = simd::select(size > 12.5f, simd::zero(), simd::exp2_in_range(kHalfLog2E * a * -a));
  return {bell * ratio, bell};
}

template <Activation A>
VELM_INLINE Vec activate(Vec z) {
  using enum Activation;
  if constexpr (A == kRelu) {
    // the comparison is false for NaN, which stays
    return simd::select(z <= simd::zero(), simd::zero(), z);
  } else if constexpr (A == kGelu) {
    // z Phi(z) = max(z, 0) - |z| Phi(-|z|)
    const Vec a = simd::least_keep_nan(simd::stdx::abs(z), 12.5f);
    // Of -inf it is NaN, -inf times 0.
    return simd::fma(-a, normal_tail(z).tail, simd::select(z <= simd::zero(), z * 0.0f, z));
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

// grad * activation'(z), from what forward saved in type T.
template <Activation A, class T>
VELM_INLINE Vec activation_gradient(Vec grad, Vec saved) {
  using enum Activation;
  if constexpr (A == kRelu) {
    return simd::select(saved <= simd::zero(), simd::zero(), grad);
  } else if constexpr (A == kGelu) {
    const auto [tail, bell] = normal_tail(saved);
    const Vec distribution = simd::select(saved <= simd::zero(), tail, 1.0f - tail);
    // Of an infinity the derivative is NaN, infinity times 0.
    return grad * simd::fma(kInverseSqrtTwoPi * saved, bell, distribution);
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
    const Vec t = kFromValue<A, T> ? saved : simd::tanh(saved);
    return grad * (1.0f - t * t);
  } else {
    return grad;
  }
}

}  // namespace velm::linear
