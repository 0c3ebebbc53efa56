// Work distribution. What an item computes may depend on its index alone, never on the range it
// arrives in or on the thread count: that is what makes results the same for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace velm::simd {

// Calls f(item) for every item in [0, items). Threads get contiguous ranges.
template <class F>
inline void parallel_items(int64_t items, const F& f) {
  if (items <= 0) return;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Calls f(begin, end) on disjoint ranges covering [0, items), at least `grain` items each: for
// element-wise work, and where a thread wants scratch memory once for all its items.
template <class F>
inline void parallel_ranges(int64_t items, int64_t grain, const F& f) {
  if (items <= 0) return;
  torch::stable::parallel_for(0, items, grain < 1 ? 1 : grain, f);
}

}  // namespace velm::simd
