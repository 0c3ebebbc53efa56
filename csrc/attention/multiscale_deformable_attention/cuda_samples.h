// Where samples lie, for kernels.
#pragma once

#include <type_traits>

#include "attention/multiscale_deformable_attention/cuda.h"
#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"

namespace velm::cuda {

namespace {

using namespace device;

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

inline unsigned divide_up(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

// Numbers whose type is known when a kernel runs: a kernel for each type of locations and of weights would be nine.
struct Numbers {
  ReadOnly<float> singles;
  ReadOnly<__half> halves;
  ReadOnly<__nv_bfloat16> bfloats;

  DEVICE_INLINE float operator[](int64_t i) const {
    return singles ? to_float(singles[i]) : halves ? to_float(halves[i]) : to_float(bfloats[i]);
  }
};

inline Numbers numbers_of(const View& view) {
  Numbers numbers{};
  if (view.dtype == Dtype::float32) numbers.singles = global<const float>(view);
  if (view.dtype == Dtype::float16) numbers.halves = global<const __half>(view);
  if (view.dtype == Dtype::bfloat16) numbers.bfloats = global<const __nv_bfloat16>(view);
  return numbers;
}

struct Shape {
  int64_t tokens, heads, d, queries;
  int levels, points;
  ReadOnly<int64_t> sides;
  Numbers locations, weights;

  // The number of a row of (batch, queries, heads).
  DEVICE_INLINE int64_t row(int64_t batch, int64_t query, int64_t head) const {
    return (batch * queries + query) * heads + head;
  }
};

inline Shape shape_of(const Deformable& p) {
  return {p.tokens,
          p.heads,
          p.d,
          p.queries,
          static_cast<int>(p.levels),
          static_cast<int>(p.points),
          global<const int64_t>(p.shapes),
          numbers_of(p.locations),
          numbers_of(p.weights)};
}

// The tokens of a level, and of its cells those that lie before them in a head.
struct Level {
  int height, width;
  int64_t first_token, first_cell;

  DEVICE_INLINE Level() : height(0), width(0), first_token(0), first_cell(0) {}
  // The next one.
  DEVICE_INLINE void step(const Shape& shape, int number) {
    first_token += tokens();
    first_cell += cells();
    height = static_cast<int>(shape.sides[2 * number]);
    width = static_cast<int>(shape.sides[2 * number + 1]);
  }
  DEVICE_INLINE int64_t tokens() const { return height > 0 && width > 0 ? int64_t{height} * width : 0; }
  DEVICE_INLINE int64_t cells() const { return height > 0 && width > 0 ? int64_t{height + 1} * (width + 1) : 0; }
};

DEVICE_INLINE Level level_of(const Shape& shape, int number) {
  Level level;
  for (int l = 0; l <= number; ++l) level.step(shape, l);
  return level;
}

// A sample: the upper left one of the four corners around it, how far it lies from that, 0 to 1, and its weight.
struct Sample {
  float column, row, right, lower, weight;

  DEVICE_INLINE Sample(const Shape& shape, int64_t number, const Level& level) {
    const float x = fmaf(shape.locations[2 * number], static_cast<float>(level.width), -0.5f);
    const float y = fmaf(shape.locations[2 * number + 1], static_cast<float>(level.height), -0.5f);
    column = floorf(x);
    row = floorf(y);
    right = x - column;
    lower = y - row;
    weight = shape.weights[number];
  }

  DEVICE_INLINE float along(int corner) const { return corner % 2 ? right : 1.0f - right; }
  DEVICE_INLINE float down(int corner) const { return corner / 2 ? lower : 1.0f - lower; }

  // The number of a corner's token, -1 outside of the level, where there are zeros. A location that is NaN is outside.
  DEVICE_INLINE int64_t token(int corner, const Level& level, int64_t tokens) const {
    const float x = column + static_cast<float>(corner % 2), y = row + static_cast<float>(corner / 2);
    if (!(x >= 0.0f && x < static_cast<float>(level.width) && y >= 0.0f && y < static_cast<float>(level.height)))
      return -1;
    const int64_t number = level.first_token + int64_t{static_cast<int>(y)} * level.width + static_cast<int>(x);
    return number < tokens ? number : -1;
  }

  // Among those of the level; -1 where all corners are outside.
  DEVICE_INLINE int64_t cell(const Level& level) const {
    if (!(column >= -1.0f && column < static_cast<float>(level.width) && row >= -1.0f &&
          row < static_cast<float>(level.height)))
      return -1;
    return int64_t{static_cast<int>(row) + 1} * (level.width + 1) + static_cast<int>(column) + 1;
  }
};

// Elements of an access of 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// run(width) for as many columns as an access to all of these can have.
template <class T, class F>
void with_width(const Deformable& p, std::initializer_list<const View*> views, const F& run) {
  bool fits = p.d % kVector<T> == 0;
  for (const View* view : views) fits = fits && is_aligned(*view, kVector<T>);
  fits ? run(std::integral_constant<int, kVector<T>>{}) : run(std::integral_constant<int, 1>{});
}

// Neighbouring lanes, a power of two, that have a row of d columns, or 32 of them several times.
inline int lanes_of(int64_t d, int width) {
  int lanes = 1;
  while (lanes < 32 && lanes * width < d) lanes *= 2;
  return lanes;
}

template <int Width, class P>
DEVICE_INLINE void load_floats(const P& from, float (&to)[Width]) {
  const auto values = load<Width>(from);
#pragma unroll
  for (int k = 0; k < Width; ++k) to[k] = to_float(values[k]);
}
template <class T, int Width, class P>
DEVICE_INLINE void store_floats(const P& to, const float (&from)[Width]) {
  Vector<T, Width> values;
#pragma unroll
  for (int k = 0; k < Width; ++k) values[k] = from_float<T>(from[k]);
  store(to, values);
}

}  // namespace
}  // namespace velm::cuda
