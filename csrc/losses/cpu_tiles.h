// What the passes over a tile of scores share: vectors of a row, the last of which may have fewer lanes, and labels.
#pragma once

#include <limits>
#include <type_traits>

#include "common/tensor.h"
#include "simd/math.h"
#include "simd/vec.h"

namespace velm {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls f(column, lanes) for the vectors of a row: lanes are a constant, and an int for the last columns.
template <class F>
VELM_INLINE void for_columns(int64_t columns, const F& f) {
  int64_t j = 0;
  for (; j + simd::kLanes <= columns; j += simd::kLanes) f(j, std::integral_constant<int, simd::kLanes>{});
  if (j < columns) f(j, static_cast<int>(columns - j));
}
template <class T, class N>
VELM_INLINE simd::Vec load_some(const T* p, N n) {
  if constexpr (std::is_same_v<N, int>)
    return simd::load_first(p, n);
  else
    return simd::load(p);
}
template <class T, class N>
VELM_INLINE void store_some(T* p, simd::Vec x, N n) {
  if constexpr (std::is_same_v<N, int>)
    simd::store_first(p, x, n);
  else
    simd::store(p, x);
}
// Scores of products: those behind the last column are -inf.
template <class T, class N>
VELM_INLINE simd::Vec scores(const T* p, simd::Vec scale, simd::Vec bias, N n) {
  const simd::Vec z = simd::fma(scale, load_some(p, n), bias);
  if constexpr (std::is_same_v<N, int>)
    return simd::select(simd::first_lanes(n), z, simd::Vec(-kInfinity));
  else
    return z;
}
// Which of the first n of some labels are this one.
VELM_INLINE simd::VecMask same_label(const uint32_t* labels, uint32_t label, int64_t n) {
  simd::VecUint found;
  if (n >= simd::kLanes)
    found = simd::VecUint(labels, simd::stdx::element_aligned);
  else
    found = simd::VecUint([&](auto i) { return static_cast<int64_t>(i) < n ? labels[i] : ~0u; });
  return simd::mask_of(found == simd::VecUint(label));
}

// Tiles of products are float32 or bfloat16.
template <class F>
inline void with_tile(const Tensor& tile, const F& f) {
  if (tile.scalar_type() == ScalarType::BFloat16)
    f(mutable_data<simd::bf16>(tile));
  else
    f(mutable_data<float>(tile));
}

// A scale under which a product can be made a score of -inf, and that product.
inline float usable_scale(float scale) {
  return scale == 0.0f ? 1e-38f : scale;
}
inline float never(float usable_scale) {
  return usable_scale > 0.0f ? -kInfinity : kInfinity;
}

}  // namespace velm
