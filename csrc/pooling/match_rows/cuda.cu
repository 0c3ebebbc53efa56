// For each row of a, the row of b in the most similar direction: a block takes a tile of rows of a and goes over the
// tiles of b, 64 columns at a time. The matrix of similarities lives in registers alone.

#include <cmath>

#include "device/launch.h"
#include "device/products.h"
#include "device/reduce.h"
#include "pooling/match_rows/cuda.h"

namespace velm::cuda {

using namespace device;

namespace {

constexpr int kPart = 64, kSlots = 2, kColumns = 32, kTiles = kColumns / 8;

// One over the norm of each row, 0 for a row of zeros: a warp takes one.
template <class T>
__global__ void __launch_bounds__(kThreads)
    inverse_norms_kernel(ReadOnly<T> x, Global<float> inverse_norms, int64_t rows, int64_t all_rows, int64_t dim,
                         int64_t batch_stride, int64_t row_stride) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= all_rows) return;
  const int64_t at = row / rows * batch_stride + row % rows * row_stride;
  float sum = 0.0f;
  for (int64_t c = threadIdx.x % 32; c < dim; c += 32) {
    const float value = to_float(x[at + c]);
    sum = fmaf(value, value, sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) inverse_norms[row] = sum == 0.0f ? 0.0f : 1.0f / sqrtf(sum);
}

// Rows of one batch entry after the other, and how wide copies of them are.
template <class T>
struct Vectors {
  ReadOnly<T> data;
  ReadOnly<float> inverse_norms;
  int64_t batch_stride, row_stride;
  int count, width;
};

template <class T>
struct Storage {
  SharedArray<T, kSlots, kRows * kPart> a;
  SharedArray<T, kSlots, kColumns * kPart> b;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    match_rows_kernel(const Vectors<T> a, const Vectors<T> b, Global<float> similarity, Global<int32_t> best, int dim,
                      int row_blocks) {
  auto& shared = dynamic_shared<Storage<T>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 32 * 16, first_row = static_cast<int>(blockIdx.x) % row_blocks * kRows;
  const int64_t batch = static_cast<int>(blockIdx.x) / row_blocks;
  const auto from_a = a.data + (batch * a.batch_stride + first_row * a.row_stride);
  const auto from_b = b.data + batch * b.batch_stride;
  const int parts = (dim + kPart - 1) / kPart;
  const auto columns_of = [&](int part) { return min(dim - part * kPart, kPart); };

  // The parts of each tile of b, and beside them those of a.
  Ring<kSlots> ring;
  int ahead = 0, ahead_part = 0;
  const auto copy = [&](int slot) {
    if (ahead >= b.count) return;
    copy_tile<T, kPart, kRows>(shared.a[slot], from_a + ahead_part * kPart, a.row_stride, a.count - first_row,
                               columns_of(ahead_part), a.width);
    copy_tile<T, kPart, kColumns>(shared.b[slot], from_b + (ahead * b.row_stride + ahead_part * kPart), b.row_stride,
                                  b.count - ahead, columns_of(ahead_part), b.width);
    if (++ahead_part < parts) return;
    ahead_part = 0;
    ahead += kColumns;
  };
  ring.fill(copy);

  float most[2] = {-INFINITY, -INFINITY};
  int where[2] = {0, 0};
  for (int first = 0; first < b.count; first += kColumns) {
    float p[kTiles][4] = {};
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const int slot = ring.next(copy);
      multiply_transposed<T, kPart, kTiles>(p, shared.a[slot], warp_row, shared.b[slot], columns_of(part));
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = first + 8 * j + 2 * member + i;
        if (column >= b.count) continue;
        const float scale = b.inverse_norms[batch * b.count + column];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float x = p[j][2 * half + i] * scale;
          // Columns rise, so that the first of equal ones stays; NaN is never more.
          where[half] = x > most[half] ? column : where[half];
          most[half] = x > most[half] ? x : most[half];
        }
      }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, most[half], step);
      const int there = __shfl_xor_sync(0xffffffffu, where[half], step);
      const bool is_better = other > most[half] || (other == most[half] && there < where[half]);
      most[half] = is_better ? other : most[half];
      where[half] = is_better ? there : where[half];
    }
    const int row = first_row + warp_row + group + 8 * half;
    if (member == 0 && row < a.count) {
      const int64_t at = batch * a.count + row;
      const float scaled = most[half] * a.inverse_norms[at];
      similarity[at] = scaled == scaled ? scaled : -INFINITY;
      best[at] = where[half];
    }
  }
}

template <class T>
Vectors<T> vectors_of(const MatchedRows& of) {
  const View& rows = of.rows;
  return {global<const T>(rows), global<const float>(of.inverse_norms), rows.stride[1],
          rows.stride[2],        static_cast<int>(rows.size[2]),        copy_width(rows)};
}

}  // namespace

void match_rows(const MatchRows& p, Stream stream) {
  const View& a = p.a.rows;
  const int64_t batch = a.size[1], dim = a.size[3], row_blocks = (a.size[2] + kRows - 1) / kRows;
  if (batch * row_blocks == 0) return;
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (const MatchedRows* of : {&p.a, &p.b}) {
      const View& rows = of->rows;
      const int64_t all = batch * rows.size[2];
      if (all == 0) continue;
      launch<inverse_norms_kernel<T>>(static_cast<unsigned>((all + kWarps - 1) / kWarps), kThreads, 0, stream,
                                      global<const T>(rows), global<float>(of->inverse_norms), rows.size[2], all, dim,
                                      rows.stride[1], rows.stride[2]);
    }
    launch<match_rows_kernel<T>>(static_cast<unsigned>(batch * row_blocks), kThreads, sizeof(Storage<T>), stream,
                                 vectors_of<T>(p.a), vectors_of<T>(p.b), global<float>(p.similarity),
                                 global<int32_t>(p.best), static_cast<int>(dim), static_cast<int>(row_blocks));
  });
}

}  // namespace velm::cuda
