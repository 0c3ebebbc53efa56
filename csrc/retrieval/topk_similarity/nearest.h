// The best rows of a query so far.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "retrieval/topk_similarity/similarity.h"

namespace velm::topk {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Similarities as integers, of which the better one is greater. NaN is the greatest number, and so the worst distance.
template <Metric M>
VELM_INLINE uint32_t rank_of(float similarity) {
  // Both zeros are one.
  const uint32_t bits = std::bit_cast<uint32_t>(similarity + 0.0f);
  uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (std::isnan(similarity)) rising = ~0u;
  return M == Metric::l2 ? ~rising : rising;
}
template <Metric M>
inline float similarity_of_rank(uint32_t rank) {
  const uint32_t rising = M == Metric::l2 ? ~rank : rank;
  return std::bit_cast<float>(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

struct Found {
  int64_t id, place;
  uint32_t rank;

  // Of equal similarities the lower id; of equal ids, which nobody should give, the first.
  bool is_better(const Found& other) const {
    if (rank != other.rank) return rank > other.rank;
    return std::tie(id, place) < std::tie(other.id, other.place);
  }
};

// A heap of at most k, the worst at its root.
struct Nearest {
  Found* heap = nullptr;
  int64_t k = 0, count = 0;
  // What is less is not kept: the root's, once there are k.
  uint32_t least = 0;

  // Whether it was kept.
  bool offer(const Found& found) {
    const auto better = [](const Found& a, const Found& b) { return a.is_better(b); };
    if (count == k) {
      if (k == 0 || !found.is_better(heap[0])) return false;
      std::pop_heap(heap, heap + k, better);
      heap[k - 1] = found;
    } else {
      heap[count++] = found;
    }
    std::push_heap(heap, heap + count, better);
    if (count == k) least = heap[0].rank;
    return true;
  }
};

// A similarity that may still be kept is at least this, of l2 at most.
template <Metric M>
inline float limit_of(const Nearest& nearest) {
  if (nearest.k == 0) return M == Metric::l2 ? -kInfinity : kInfinity;
  if (nearest.count < nearest.k) return M == Metric::l2 ? kInfinity : -kInfinity;
  const float similarity = similarity_of_rank<M>(nearest.least);
  return std::isnan(similarity) ? kInfinity : similarity;
}

}  // namespace velm::topk
