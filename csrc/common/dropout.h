// Which elements of a row dropout keeps, and rows whose last vector is not full.
#pragma once

#include "common/philox.h"
#include "common/tensor.h"
#include "simd/vec.h"

namespace velm::fusion {

using namespace simd;

// Columns that share a block of counters: element c of a row takes word (c % 64) / 16 of counter (c / 64) * 16 + c %
// 16, so that a vector of one word covers neighbouring columns whatever its width, up to 16.
inline constexpr int64_t kBlock = 64, kCounters = 16;
static_assert(kCounters % kLanes == 0);

struct Draw {
  uint64_t seed;
  uint32_t threshold;
  float scale;

  Draw(const Tensor& seed_tensor, double p)
      : seed(static_cast<uint64_t>(*const_data<int64_t>(seed_tensor))),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}
};

template <class T>
VELM_INLINE Vec load_some(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_first(p, static_cast<int>(left));
}
template <class T>
VELM_INLINE void store_some(T* p, Vec x, int64_t left) {
  if (left >= kLanes)
    store(p, x);
  else
    store_first(p, x, static_cast<int>(left));
}

// Calls f(column, elements left, kept) for the vectors of a row.
template <class F>
VELM_INLINE void for_kept(const Draw& draw, int64_t row, int64_t dim, const F& f) {
  for (int64_t block = 0; block < dim; block += kBlock) {
    for (int64_t half = 0; half < kCounters; half += kLanes) {
      if (block + half >= dim) break;
      const auto first = static_cast<uint32_t>(block / kBlock * kCounters + half);
      VecUint words[4] = {
          stdx::static_simd_cast<VecUint>(lane_index()) + first,
          VecUint(static_cast<uint32_t>(row)),
          VecUint(static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32)),
          VecUint(0u),
      };
      simd::philox(words, draw.seed);
      unroll<4>([&](auto k) VELM_INLINE_LAMBDA {
        const int64_t c = block + k * kCounters + half, left = dim - c;
        if (left > 0) f(c, left, simd::at_least(words[k], draw.threshold));
      });
    }
  }
}

}  // namespace velm::fusion
