// Rows of features and of tokens, by number, on a CUDA device: what the operators that put features at tokens share.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// Rows lie `stride[2]` apart, last stride 1; out is contiguous.
struct PlacedRows {
  // (base rows, dim); null for zeros in its place.
  View base;
  // int32 (rows,): which row of base each row of out has, clamped to those that there are; null: that of its own
  // number.
  View ids;
  // (count, dim); null for zeros in its place, where every number from 0 to count is one of a row.
  View features;
  int64_t count;
  // int32 (rows,): which row of features each row of out has, or another number for none.
  View index;
  // (rows, dim).
  View out;
};

// The row of features, where there is one, else that of base. Moved as they are, whatever their dtype.
void place_rows(const PlacedRows& problem, Stream stream);

// The row of base, which is that of the same number, with that of features added to it where there is one. All of one
// dtype.
void add_rows(const PlacedRows& problem, Stream stream);

// to[r] = from[place[r]], zeros where that is no row.
void take_rows(const View& from, const View& place, const View& to, Stream stream);

// rows[place[r]] += features[r] where that is a row; no number is there twice. All of one dtype, rows contiguous.
void add_rows_in_place(const View& rows, const View& features, const View& place, Stream stream);

// Entries that one warp adds up, one after the other; runs that go on are joined by a second kernel.
constexpr int64_t kStretch = 32;

struct SummedRows {
  // (tokens, dim), last stride 1.
  View grad;
  // int32 (tokens,): keys in rising order, and which row of grad each is the key of.
  View keys, order;
  // (keys, dim), contiguous, zeros. Keys that are no row of it are passed over: they stand at the end.
  View out;
  // Float (stretches, 2, dim): sums of runs that began before a stretch, and of those that begin in it and go on.
  View open;

  int64_t tokens() const { return keys.size[3]; }
  int64_t dim() const { return out.size[3]; }
  int64_t stretches() const { return (tokens() + kStretch - 1) / kStretch; }
};

// out[key] = the sum of the rows of grad with this key, in float32 and in their order.
void sum_rows(const SummedRows& problem, Stream stream);

}  // namespace velm::cuda
