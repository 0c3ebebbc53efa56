// Rows by number: a warp moves a piece of a row, its lanes 16 bytes at a time where rows begin at multiples of them.

#include "sequence/cuda_rows.h"

#include <initializer_list>
#include <type_traits>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128, kWarps = kThreads / 32;
// Accesses of a lane that are on their way at a time.
constexpr int kPieces = 4;

// Counted in what a lane moves at a time, or in elements of it.
struct RowsShape {
  int64_t rows, base_rows, count, base_stride, feature_stride, dim;
  unsigned column_blocks;
};

// Which row a warp works at, and the first column of each lane; its next is 32 accesses further.
template <int N>
struct Piece {
  int64_t row, first;

  DEVICE_INLINE explicit Piece(unsigned column_blocks) {
    row = int64_t{blockIdx.x / column_blocks} * kWarps + threadIdx.y;
    first = (int64_t{blockIdx.x % column_blocks} * (32 * kPieces) + threadIdx.x) * N;
  }
  DEVICE_INLINE int64_t column(int k) const { return first + int64_t{k} * (32 * N); }
};

template <class E, int N>
__global__ void __launch_bounds__(kThreads)
    place_rows_kernel(ReadOnly<E> base, ReadOnly<int32_t> ids, ReadOnly<E> features, ReadOnly<int32_t> index,
                      Global<E> out, RowsShape shape) {
  const Piece<N> piece(shape.column_blocks);
  if (piece.row >= shape.rows) return;
  const int64_t number = index[piece.row];
  const bool is_feature = number >= 0 && number < shape.count;
  int64_t base_row = piece.row;
  if (ids && !is_feature) {
    const int64_t id = ids[piece.row];
    base_row = id < 0 ? 0 : id < shape.base_rows ? id : shape.base_rows - 1;
  }
  const int64_t at = is_feature ? number * shape.feature_stride : base_row * shape.base_stride;
  const ReadOnly<E> from = is_feature ? features : base;
  Vector<E, N> values[kPieces] = {};
#pragma unroll
  for (int k = 0; k < kPieces; ++k)
    if (from && piece.column(k) < shape.dim) values[k] = load<N>(from + (at + piece.column(k)));
#pragma unroll
  for (int k = 0; k < kPieces; ++k)
    if (piece.column(k) < shape.dim) store(out + (piece.row * shape.dim + piece.column(k)), values[k]);
}

template <class T, int N>
DEVICE_INLINE void add(Vector<T, N>& to, const Vector<T, N>& other) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = from_float<T>(to_float(to[i]) + to_float(other[i]));
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    add_rows_kernel(ReadOnly<T> base, ReadOnly<T> features, ReadOnly<int32_t> index, Global<T> out, RowsShape shape) {
  const Piece<N> piece(shape.column_blocks);
  if (piece.row >= shape.rows) return;
  const int64_t number = index[piece.row];
  const bool is_added = number >= 0 && number < shape.count;
  Vector<T, N> values[kPieces], added[kPieces];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (piece.column(k) >= shape.dim) continue;
    values[k] = load<N>(base + (piece.row * shape.base_stride + piece.column(k)));
    if (is_added) added[k] = load<N>(features + (number * shape.feature_stride + piece.column(k)));
  }
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (piece.column(k) >= shape.dim) continue;
    // Not a zero where nothing is added: that would lose the sign of one.
    if (is_added) add(values[k], added[k]);
    store(out + (piece.row * shape.dim + piece.column(k)), values[k]);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    add_rows_in_place_kernel(Global<T> rows, ReadOnly<T> features, ReadOnly<int32_t> place, RowsShape shape) {
  const Piece<N> piece(shape.column_blocks);
  if (piece.row >= shape.count) return;
  const int64_t row = place[piece.row];
  if (row < 0 || row >= shape.rows) return;
  Vector<T, N> values[kPieces], added[kPieces];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (piece.column(k) >= shape.dim) continue;
    values[k] = load<N>(rows + (row * shape.dim + piece.column(k)));
    added[k] = load<N>(features + (piece.row * shape.feature_stride + piece.column(k)));
  }
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (piece.column(k) >= shape.dim) continue;
    add(values[k], added[k]);
    store(rows + (row * shape.dim + piece.column(k)), values[k]);
  }
}

struct SumsShape {
  int64_t tokens, stretches, keys, stride, dim;
  unsigned column_blocks;
};

// What a warp adds up: a stretch of the sorted entries, and a lane's columns.
template <int N>
struct Stretch {
  int64_t number, begin, end, column;

  DEVICE_INLINE explicit Stretch(const SumsShape& shape) {
    number = int64_t{blockIdx.x / shape.column_blocks} * kWarps + threadIdx.y;
    begin = number * kStretch;
    end = begin + kStretch < shape.tokens ? begin + kStretch : shape.tokens;
    column = (int64_t{blockIdx.x % shape.column_blocks} * 32 + threadIdx.x) * N;
  }
  DEVICE_INLINE bool is_there(const SumsShape& shape) const { return number < shape.stretches && column < shape.dim; }
};

template <class T, int N>
DEVICE_INLINE void put_sum(const Global<T>& out, int64_t at, const float (&sum)[N]) {
  Vector<T, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = from_float<T>(sum[i]);
  store(out + at, values);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    sum_stretches_kernel(ReadOnly<T> grad, ReadOnly<int32_t> keys, ReadOnly<int32_t> order, Global<T> out,
                         Global<float> open, SumsShape shape) {
  const Stretch<N> stretch(shape);
  if (!stretch.is_there(shape)) return;
  float sum[N] = {};
  bool begins = stretch.begin == 0 || keys[stretch.begin - 1] != keys[stretch.begin];
  int64_t key = keys[stretch.begin];
#pragma unroll 2
  for (int64_t e = stretch.begin; e < stretch.end; ++e) {
    if (key >= shape.keys) return;
    const int64_t next_key = e + 1 < shape.tokens ? int64_t{keys[e + 1]} : shape.keys;
    const auto values = load<N>(grad + (int64_t{order[e]} * shape.stride + stretch.column));
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += to_float(values[i]);
    const bool ends = next_key != key;
    if (!ends && e + 1 < stretch.end) continue;
    if (begins && ends) {
      put_sum<T, N>(out, key * shape.dim + stretch.column, sum);
    } else {
      const int64_t at = (2 * stretch.number + (begins ? 1 : 0)) * shape.dim + stretch.column;
#pragma unroll
      for (int i = 0; i < N; ++i) open[at + i] = sum[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = 0.0f;
    begins = true;
    key = next_key;
  }
}

// A run that goes on behind the stretch that it begins in: what the next ones have of it is added.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    join_stretches_kernel(ReadOnly<float> open, ReadOnly<int32_t> keys, Global<T> out, SumsShape shape) {
  const Stretch<N> stretch(shape);
  if (!stretch.is_there(shape) || stretch.end == shape.tokens) return;
  const int64_t key = keys[stretch.end - 1];
  const bool goes_on = keys[stretch.end] == key;
  const bool begins = stretch.begin == 0 || keys[stretch.begin - 1] != key;
  if (key >= shape.keys || !goes_on || !begins) return;
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = open[(2 * stretch.number + 1) * shape.dim + stretch.column + i];
#pragma unroll 4
  for (int64_t next = stretch.number + 1; next < shape.stretches; ++next) {
    if (keys[next * kStretch] != key) break;
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += open[2 * next * shape.dim + stretch.column + i];
  }
  put_sum<T, N>(out, key * shape.dim + stretch.column, sum);
}

unsigned divide_up(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Calls f with how many elements are moved at a time.
template <class T, class F>
void with_width(std::initializer_list<const View*> rows, int64_t dim, const F& f) {
  bool fits = dim % kVector<T> == 0;
  for (const View* view : rows) fits = fits && is_aligned(*view, kVector<T>);
  fits ? f(std::integral_constant<int, kVector<T>>{}) : f(std::integral_constant<int, 1>{});
}

RowsShape shape_of(const PlacedRows& p) {
  return {p.out.size[2], p.base.size[2], p.count, p.base.stride[2], p.features.stride[2], p.out.size[3], 0};
}

template <int N>
RowsShape in_blocks(RowsShape shape) {
  shape.column_blocks = divide_up(shape.dim, 32 * kPieces * N);
  return shape;
}

unsigned blocks_of(int64_t rows, unsigned column_blocks) {
  return divide_up(rows, kWarps) * column_blocks;
}

// As words of E, of which N are moved at a time.
template <class E, int N>
void place_words(const PlacedRows& p, Stream stream) {
  RowsShape shape = shape_of(p);
  const auto words = [&](int64_t elements) {
    return elements * static_cast<int64_t>(bytes_of(p.out.dtype)) / static_cast<int64_t>(sizeof(E));
  };
  shape.base_stride = words(shape.base_stride);
  shape.feature_stride = words(shape.feature_stride);
  shape.dim = words(shape.dim);
  shape = in_blocks<N>(shape);
  launch<place_rows_kernel<E, N>>(blocks_of(shape.rows, shape.column_blocks), dim3(32, kWarps), 0, stream,
                                  global<const E>(p.base), global<const int32_t>(p.ids), global<const E>(p.features),
                                  global<const int32_t>(p.index), global<E>(p.out), shape);
}

}  // namespace

void place_rows(const PlacedRows& p, Stream stream) {
  if (p.out.numel() == 0) return;
  const int bytes = static_cast<int>(bytes_of(p.out.dtype));
  const auto fits = [&](int width) {
    const int elements = width / bytes;
    return width >= bytes && p.out.size[3] % elements == 0 && is_aligned(p.base, elements) &&
           is_aligned(p.features, elements) && is_aligned(p.out, elements);
  };
  if (fits(16)) return place_words<uint32_t, 4>(p, stream);
  if (fits(4)) return place_words<uint32_t, 1>(p, stream);
  place_words<uint16_t, 1>(p, stream);
}

void take_rows(const View& from, const View& place, const View& to, Stream stream) {
  PlacedRows p{};
  p.features = from;
  p.count = from.size[2];
  p.index = place;
  p.out = to;
  place_rows(p, stream);
}

void add_rows(const PlacedRows& p, Stream stream) {
  if (p.out.numel() == 0) return;
  with_type(p.out.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>({&p.base, &p.features, &p.out}, p.out.size[3], [&](auto width) {
      const RowsShape shape = in_blocks<width()>(shape_of(p));
      launch<add_rows_kernel<T, width()>>(blocks_of(shape.rows, shape.column_blocks), dim3(32, kWarps), 0, stream,
                                          global<const T>(p.base), global<const T>(p.features),
                                          global<const int32_t>(p.index), global<T>(p.out), shape);
    });
  });
}

void add_rows_in_place(const View& rows, const View& features, const View& place, Stream stream) {
  if (rows.numel() == 0 || features.numel() == 0) return;
  with_type(rows.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>({&rows, &features}, rows.size[3], [&](auto width) {
      RowsShape shape{rows.size[2], 0, features.size[2], 0, features.stride[2], rows.size[3], 0};
      shape = in_blocks<width()>(shape);
      launch<add_rows_in_place_kernel<T, width()>>(blocks_of(shape.count, shape.column_blocks), dim3(32, kWarps), 0,
                                                   stream, global<T>(rows), global<const T>(features),
                                                   global<const int32_t>(place), shape);
    });
  });
}

void sum_rows(const SummedRows& p, Stream stream) {
  if (p.out.numel() == 0 || p.tokens() == 0) return;
  with_type(p.out.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>({&p.grad, &p.out}, p.dim(), [&](auto width) {
      SumsShape shape{p.tokens(), p.stretches(), p.out.size[2], p.grad.stride[2], p.dim(), 0};
      shape.column_blocks = divide_up(p.dim(), 32 * width());
      const unsigned blocks = blocks_of(shape.stretches, shape.column_blocks);
      launch<sum_stretches_kernel<T, width()>>(blocks, dim3(32, kWarps), 0, stream, global<const T>(p.grad),
                                               global<const int32_t>(p.keys), global<const int32_t>(p.order),
                                               global<T>(p.out), global<float>(p.open), shape);
      if (shape.stretches == 1) return;
      launch<join_stretches_kernel<T, width()>>(blocks, dim3(32, kWarps), 0, stream, global<const float>(p.open),
                                                global<const int32_t>(p.keys), global<T>(p.out), shape);
    });
  });
}

}  // namespace velm::cuda
