// The gradient of an additive bias, summed over the dimensions it is broadcast along.
#pragma once

#include "attention/cross_attention/cpu_panel.h"

namespace velm::attention {

// Adds ds[i * V * kLanes + lane], keys first + i, to the slices of grad_bias (contiguous, sizes `size`) that the
// panel's rows belong to.
template <int V>
void add_bias_gradient(float* grad_bias, const int64_t (&size)[4], const Panel& panel, const float* ds, int64_t first,
                       int64_t n) {
  constexpr int kWidth = V * kLanes;
  const auto row = [&](int l) {
    const int64_t b = size[0] > 1 ? panel.b : 0, h = size[1] > 1 ? panel.head[l] : 0;
    const int64_t i = size[2] > 1 ? panel.query[l] : 0;
    return grad_bias + ((b * size[1] + h) * size[2] + i) * size[3];
  };
  if (size[3] == 1) {
    for (int v = 0; v < V; ++v) {
      simd::Vec sum = simd::zero();
      for (int64_t i = 0; i < n; ++i) sum += simd::load(ds + i * kWidth + v * kLanes);
      for (int l = 0; l < kLanes && v * kLanes + l < panel.count; ++l) *row(v * kLanes + l) += sum[l];
    }
    return;
  }
  float* to_row[kPanel];
  for (int l = 0; l < V * kLanes; ++l) to_row[l] = row(l) + first;
  for (int v = 0; v < V; ++v) {
    const int lanes = std::min(kLanes, panel.count - v * kLanes);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int width = static_cast<int>(std::min<int64_t>(n - i, kLanes));
      simd::Vec block[kLanes];
      if (width == kLanes && lanes == kLanes) {
        simd::unroll<kLanes>([&](auto j)
                                 VELM_INLINE_LAMBDA { block[j] = simd::load(ds + (i + j) * kWidth + v * kLanes); });
        simd::transpose(block);
        simd::unroll<kLanes>([&](auto l) VELM_INLINE_LAMBDA {
          float* to = to_row[v * kLanes + l] + i;
          simd::store(to, simd::load(to) + block[l]);
        });
        continue;
      }
      for (int j = 0; j < kLanes; ++j)
        block[j] = j < width ? simd::load(ds + (i + j) * kWidth + v * kLanes) : simd::zero();
      simd::transpose(block);
      for (int l = 0; l < lanes; ++l) {
        float* to = to_row[v * kLanes + l] + i;
        simd::store_first(to, simd::load_first(to, width) + block[l], width);
      }
    }
  }
}

}  // namespace velm::attention
