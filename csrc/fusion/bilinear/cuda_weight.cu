// grad_W[k, i, j] = sum_b grad[b, k] x[b, i] y[b, j]: for each i the product (grad x[:, i])^T y, with the left operand
// generated in registers; four i at a time, so that tiles of grad and y come from shared memory once for four products.
// Up to 128 rows (float32: 64) they are there but once for all i of a block.
//
// A generated operand is rounded to the type of the tensors, as the outer product of plain PyTorch is; it is grad x and
// not x y, which is the larger and in float16 may overflow.

#include <algorithm>

#include "device/launch.h"
#include "fusion/bilinear/cuda.h"
#include "fusion/tiles_cuda.h"

namespace velm::cuda {
namespace {

// i for which tiles are read once.
constexpr int kPlanes = 4;

template <class T>
struct WeightGradient {
  ReadOnly<T> grad, x, y;
  Global<T> to;
  int64_t grad_stride, x_stride, y_stride;
  int grad_width, y_width, to_width;
  int64_t rows;
  int out, dx, dy;
  // i of a block, a multiple of kPlanes.
  int steps;
  unsigned out_blocks, column_blocks;
};

template <class T>
struct alignas(128) WeightStorage {
  SharedArray<T, 2, kDepth<T> * kTile> grad, y;
  // Of 16 bits two rows beside each other for each i.
  SharedArray<T, 2, kDepth<T> * kPlanes> x;
  SharedArray<T, kWarps, 16 * kDepth<T>> stage;
};

// What the rows of x are for kPlanes i, behind each other so that one access has all of them.
template <class T>
struct Planes {
  static constexpr int kEach = kDepth<T> * kPlanes / kThreads;
  T values[kEach];

  DEVICE_INLINE void fetch(const WeightGradient<T>& p, int64_t first_row, int first) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int at = static_cast<int>(threadIdx.x) + j * kThreads, i = first + at % kPlanes;
      const int64_t row = first_row + at / kPlanes;
      values[j] = load_if(row < p.rows && i < p.dx, p.x + (row * p.x_stride + i), from_float<T>(0.0f));
    }
  }
  DEVICE_INLINE void put(const Shared<T>& to) const {
    constexpr int kBeside = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int at = static_cast<int>(threadIdx.x) + j * kThreads, row = at / kPlanes, i = at % kPlanes;
      to[(row / kBeside * kPlanes + i) * kBeside + row % kBeside] = values[j];
    }
  }
};

// A warp has 16 outputs and 64 columns of kPlanes i.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) weight_kernel(const WeightGradient<T> p) {
  auto& shared = static_shared<WeightStorage<T>>();
  constexpr int kStages = kTile / kDepth<T>, kColumns = kDepth<T> / 8;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4, member = lane % 4;
  const auto first_out = static_cast<int>(blockIdx.x % p.out_blocks) * kTile;
  const auto first_column = static_cast<int>(blockIdx.x / p.out_blocks % p.column_blocks) * kTile;
  const auto begin = static_cast<int>(blockIdx.x / p.out_blocks / p.column_blocks) * p.steps;
  const int end = min(begin + p.steps, p.dx);
  const auto chunks = static_cast<int>((p.rows + kDepth<T> - 1) / kDepth<T>);

  // Pieces of the rows come in turn, for every kPlanes i anew; if there are no more than slots, they stay.
  Planes<T> planes;
  int ahead = begin, chunk_ahead = 0;
  const auto copy = [&](int slot) {
    if (ahead < end && chunk_ahead < chunks) {
      const int64_t row = int64_t{chunk_ahead} * kDepth<T>;
      const auto rows = static_cast<int>(min(p.rows - row, int64_t{kDepth<T>}));
      planes.fetch(p, row, ahead);
      if (ahead == begin || chunks > 2) {
        copy_tile<T, kTile, kDepth<T>>(shared.grad[slot], p.grad + (row * p.grad_stride + first_out), p.grad_stride,
                                       rows, p.out - first_out, p.grad_width);
        copy_tile<T, kTile, kDepth<T>>(shared.y[slot], p.y + (row * p.y_stride + first_column), p.y_stride, rows,
                                       p.dy - first_column, p.y_width);
      }
      if (++chunk_ahead == chunks) {
        chunk_ahead = 0;
        ahead += kPlanes;
      }
    }
    cp_async_commit();
  };
  copy(0);

  int turn = 0;
  for (int first = begin; first < end; first += kPlanes) {
    float sum[kPlanes][kStages][kColumns][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int slot = chunks == 1 ? 0 : turn;
      planes.put(shared.x[turn]);
      cp_async_wait<0>();
      __syncthreads();
      const Shared<T> x = shared.x[turn], grad = shared.grad[slot], y = shared.y[slot];
      turn ^= 1;
      copy(chunks == 1 ? 0 : turn);

      const auto rows = static_cast<int>(min(p.rows - int64_t{chunk} * kDepth<T>, int64_t{kDepth<T>}));
#pragma unroll 1
      for (int row = 0; row < rows; row += kProduct<T>) {
        if constexpr (sizeof(T) == 2) {
          uint32_t whole[4], scaled[kPlanes][4];
          const int row_a = row + lane % 8 + lane / 16 * 8, row_b = row + lane % 16;
          ldmatrix_transposed<4>(whole,
                                 grad + (row_a * kTile + ((2 * warp + lane / 8 % 2) ^ swap_of(row_a)) * kChunk<T>));
          const auto pairs = pointer_cast<uint32_t>(x) + (row / 2 + member) * kPlanes;
          const auto low = load<kPlanes>(pairs), high = load<kPlanes>(pairs + 4 * kPlanes);
#pragma unroll
          for (int i = 0; i < kPlanes; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) scaled[i][j] = multiply_words<T>(whole[j], j < 2 ? low[i] : high[i]);
#pragma unroll
          for (int n = 0; n < kColumns; n += 2) {
            if (first_column + 8 * n >= p.dy) break;
            uint32_t b[4];
            ldmatrix_transposed<4>(b, y + (row_b * kTile + ((n + lane / 16) ^ swap_of(row_b)) * kChunk<T>));
            const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
            for (int i = 0; i < kPlanes; ++i) {
              mma_m16n8k16<T>(sum[i][0][n], scaled[i], left);
              mma_m16n8k16<T>(sum[i][0][n + 1], scaled[i], right);
            }
          }
        } else {
          Split<4> scaled[kPlanes];
          const auto low = load<kPlanes>(x + (row + member) * kPlanes);
          const auto high = load<kPlanes>(x + (row + member + 4) * kPlanes);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int of = row + member + j / 2 * 4;
            const float whole = grad[of * kTile + ((16 * warp + j % 2 * 8 + group) ^ (swap_of(of) * kChunk<T>))];
#pragma unroll
            for (int i = 0; i < kPlanes; ++i) scaled[i].set(j, whole * (j < 2 ? low[i] : high[i]));
          }
#pragma unroll
          for (int n = 0; n < kTile / 8; ++n) {
            if (first_column + 8 * n >= p.dy) break;
            Split<2> b;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int of = row + member + 4 * j;
              const float value = y[of * kTile + ((8 * n + group) ^ (swap_of(of) * kChunk<T>))];
              b.set(j, value);
            }
#pragma unroll
            for (int i = 0; i < kPlanes; ++i) multiply_split(sum[i][n / kColumns][n % kColumns], scaled[i], b);
          }
        }
      }
    }
    const Shared<T> stage = shared.stage[warp];
#pragma unroll
    for (int i = 0; i < kPlanes; ++i)
#pragma unroll
      for (int half = 0; half < kStages; ++half) {
        if (first + i >= end) break;
        const int column = first_column + half * kDepth<T>;
        store_rows<T, kDepth<T>>(stage, sum[i][half], p.dy - column, p.to_width, [&](int row) {
          const int out = first_out + 16 * warp + row;
          return out < p.out ? p.to + ((int64_t{out} * p.dx + first + i) * p.dy + column) : Global<T>(nullptr);
        });
      }
  }
}

template <class T>
void run(const Bilinear& p, Stream stream) {
  WeightGradient<T> w{};
  w.grad = global<const T>(p.grad);
  w.x = global<const T>(p.x);
  w.y = global<const T>(p.y);
  w.to = global<T>(p.grad_weight);
  w.grad_stride = p.grad.stride[2];
  w.x_stride = p.x.stride[2];
  w.y_stride = p.y.stride[2];
  w.grad_width = copy_width(p.grad);
  w.y_width = copy_width(p.y);
  w.to_width = copy_width(p.grad_weight);
  w.rows = p.rows();
  w.out = static_cast<int>(p.out());
  w.dx = static_cast<int>(p.dx());
  w.dy = static_cast<int>(p.dy());
  w.out_blocks = static_cast<unsigned>(divide_up(p.out(), kTile));
  w.column_blocks = static_cast<unsigned>(divide_up(p.dy(), kTile));
  const int64_t tiles = int64_t{w.out_blocks} * w.column_blocks;
  // Four times as many, as they are short.
  const int64_t steps = divide_up(divide_up(p.dx(), std::max<int64_t>(1, 4 * kBlocks / tiles)), kPlanes) * kPlanes;
  w.steps = static_cast<int>(steps);
  launch<weight_kernel<T>>(static_cast<unsigned>(tiles * divide_up(p.dx(), steps)), kThreads, 0, stream, w);
}

}  // namespace

void bilinear_grad_weight(const Bilinear& p, Stream stream) {
  with_type(p.dtype(), [&](auto t) { run<decltype(t)>(p, stream); });
}

}  // namespace velm::cuda
