// Work distribution. What an item computes may depend on its index alone, never on the range it
// arrives in or on the thread count: that is what makes results the same for any number of threads.
#pragma once

#include <immintrin.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

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

// While one is alive, results of this thread that would be subnormal are zero. Processors compute those in microcode,
// at 20 to 40 times the cost of a vector operation, and the exponential of a masked score underflows every time.
class FlushSubnormals {
 public:
  FlushSubnormals() { _mm_setcsr(before_ | kFlushToZero); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  unsigned before_ = _mm_getcsr();
};

// Calls run(worker, item) for every item in [0, items), with one make_worker() a thread. A thread goes through a
// contiguous share of the items in order and then helps with the shares of the others: items may differ in cost, and
// processors in speed.
template <class MakeWorker, class Run>
inline void parallel_workers(int64_t items, const MakeWorker& make_worker, const Run& run) {
  if (items <= 0) return;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t shares = std::min<int64_t>(items, std::max<int64_t>(1, torch::stable::get_num_threads()));
  std::vector<Share> share(static_cast<size_t>(shares));
  for (int64_t s = 0; s < shares; ++s) {
    share[s].next = items * s / shares;
    share[s].end = items * (s + 1) / shares;
  }
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t) {
    auto worker = make_worker();
    for (int64_t k = 0; k < shares; ++k) {
      Share& current = share[(begin + k) % shares];
      for (int64_t i; (i = current.next.fetch_add(1, std::memory_order_relaxed)) < current.end;) run(worker, i);
    }
  });
}

}  // namespace velm::simd
