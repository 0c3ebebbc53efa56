// residual + tanh(gate) * x, forward and backward, one pass over memory each.

#include "attention/gated_residual/cuda.h"

#include <algorithm>
#include <type_traits>

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/reduce.h"

namespace velm::cuda {
namespace {

using namespace device;

// A block is a tile of threads: along x over the columns, `width` at a time, along y over the rows.
constexpr int kThreads = 128, kMostWidth = 8;
// Rows of a thread, which reads the gate of its columns once for all of them, and backward leaves a sum of them: as
// many as these, or of fewer rows as leave so many blocks.
constexpr int kRowsForward = 16, kRowsBackward = 32, kLeastBlocks = 256;
// Rows that are read before the first is written.
constexpr int kRowsAtOnce = 2;
// Rows whose products are added in one float before the next level, and the least of a thread backward; row blocks are
// as many as fill a device.
constexpr int kRowsASum = 16, kMostRowBlocks = 1024;

// The gate in whichever type it came; the others are null.
struct Gate {
  ReadOnly<float> as_float;
  ReadOnly<__half> as_half;
  ReadOnly<__nv_bfloat16> as_bfloat16;
  bool is_row;

  DEVICE_INLINE float at(int64_t column) const {
    const int64_t i = is_row ? column : 0;
    if (as_float) return as_float[i];
    return as_half ? to_float(as_half[i]) : to_float(as_bfloat16[i]);
  }
};

// 1 - tanh(x)^2, which would cancel for a wide open gate.
DEVICE_INLINE float tanh_slope(float x) {
  const float e = expf(-2.0f * fabsf(x));
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// The next rows of a thread, and which of them are masked and so not read.
struct NextRows {
  int64_t row[kRowsAtOnce];
  bool is_row[kRowsAtOnce], is_open[kRowsAtOnce];

  DEVICE_INLINE NextRows(int64_t first, int64_t end, const ReadOnly<unsigned char>& row_mask) {
#pragma unroll
    for (int n = 0; n < kRowsAtOnce; ++n) {
      row[n] = first + n * int64_t{blockDim.y};
      is_row[n] = row[n] < end;
      is_open[n] = is_row[n] && (!row_mask || row_mask[row[n]]);
    }
  }
};

template <class R, class X, class O, int Width>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(ReadOnly<R> residual, ReadOnly<X> x, Gate gate, ReadOnly<unsigned char> row_mask, Global<O> out,
                   int64_t residual_stride, int64_t x_stride, int64_t rows, int64_t dim, unsigned column_blocks,
                   int rows_a_thread) {
  const int64_t column = (int64_t{blockIdx.x % column_blocks} * blockDim.x + threadIdx.x) * Width;
  if (column >= dim) return;
  float tanh_gate[Width];
#pragma unroll
  for (int k = 0; k < Width; ++k) tanh_gate[k] = tanhf(gate.at(column + k));
  const int64_t first = int64_t{blockIdx.x / column_blocks} * (blockDim.y * rows_a_thread) + threadIdx.y;
  for (int i = 0; i < rows_a_thread; i += kRowsAtOnce) {
    const NextRows next(first + i * int64_t{blockDim.y}, rows, row_mask);
    Vector<R, Width> r[kRowsAtOnce];
    Vector<X, Width> b[kRowsAtOnce];
#pragma unroll
    for (int n = 0; n < kRowsAtOnce; ++n) {
      if (next.is_row[n]) r[n] = load<Width>(residual + (next.row[n] * residual_stride + column));
      if (next.is_open[n]) b[n] = load<Width>(x + (next.row[n] * x_stride + column));
    }
#pragma unroll
    for (int n = 0; n < kRowsAtOnce; ++n) {
      if (!next.is_row[n]) return;
      Vector<O, Width> result;
      // An infinite gate must not reach a row that is masked.
#pragma unroll
      for (int k = 0; k < Width; ++k)
        result[k] = from_float<O>(next.is_open[n] ? fmaf(tanh_gate[k], to_float(b[n][k]), to_float(r[n][k]))
                                                  : to_float(r[n][k]));
      store(out + (next.row[n] * dim + column), result);
    }
  }
}

struct BackwardStorage {
  // The sums of one row of threads, or of one thread.
  SharedArray<float, kThreads * kMostWidth> columns;
  BlockSum<float> block;
};

// grad_x, and for each block of rows the sums over its rows of grad * x.
template <class G, class X, int Width>
__global__ void __launch_bounds__(kThreads, 6)
    backward_kernel(ReadOnly<G> grad, ReadOnly<X> x, Gate gate, ReadOnly<unsigned char> row_mask, Global<X> grad_x,
                    Global<float> partials, int64_t x_stride, int64_t rows, int64_t dim, unsigned column_blocks,
                    int64_t rows_a_block) {
  auto& shared = static_shared<BackwardStorage>();
  const int64_t column = (int64_t{blockIdx.x % column_blocks} * blockDim.x + threadIdx.x) * Width;
  const int64_t row_block = blockIdx.x / column_blocks;
  const int64_t begin = row_block * rows_a_block, end = min(begin + rows_a_block, rows);
  float total[Width] = {};
  if (column < dim) {
    float tanh_gate[Width];
#pragma unroll
    for (int k = 0; k < Width; ++k) tanh_gate[k] = tanhf(gate.at(column + k));
    for (int64_t block = begin + threadIdx.y; block < end; block += kRowsASum * int64_t{blockDim.y}) {
      float sum[Width] = {};
      for (int i = 0; i < kRowsASum; i += kRowsAtOnce) {
        const NextRows next(block + i * int64_t{blockDim.y}, end, row_mask);
        Vector<G, Width> g[kRowsAtOnce];
        Vector<X, Width> b[kRowsAtOnce];
#pragma unroll
        for (int n = 0; n < kRowsAtOnce; ++n) {
          if (!next.is_open[n]) continue;
          g[n] = load<Width>(grad + (next.row[n] * dim + column));
          if (partials) b[n] = load<Width>(x + (next.row[n] * x_stride + column));
        }
#pragma unroll
        for (int n = 0; n < kRowsAtOnce; ++n) {
          if (!next.is_row[n]) break;
          Vector<X, Width> result;
#pragma unroll
          for (int k = 0; k < Width; ++k)
            result[k] = from_float<X>(next.is_open[n] ? tanh_gate[k] * to_float(g[n][k]) : 0.0f);
          if (partials && next.is_open[n]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) sum[k] = fmaf(to_float(g[n][k]), to_float(b[n][k]), sum[k]);
          }
          if (grad_x) store(grad_x + (next.row[n] * dim + column), result);
        }
      }
#pragma unroll
      for (int k = 0; k < Width; ++k) total[k] += sum[k];
    }
  }
  if (!partials) return;
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  if (gate.is_row) {
#pragma unroll
    for (int k = 0; k < Width; ++k) shared.columns[k * kThreads + thread] = total[k];
    __syncthreads();
    if (threadIdx.y == 0 && column < dim) {
#pragma unroll
      for (int k = 0; k < Width; ++k) {
        float sum = 0.0f;
        for (unsigned y = 0; y < blockDim.y; ++y) {
          const float of_row = shared.columns[k * kThreads + static_cast<int>(y * blockDim.x) + thread];
          sum += of_row;
        }
        partials[row_block * dim + column + k] = sum;
      }
    }
  } else {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < Width; ++k) sum += total[k];
    sum = block_sum(sum, shared.block);
    if (thread == 0) partials[blockIdx.x] = sum;
  }
}

// grad_gate[j] = (1 - tanh^2) * the sum over `count` rows of partials, in double: few numbers, and they may cancel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_columns_kernel(ReadOnly<float> partials, Gate gate, Global<T> grad_gate, int64_t count, int64_t dim) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= dim) return;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += partials[i * dim + column];
  grad_gate[column] = from_float<T>(tanh_slope(gate.at(column)) * static_cast<float>(sum));
}

struct FinishStorage {
  BlockSum<double> block;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_one_kernel(ReadOnly<float> partials, Gate gate, Global<T> grad_gate, int64_t count) {
  auto& shared = static_shared<FinishStorage>();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
  sum = block_sum(sum, shared.block);
  if (threadIdx.x == 0) grad_gate[0] = from_float<T>(tanh_slope(gate.at(0)) * static_cast<float>(sum));
}

Gate gate_of(const GatedResidual& p) {
  const auto if_type = [&](Dtype dtype) { return p.gate.dtype == dtype ? p.gate : View{}; };
  return {global<const float>(if_type(Dtype::float32)), global<const __half>(if_type(Dtype::float16)),
          global<const __nv_bfloat16>(if_type(Dtype::bfloat16)), p.gate_is_row()};
}

struct Tile {
  dim3 block;
  unsigned column_blocks;
  int64_t row_blocks, rows_a_block;
  unsigned blocks() const { return static_cast<unsigned>(column_blocks * row_blocks); }
};

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// As many threads along the columns as there is work for.
Tile tile_of(const GatedResidual& p, int width) {
  unsigned along = 1;
  while (along < kThreads && int64_t{along} * width < p.dim()) along *= 2;
  const int64_t column_blocks = std::max<int64_t>(1, divide_up(p.dim(), int64_t{along} * width));
  return {dim3(along, kThreads / along), static_cast<unsigned>(column_blocks), 0, 0};
}

// At most `most` rows for each thread, at least `least`, such that there are enough blocks.
int rows_a_thread(const GatedResidual& p, const Tile& tile, int most, int least) {
  while (most > least && divide_up(p.rows(), int64_t{tile.block.y} * most) * tile.column_blocks < kLeastBlocks)
    most /= 2;
  return most;
}

Tile backward_tile(const GatedResidual& p, int width) {
  Tile tile = tile_of(p, width);
  const int64_t least = int64_t{tile.block.y} * rows_a_thread(p, tile, kRowsBackward, kRowsASum);
  tile.rows_a_block = std::max(least, divide_up(p.rows(), std::max<int64_t>(1, kMostRowBlocks / tile.column_blocks)));
  tile.row_blocks = divide_up(p.rows(), tile.rows_a_block);
  return tile;
}

// The widest access that all the tensors allow, with 16 bytes for the widest of their elements.
int backward_width(const GatedResidual& p) {
  const int width = p.grad.dtype == Dtype::float32 || p.x.dtype == Dtype::float32 ? 4 : 8;
  const bool fits =
      p.dim() % width == 0 && is_aligned(p.grad, width) && is_aligned(p.x, width) && is_aligned(p.grad_x, width);
  return fits ? width : 1;
}

}  // namespace

void gated_residual_forward(const GatedResidual& p, Stream stream) {
  if (p.rows() == 0 || p.dim() == 0) return;
  with_type(p.residual.dtype, [&](auto r) {
    with_type(p.x.dtype, [&](auto b) {
      using R = decltype(r);
      using X = decltype(b);
      using O = std::conditional_t<std::is_same_v<R, X>, R, float>;
      constexpr int kMost = sizeof(O) == 4 ? 4 : 8;
      const auto run = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        Tile tile = tile_of(p, kWidth);
        const int of_thread = rows_a_thread(p, tile, kRowsForward, kRowsAtOnce);
        tile.row_blocks = divide_up(p.rows(), int64_t{tile.block.y} * of_thread);
        launch<forward_kernel<R, X, O, kWidth>>(
            tile.blocks(), tile.block, 0, stream, global<const R>(p.residual), global<const X>(p.x), gate_of(p),
            global<const unsigned char>(p.row_mask), global<O>(p.out), p.residual.stride[2], p.x.stride[2], p.rows(),
            p.dim(), tile.column_blocks, of_thread);
      };
      const bool fits =
          p.dim() % kMost == 0 && is_aligned(p.residual, kMost) && is_aligned(p.x, kMost) && is_aligned(p.out, kMost);
      if (fits)
        run(std::integral_constant<int, kMost>{});
      else
        run(std::integral_constant<int, 1>{});
    });
  });
}

int64_t gated_residual_partials(const GatedResidual& p) {
  if (p.rows() == 0 || p.dim() == 0) return 0;
  const Tile tile = backward_tile(p, backward_width(p));
  return tile.row_blocks * (p.gate_is_row() ? p.dim() : int64_t{tile.column_blocks});
}

void gated_residual_backward(const GatedResidual& p, Stream stream) {
  const int width = backward_width(p);
  const Tile tile = backward_tile(p, width);
  if (p.rows() > 0 && p.dim() > 0) {
    with_type(p.grad.dtype, [&](auto g) {
      with_type(p.x.dtype, [&](auto b) {
        using G = decltype(g);
        using X = decltype(b);
        // The gradient is in the type that residual and x promote to.
        if constexpr (std::is_same_v<G, X> || std::is_same_v<G, float>) {
          const auto run = [&](auto w) {
            launch<backward_kernel<G, X, decltype(w)::value>>(
                tile.blocks(), tile.block, 0, stream, global<const G>(p.grad), global<const X>(p.x), gate_of(p),
                global<const unsigned char>(p.row_mask), global<X>(p.grad_x), global<float>(p.partials), p.x.stride[2],
                p.rows(), p.dim(), tile.column_blocks, tile.rows_a_block);
          };
          if (width == 1)
            run(std::integral_constant<int, 1>{});
          else
            run(std::integral_constant < int, sizeof(G) == 4 || sizeof(X) == 4 ? 4 : 8 > {});
        } else {
          throw std::runtime_error("velm: gated_residual: the gradient must have the type of the result");
        }
      });
    });
  }
  if (!p.grad_gate) return;
  with_type(p.gate.dtype, [&](auto t) {
    using T = decltype(t);
    const auto partials = global<const float>(p.partials);
    if (p.gate_is_row())
      launch<finish_columns_kernel<T>>(static_cast<unsigned>(divide_up(p.dim(), kThreads)), kThreads, 0, stream,
                                       partials, gate_of(p), global<T>(p.grad_gate), p.rows() ? tile.row_blocks : 0,
                                       p.dim());
    else
      launch<finish_one_kernel<T>>(1, kThreads, 0, stream, partials, gate_of(p), global<T>(p.grad_gate),
                                   gated_residual_partials(p));
  });
}

}  // namespace velm::cuda
