// Which tokens belong to which segment, for kernels.
#pragma once

#include "device/memory.h"

namespace velm::cuda {

using namespace device;

// The tokens of a segment; in packed tensors their numbers run through all of them.
struct Tokens {
  ReadOnly<int32_t> bounds, lengths;
  ReadOnly<unsigned char> mask;
  int64_t segments, tokens;

  DEVICE_INLINE int64_t begin(int64_t segment) const { return bounds ? clamped(bounds[segment], 0) : 0; }
  DEVICE_INLINE int64_t end(int64_t segment) const {
    if (bounds) return clamped(bounds[segment + 1], begin(segment));
    return lengths ? clamped(lengths[segment], 0) : tokens;
  }
  DEVICE_INLINE bool masks(int64_t segment, int64_t token) const { return mask && !mask[segment * tokens + token]; }

 private:
  DEVICE_INLINE int64_t clamped(int64_t value, int64_t low) const {
    return value < low ? low : value > tokens ? tokens : value;
  }
};

// Of a problem that has the views bounds, lengths and mask and knows how many there are.
template <class Problem>
Tokens tokens_of(const Problem& p) {
  return {global<const int32_t>(p.bounds), global<const int32_t>(p.lengths), global<const unsigned char>(p.mask),
          p.segments(), p.tokens()};
}

inline unsigned divide_up(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

}  // namespace velm::cuda
