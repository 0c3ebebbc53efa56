// Pairs of columns, their sines and cosines, and their rotation: what the kernels of rotary share.
//
// A unit is two vectors of N columns that are rotated with each other. The partner of a column is in the same place of
// the other vector, or with `kNeighbours` beside it in its own.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "sequence/rotary/cuda.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;

inline unsigned divide_up(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

// Rows of one of three dtypes, the one whose pointer is not null: a template for each would be three times the kernels.
struct AnyFloats {
  ReadOnly<float> as_float;
  ReadOnly<__half> as_half;
  ReadOnly<__nv_bfloat16> as_bfloat16;
};
struct AnyResult {
  Global<float> as_float;
  Global<__half> as_half;
  Global<__nv_bfloat16> as_bfloat16;

  DEVICE_INLINE explicit operator bool() const { return as_float || as_half || as_bfloat16; }
};

inline View only_of(const View& view, Dtype dtype) {
  return view.dtype == dtype ? view : View{};
}
inline AnyFloats any_floats(const View& view) {
  return {global<const float>(only_of(view, Dtype::float32)), global<const __half>(only_of(view, Dtype::float16)),
          global<const __nv_bfloat16>(only_of(view, Dtype::bfloat16))};
}
inline AnyResult any_result(const View& view) {
  return {global<float>(only_of(view, Dtype::float32)), global<__half>(only_of(view, Dtype::float16)),
          global<__nv_bfloat16>(only_of(view, Dtype::bfloat16))};
}

// N elements, at most 16 bytes at a time.
template <class T, int N, class P>
DEVICE_INLINE void load_floats(const P& from, float (&to)[N]) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T)), kWidth = N < kMost ? N : kMost;
#pragma unroll
  for (int k = 0; k < N; k += kWidth) {
    const auto values = load<kWidth>(from + k);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[k + i] = to_float(values[i]);
  }
}
template <class T, int N>
DEVICE_INLINE void store_floats(const Global<T>& to, const float (&from)[N]) {
  Vector<T, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = from_float<T>(from[i]);
  store(to, values);
}
template <int N>
DEVICE_INLINE void load_any(const AnyFloats& from, int64_t at, float (&to)[N]) {
  if (from.as_float)
    load_floats<float>(from.as_float + at, to);
  else if (from.as_half)
    load_floats<__half>(from.as_half + at, to);
  else
    load_floats<__nv_bfloat16>(from.as_bfloat16 + at, to);
}
DEVICE_INLINE void store_any(const AnyResult& to, int64_t at, float value) {
  if (to.as_float)
    to.as_float[at] = value;
  else if (to.as_half)
    to.as_half[at] = from_float<__half>(value);
  else
    to.as_bfloat16[at] = from_float<__nv_bfloat16>(value);
}

// a / b and a % b of numbers that are not negative, mostly by the far quicker division of 32 bits.
struct Quotient {
  int64_t quotient, rest;

  DEVICE_INLINE Quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) {
      const auto x = static_cast<unsigned>(a), y = static_cast<unsigned>(b);
      quotient = x / y;
      rest = x % y;
    } else {
      quotient = a / b;
      rest = a % b;
    }
  }
};

// Where the columns of a unit are: of unit u, pairs from u * N on. Behind the rotated units a row has units of one
// vector, of columns that stay as they are.
struct Units {
  // Columns from a pair to the next, and from the first vector to the second; pairs from `split` on lie that much
  // further (the second half of quarters).
  int64_t stride, step, split;
  // Columns that are rotated; units of these, and of all columns.
  int64_t rotated, rotated_units, units;

  template <int N>
  DEVICE_INLINE int64_t first(int64_t unit) const {
    if (unit >= rotated_units) return rotated + (unit - rotated_units) * N;
    const int64_t pair = unit * N;
    return pair * stride + (pair >= split ? split : 0);
  }
};

// cos and sin on their way to a kernel.
struct TableRows {
  AnyFloats cos, sin;
  int64_t cos_batch, cos_row, sin_batch, sin_row;
};

// What a unit of a token is multiplied with: its cosines, and sines with the signs of R, or `back` of its transpose.
template <int N, bool kNeighbours>
struct Rotation {
  float cos[2][N], sin[2][N];

  DEVICE_INLINE Rotation(const TableRows& rows, int64_t batch, int64_t token, int64_t first, int64_t step, bool back) {
    const int64_t cos_at = batch * rows.cos_batch + token * rows.cos_row + first;
    const int64_t sin_at = batch * rows.sin_batch + token * rows.sin_row + first;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      load_any(rows.cos, cos_at + side * step, cos[side]);
      load_any(rows.sin, sin_at + side * step, sin[side]);
    }
    if constexpr (kNeighbours) {
#pragma unroll
      for (int k = 0; k < 2 * N; k += 2) sign(sin[k / N][k % N], sin[k / N][k % N + 1], back);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) sign(sin[0][k], sin[1][k], back);
    }
  }

  // y[i] = x[i] * cos[i] + x[partner of i] * sin[i].
  DEVICE_INLINE void turn(float (&x)[2][N]) const {
    float y[2][N];
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float partner = kNeighbours ? x[side][k ^ 1] : x[1 - side][k];
        y[side][k] = fmaf(x[side][k], cos[side][k], partner * sin[side][k]);
      }
#pragma unroll
    for (int k = 0; k < 2 * N; ++k) x[k / N][k % N] = y[k / N][k % N];
  }

 private:
  static DEVICE_INLINE void sign(float& of_first, float& of_second, bool back) {
    const float first = of_first, second = of_second;
    of_first = back ? second : -first;
    of_second = back ? -first : second;
  }
};

// How rows are divided where vectors have `width` columns.
inline Units units_of(const RotaryTables& tables, int64_t head_dim, int width) {
  const int64_t rotated = tables.rotated(), layout = tables.layout;
  Units u{};
  u.stride = layout == kPairs ? 2 : 1;
  u.step = layout == kPairs ? width : layout == kQuarters ? rotated / 4 : rotated / 2;
  u.split = layout == kQuarters ? rotated / 4 : INT64_MAX;
  u.rotated = rotated;
  u.rotated_units = rotated / 2 / width;
  u.units = u.rotated_units + (head_dim - rotated) / width;
  return u;
}

inline TableRows rows_of(const RotaryTables& t) {
  return {any_floats(t.cos), any_floats(t.sin), t.cos.stride[1], t.cos.stride[2], t.sin.stride[1], t.sin.stride[2]};
}

// Whether a row is made of units of `width` columns, and tables can be read so.
inline bool fits(const RotaryTables& tables, int64_t head_dim, int width) {
  const int64_t rotated = tables.rotated();
  const int64_t vectors = tables.layout == kQuarters ? rotated / 4 : rotated / 2;
  const int most = 16 / static_cast<int>(bytes_of(tables.cos.dtype)), at_a_time = width < most ? width : most;
  return vectors % width == 0 && rotated % width == 0 && head_dim % width == 0 && is_aligned(tables.cos, at_a_time) &&
         is_aligned(tables.sin, at_a_time);
}

// Lanes, a power of two, that share a row of that many units.
inline int lanes_of(int64_t units, int least, int most) {
  int lanes = least;
  while (lanes < most && lanes < units) lanes *= 2;
  return lanes;
}

}  // namespace
}  // namespace velm::cuda
