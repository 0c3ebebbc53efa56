// Work of few blocks of rows shared out among more blocks, each of which takes a part of what the rows are summed over
// and leaves sums in float32, which another kernel adds up in a fixed order.
#pragma once

#include "attention/cuda_arguments.h"

namespace velm::cuda {

// For each split `rows` rows of `stride` floats.
struct Partials {
  Global<float> out;
  int64_t rows;
  int stride;
};
// Floats of one access to them.
constexpr int kVector = 4;
constexpr int kMostSplits = 32;

inline int partial_stride(int64_t dim) {
  return static_cast<int>((dim + kVector - 1) / kVector * kVector);
}

// In how many parts `blocks` blocks of `rows` rows each take the `length` keys or queries before them: as many as make
// up 256 blocks, but of at least 256 and 8 for each row. A part reads 4 * dim bytes for each of its keys and values, or
// more, and leaves 8 * dim for each of its rows, written and read: at most a quarter of that. Nothing but shapes
// decides, so that all devices give the same bits.
inline int split_count(int64_t blocks, int64_t rows, int64_t length) {
  if (blocks == 0) return 1;
  const int64_t splits = std::min({int64_t{kMostSplits}, 256 / blocks, length / std::max<int64_t>(256, 8 * rows)});
  return static_cast<int>(std::max<int64_t>(1, splits));
}

// Which of `count` tiles belong to a split: from the result on to that for the next split.
DEVICE_INLINE int first_of_split(int count, int split, int splits) {
  return static_cast<int>(int64_t{count} * split / splits);
}

}  // namespace velm::cuda
