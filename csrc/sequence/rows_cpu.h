// Rows of features and of tokens, by number.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/tensor.h"
#include "simd/parallel.h"

namespace velm {

// Bytes below which another thread costs more than it saves.
constexpr int64_t kGrainBytes = 1 << 16;

// The rows of (rows, dim), last stride 1, whatever their numbers are.
struct ByteRows {
  char* data;
  int64_t stride, rows;
  size_t size;

  explicit ByteRows(const Tensor& t)
      : data(const_cast<char*>(static_cast<const char*>(t.const_data_ptr()))),
        stride(t.stride(0) * static_cast<int64_t>(t.element_size())),
        rows(t.size(0)),
        size(static_cast<size_t>(t.size(1)) * t.element_size()) {}

  char* at(int64_t row) const { return data + row * stride; }
  bool has(int64_t row) const { return row >= 0 && row < rows; }
  int64_t grain() const { return kGrainBytes / std::max<int64_t>(static_cast<int64_t>(size), 1); }
};

// f(row) for every row of `of`, shared by threads.
template <class F>
inline void for_rows(const ByteRows& of, const F& f) {
  simd::parallel_ranges(of.rows, of.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

// to[r] = from[place[r]], zeros where that is no row: gradients of features.
inline void take_rows(const Tensor& from, const Tensor& place, const Tensor& to) {
  in_large_pages(to);
  const ByteRows source(from), target(to);
  const int32_t* at = const_data<int32_t>(place);
  for_rows(target, [&](int64_t r) {
    if (source.has(at[r])) {
      std::memcpy(target.at(r), source.at(at[r]), target.size);
    } else {
      std::memset(target.at(r), 0, target.size);
    }
  });
}

}  // namespace velm
