// z[b, k] = sum_ij x[b, i] W[k, i, j] y[b, j] + bias[k] and the gradients of x and y. Nothing of the size of the outer
// product is written to memory.
//
// Forward: for each i, t = y W_i^T by matrix instructions, W_i being the rows i of all W_k, and z += x[:, i] t in
// registers. The other order, one product whose left operand x[b, i] y[b, j] is generated, takes as many operations:
// each has 2 rows out dx dy in matrix instructions, and beside them either order has 32 multiplications per lane for 64
// (float32: 32) columns j of a warp's 32 x 32 results: of t by x, or of fragments of y by x, two elements at a time but
// for float32, which would have to be split anew for its three products besides. They read the same: W once for each
// tile of 64 rows (those that run side by side find it in the L2 cache), and y and x for each tile of outputs. The
// order taken keeps t in float32, where a generated operand would be rounded to 16 bits, and in float16 overflow.
// Fragments of y stay in registers while i runs over 16 rows of W, so that for a product of 32 x 32 x 16 only 32 x 16
// of W come from shared memory.
//
// Gradients of x and y: for each i, G = grad W_i in the same way (a tile of W is now used by rows and not by columns),
// from which grad_y += x[:, i] G and grad_x[:, i] = sum_j y G are taken while it is in registers.
//
// At 64 rows, 512 x 512 -> 256, they read 134 MB of W in 16 bits and the gradient of W (cuda_weight.cu) writes as
// much, while the 128 operations for two of these bytes are less than a third of what an H100 can do while it moves
// them: memory is what they wait for. There are 4 tiles of z there, or 8 of grad_y, so i is shared out among blocks
// until there are 256 of them; their sums are added by a second kernel in a fixed order.

#include <algorithm>

#include "device/launch.h"
#include "fusion/bilinear/cuda.h"
#include "fusion/cuda_sums.h"
#include "fusion/tiles_cuda.h"

namespace velm::cuda {
namespace {

constexpr int kWarpTile = 32;
// Rows i of the weight for which fragments are kept.
constexpr int kSteps = 16;
constexpr int kSlots = 4;

// Forward: `a` is y, and the columns of the results are outputs. Backward: `a` is grad, the columns are those of y.
template <class T>
struct Contraction {
  ReadOnly<T> x, a, y, weight, bias;
  int64_t x_stride, a_stride, y_stride, out_stride, row_stride;
  int x_width, a_width, weight_width;
  // Rows of the weight that begin at no multiple of 4 bytes are copied from the element before them on.
  bool shifts;
  int64_t rows;
  int dx, depth, columns;
  // i of a block.
  int steps;
  unsigned row_blocks, column_blocks;
  // (parts, rows, columns) and (column_blocks, rows, dx)
  Sink<T> to, grad_x;
};

template <class T, bool kBackward>
struct alignas(128) Storage {
  SharedArray<T, kSlots, kTile * kDepth<T>> ring;
  // The last element of rows that are out of step, and one that does not matter.
  SharedArray<T, kSlots, sizeof(T) == 2 ? 2 * kTile : 2> last;
  // By i, so that neither eight rows nor sixteen i of two rows meet in a bank.
  SharedArray<float, kSteps, kTile + 2> x;
  // Of each half of the columns.
  SharedArray<float, 2, kBackward ? kSteps : 1, kTile + 2> grad_x;
};

// Begins to copy rows of 16-bit elements whose beginnings, `first` and multiples of `stride` from there, are at even
// and at odd elements, as those of tensor_fusion are with its 1 in front. Copies of less than 4 bytes are not
// asynchronous, so an odd row is copied from the element before it on, which `align` puts right. A warp copies a row at
// a time.
template <class T>
DEVICE_INLINE void copy_odd_rows(const Shared<T>& tile, const Shared<T>& last, ReadOnly<T> from, int64_t first,
                                 int64_t stride, int rows, int dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 2
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kTile; row += kWarps) {
    const int64_t at = first + row * stride;
    const int left = row < rows ? dim : -1, odd = static_cast<int>(at & 1), column = 2 * lane - odd;
    cp_async<4>(tile + (row * kTile + ((2 * lane) ^ (swap_of(row) * kChunk<T>))),
                from + (left > column ? at + column : 0), min(max(left - column, 0), 2) * 2);
    if (odd && lane == 31)
      cp_async<4>(last + 2 * row, from + (left > column + 2 ? at + column + 2 : 0),
                  min(max(left - column - 2, 0), 2) * 2);
  }
}

// All threads of a block take part; a barrier follows.
template <class T>
DEVICE_INLINE void align(const Shared<T>& tile, const Shared<T>& last, int64_t first, int64_t stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kTile; row += kWarps) {
    if (((first + row * stride) & 1) == 0) continue;
    const auto words = pointer_cast<uint32_t>(tile + row * kTile);
    const int swap = swap_of(row) * 4;
    const uint32_t low = words[lane ^ swap];
    uint32_t high = words[(lane + 1) % 32 ^ swap];
    if (lane == 31) high = pointer_cast<uint32_t>(last)[row];
    __syncwarp();
    words[lane ^ swap] = low >> 16 | high << 16;
  }
}

// 32 rows of `a`, as matrix instructions take them.
template <class T>
struct Fragments {
  static constexpr int kCount = kDepth<T> / kProduct<T>;
  Operand<T, 4> of[kCount][2];

  DEVICE_INLINE void load(const Shared<T>& tile, int first_row) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) load_rows<T>(of[k][m], tile, first_row + 16 * m, k);
    }
  }
};

// t = a W of one i for 8 or 16 columns from `column` on. A tile of W has the columns of the results below each other,
// kBackward: side by side.
template <class T, bool kBackward, int kEights>
DEVICE_INLINE void multiply_columns(float (&t)[2][kEights][4], const Fragments<T>& a, const Shared<T>& tile, int column,
                                    int products) {
#pragma unroll
  for (int k = 0; k < Fragments<T>::kCount; ++k) {
    if (k >= products) break;
    uint32_t b[2 * kEights];
    if constexpr (!kBackward) {
      static_assert(kEights == 2);
      const int lane = static_cast<int>(threadIdx.x) % 32, row = column + lane % 8 + lane / 16 * 8;
      ldmatrix<4>(b, pointer_cast<__half>(tile + row * kDepth<T>) + ((2 * k + lane / 8 % 2) ^ swap_of(row)) * 8);
    } else {
      load_columns<T, 2 * kEights>(b, tile, column, k);
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      Operand<T, 2> one;
#pragma unroll
      for (int i = 0; i < 2; ++i) one.set(i, b[2 * n + i]);
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_operands<T>(t[m][n], a.of[k][m], one);
    }
  }
}

// The sum of value[q] over four neighbouring lanes, in the lane with number q among them.
DEVICE_INLINE float sum_of_quad(const float (&value)[4]) {
  const int member = static_cast<int>(threadIdx.x) % 4;
  float kept[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float given = member & 2 ? value[i] : value[2 + i];
    kept[i] = (member & 2 ? value[2 + i] : value[i]) + __shfl_xor_sync(kAll, given, 2);
  }
  const float given = member & 1 ? kept[0] : kept[1];
  return (member & 1 ? kept[1] : kept[0]) + __shfl_xor_sync(kAll, given, 1);
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && !kBackward ? 3 : 2)
    contraction_kernel(const Contraction<T> p) {
  auto& shared = static_shared<Storage<T, kBackward>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 64 * kWarpTile, warp_half = thread / 32 % 2, warp_column = warp_half * kWarpTile;
  const int64_t first_row = int64_t{blockIdx.x % p.row_blocks} * kTile, rows = min(p.rows - first_row, int64_t{kTile});
  const auto column_block = static_cast<int>(blockIdx.x / p.row_blocks % p.column_blocks);
  const auto part = static_cast<int>(blockIdx.x / p.row_blocks / p.column_blocks);
  const int first_column = column_block * kTile, columns = min(p.columns - first_column, kTile);
  const int begin = part * p.steps, end = min(begin + p.steps, p.dx);

  // For kSteps i their columns of x; then for every piece of the depth a tile of a and one of the weight for each i.
  enum { kOfX = -2, kOfA = -1 };
  struct {
    int first, depth, item;
  } ahead = {begin, 0, kOfX};
  const auto weight_at = [&](int i, int depth) {
    return i * p.row_stride + (kBackward ? depth * p.out_stride + first_column : first_column * p.out_stride + depth);
  };
  const auto copy = [&](int slot) {
    if (ahead.first >= end) return;
    const int count = min(kSteps, end - ahead.first), depth = p.depth - ahead.depth;
    const int64_t of_weight = weight_at(ahead.first + ahead.item, ahead.depth);
    if (sizeof(T) == 2 && p.shifts && ahead.item >= 0) {
      copy_odd_rows<T>(shared.ring[slot], shared.last[slot], p.weight, of_weight, p.out_stride,
                       kBackward ? depth : columns, kBackward ? columns : depth);
    } else if (kBackward && ahead.item >= 0) {
      copy_tile<T, kTile, kDepth<T>>(shared.ring[slot], p.weight + of_weight, p.out_stride, depth, columns,
                                     p.weight_width);
    } else {
      const bool of_x = ahead.item == kOfX, of_a = ahead.item == kOfA;
      const Global<const T> from = of_x   ? p.x + (first_row * p.x_stride + ahead.first)
                                   : of_a ? p.a + (first_row * p.a_stride + ahead.depth)
                                          : p.weight + of_weight;
      copy_tile<T, kDepth<T>, kTile>(shared.ring[slot], from,
                                     of_x   ? p.x_stride
                                     : of_a ? p.a_stride
                                            : p.out_stride,
                                     of_x || of_a ? static_cast<int>(rows) : columns, of_x ? count : depth,
                                     of_x   ? p.x_width
                                     : of_a ? p.a_width
                                            : p.weight_width);
    }
    if (++ahead.item < count) return;
    ahead.item = kOfA;
    ahead.depth += kDepth<T>;
    if (ahead.depth < p.depth) return;
    ahead = {ahead.first + kSteps, 0, kOfX};
  };
  Ring<kSlots> ring;
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) ring.fill(copy);

  [[maybe_unused]] float y[2][4][4] = {};
  if constexpr (kBackward) {
    if (p.grad_x) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = warp_row + 16 * m + e / 2 * 8 + group, column = warp_column + 8 * n + 2 * member + e % 2;
            y[m][n][e] =
                to_float(load_if(row < rows && column < columns,
                                 p.y + ((first_row + row) * p.y_stride + first_column + column), from_float<T>(0.0f)));
          }
    }
  }

  float sum[2][4][4] = {};
  for (int first = begin; first < end; first += kSteps) {
    const int count = min(kSteps, end - first);
    int slot = ring.next(copy);
    {
      const Shared<T> tile = shared.ring[slot];
      for (int at = thread; at < kSteps * kTile; at += kThreads) {
        const int row = at / kSteps, i = at % kSteps;
        const T value = tile[row * kDepth<T> + (i ^ (swap_of(row) * kChunk<T>))];
        shared.x[i][row] = to_float(value);
      }
    }
    for (int depth = 0; depth == 0 || depth < p.depth; depth += kDepth<T>) {
      slot = ring.next(copy);
      Fragments<T> a;
      a.load(shared.ring[slot], warp_row);
      // Zeros follow up to a whole number of granules.
      const int products = (min(p.depth - depth, kDepth<T>) + kGranule<T> - 1) / kGranule<T> * 2;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        slot = ring.next(copy);
        if (sizeof(T) == 2 && p.shifts) {
          align<T>(shared.ring[slot], shared.last[slot], weight_at(first + i, depth), p.out_stride);
          __syncthreads();
        }
        if (warp_row >= rows) continue;
        float x[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) x[q] = shared.x[i][warp_row + 8 * q + group];
        [[maybe_unused]] float of_x[4] = {};
        // Columns that are computed at once: of float32 there are no registers for more.
        constexpr int kEights = sizeof(T) == 4 && kBackward ? 1 : 2;
#pragma unroll
        for (int first_n = 0; first_n < 4; first_n += kEights) {
          if (warp_column + 8 * first_n >= columns) break;
          float t[2][kEights][4] = {};
          multiply_columns<T, kBackward, kEights>(t, a, shared.ring[slot], warp_column + 8 * first_n, products);
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kEights; ++n)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                float& to = sum[m][first_n + n][e];
                to = fmaf(x[2 * m + e / 2], t[m][n][e], to);
                if constexpr (kBackward)
                  of_x[2 * m + e / 2] = fmaf(y[m][first_n + n][e], t[m][n][e], of_x[2 * m + e / 2]);
              }
        }
        if constexpr (kBackward) {
          if (p.grad_x) {
            // Always the same lane's.
            const float whole = sum_of_quad(of_x);
            const int row = warp_row + 8 * member + group;
            shared.grad_x[warp_half][i][row] = depth == 0 ? whole : shared.grad_x[warp_half][i][row] + whole;
          }
        }
      }
    }
    if constexpr (kBackward) {
      if (p.grad_x) {
        __syncthreads();
        for (int at = thread; at < kSteps * kTile; at += kThreads) {
          const int row = at / kSteps, i = at % kSteps;
          if (row >= rows || i >= count) continue;
          const float value = shared.grad_x[0][i][row] + shared.grad_x[1][i][row];
          p.grad_x.put((column_block * p.rows + first_row + row) * p.dx + first + i, value);
        }
      }
    }
  }

  if (kBackward && !p.to) return;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp_row + 16 * m + e / 2 * 8 + group, column = warp_column + 8 * n + 2 * member + e % 2;
        if (row >= rows || column >= columns) continue;
        float value = sum[m][n][e];
        if (!kBackward && p.bias) value += to_float(p.bias[first_column + column]);
        p.to.put((part * p.rows + first_row + row) * p.columns + first_column + column, value);
      }
}

// How the results of a contraction are shared out. Nothing but shapes decides, so that all devices give the same bits.
struct Plan {
  int64_t row_blocks, column_blocks, steps, parts;

  Plan(const Bilinear& p, int64_t depth, int64_t columns)
      : row_blocks(divide_up(p.rows(), kTile)), column_blocks(std::max<int64_t>(1, divide_up(columns, kTile))) {
    // A part leaves 8 bytes, written and read, for each result, and reads at least 2 * depth for each i: at most an
    // eighth of that, and never less than a copy of 16 bytes from each row of x.
    const int64_t least = std::max<int64_t>(8, 2048 / std::max<int64_t>(1, depth));
    const int64_t most_parts = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, row_blocks * column_blocks));
    steps = divide_up(std::max(least, divide_up(p.dx(), most_parts)), 8) * 8;
    parts = std::max<int64_t>(1, divide_up(p.dx(), steps));
  }
  int64_t blocks() const { return row_blocks * column_blocks * parts; }
};

Plan forward_plan(const Bilinear& p) {
  return Plan(p, p.dy(), p.out());
}
Plan backward_plan(const Bilinear& p) {
  return Plan(p, p.out(), p.dy());
}
int64_t count_of(int64_t parts, int64_t rows, int64_t columns) {
  return parts > 1 ? parts * rows * columns : 0;
}

// What lies behind the first `count` floats.
View behind(View floats, int64_t count) {
  const auto bytes = static_cast<size_t>(count) * sizeof(float);
  floats.data = static_cast<char*>(floats.data) + bytes;
  floats.bytes -= bytes;
  floats.size[3] -= count;
  return floats;
}

template <class T>
Contraction<T> contraction_of(const Bilinear& p, const Plan& plan) {
  Contraction<T> c{};
  c.x = global<const T>(p.x);
  c.weight = global<const T>(p.weight);
  c.x_stride = p.x.stride[2];
  c.out_stride = p.weight.stride[1];
  c.row_stride = p.weight.stride[2];
  c.x_width = copy_width(p.x);
  c.weight_width = copy_width(p.weight);
  c.shifts = c.weight_width == 2 && reinterpret_cast<uintptr_t>(p.weight.data) % 4 == 0;
  c.rows = p.rows();
  c.dx = static_cast<int>(p.dx());
  c.steps = static_cast<int>(plan.steps);
  c.row_blocks = static_cast<unsigned>(plan.row_blocks);
  c.column_blocks = static_cast<unsigned>(plan.column_blocks);
  return c;
}

}  // namespace

int64_t bilinear_forward_partials(const Bilinear& p) {
  return count_of(forward_plan(p).parts, p.rows(), p.out());
}

int64_t bilinear_backward_partials(const Bilinear& p, bool wants_x, bool wants_y) {
  const Plan plan = backward_plan(p);
  return (wants_x ? count_of(plan.column_blocks, p.rows(), p.dx()) : 0) +
         (wants_y ? count_of(plan.parts, p.rows(), p.dy()) : 0);
}

void bilinear_forward(const Bilinear& p, Stream stream) {
  if (p.rows() == 0 || p.out() == 0) return;
  const Plan plan = forward_plan(p);
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    Contraction<T> c = contraction_of<T>(p, plan);
    c.a = global<const T>(p.y);
    c.a_stride = p.y.stride[2];
    c.a_width = copy_width(p.y);
    c.depth = static_cast<int>(p.dy());
    c.columns = static_cast<int>(p.out());
    if (plan.parts > 1) {
      c.to.partials = global<float>(p.partials);
    } else {
      c.to.results = global<T>(p.z);
      c.bias = global<const T>(p.bias);
    }
    launch<contraction_kernel<T, false>>(static_cast<unsigned>(plan.blocks()), kThreads, 0, stream, c);
    if (plan.parts > 1) sum_parts(p.partials, p.bias, p.z, plan.parts, stream);
  });
}

void bilinear_backward(const Bilinear& p, Stream stream) {
  const Plan plan = backward_plan(p);
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    if (p.grad_x || p.grad_y) {
      const int64_t of_x = p.grad_x ? count_of(plan.column_blocks, p.rows(), p.dx()) : 0;
      const Global<float> partials = global<float>(p.partials);
      Contraction<T> c = contraction_of<T>(p, plan);
      c.a = global<const T>(p.grad);
      c.y = global<const T>(p.y);
      c.a_stride = p.grad.stride[2];
      c.y_stride = p.y.stride[2];
      c.a_width = copy_width(p.grad);
      c.depth = static_cast<int>(p.out());
      c.columns = static_cast<int>(p.dy());
      if (of_x)
        c.grad_x.partials = partials;
      else
        c.grad_x.results = global<T>(p.grad_x);
      if (p.grad_y && plan.parts > 1)
        c.to.partials = partials + of_x;
      else
        c.to.results = global<T>(p.grad_y);
      launch<contraction_kernel<T, true>>(static_cast<unsigned>(plan.blocks()), kThreads, 0, stream, c);
      if (of_x) sum_parts(p.partials, {}, p.grad_x, plan.column_blocks, stream);
      if (p.grad_y && plan.parts > 1) sum_parts(behind(p.partials, of_x), {}, p.grad_y, plan.parts, stream);
    }
  });
  if (p.grad_weight) bilinear_grad_weight(p, stream);
  if (p.grad_bias) sum_rows(p.grad, p.grad_bias, stream);
}

}  // namespace velm::cuda
