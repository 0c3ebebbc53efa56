// sum_r w_r prod_m ([1; x_m] F_m[r]) + b, and the gradients d_m of the projections P_m[r] = [1; x_m] F_m[r].
//
// Forward: a block has 64 x 64 of the results and makes all their projections, one rank and one input after the other,
// by matrix instructions; product over inputs and sum over ranks are in registers. These are 2 rank out (1 + d_m)
// operations for each row of x_m. A tile of x and one of F, of 128 bytes per row each, are read for 64 x 64 x 128 bytes
// of depth: 2 rank sum_m d_m bytes of an element / 64 for a result, or in 16 bits 32 operations per byte. Neighbouring
// blocks share F, which comes from the L2 cache then. Projections that backward wants are written once, in float32. An
// input with one row for several of the results is projected first, by the same kernel, and read: 4 rank bytes a
// result, of which the neighbours find theirs in the caches. Where there are few tiles of results, ranks are shared out
// among blocks, whose sums a second kernel adds in their order.
//
// Backward: d_m = grad w_r prod of the other P, for which a thread goes through memory once: it reads the projections
// and grad and writes what is wanted. With d of some hundreds, d_m F_m^T and [1; x_m]^T d_m take two thirds of all
// operations; they are plain products of matrices, which torch's library brings to the limit of the matrix units
// (wgmma on an H100), as the 64 x 64 tiles of mma.sync here would not. So d_m is written in the type of the tensors,
// (rows of m, ranks * out), and Python does these products. Nothing but moving bytes limits this kernel: for a rank and
// a column 4 and the size of an element for each input, and grad once. The rows of the result that one row of x serves
// are one thread's, which sums their d_m, or a few threads' where there would be too few of them: Python adds these
// sums before its products.
//
// Projections that were not kept are made again for some ranks at a time, by the kernel of forward: in registers they
// would be those of all inputs at once, 32 per lane each. It costs 8 bytes for each, where 2 (1 + d_m) operations go
// before.

#include <algorithm>

#include "device/launch.h"
#include "device/reduce.h"
#include "fusion/cuda_sums.h"
#include "fusion/low_rank_fusion/cuda.h"
#include "fusion/tiles_cuda.h"

namespace velm::cuda {
namespace {

constexpr int kWarpTile = 32;
constexpr int kSlots = 3;

template <class T>
struct Input {
  ReadOnly<T> x, factor;
  // (rank, rows, out)
  Global<float> projections;
  bool is_projected;
  int x_width, factor_width;
  int64_t x_stride, rows;
  int dim;
  // Rows of the result that one of x serves.
  int repeat;
};

template <class T>
struct Fusion {
  Input<T> inputs[kMostInputs];
  int count;
  ReadOnly<T> weight, bias;
  // (parts, rows, out)
  Global<float> partials;
  Global<T> results;
  int rows, out, rank;
  // Ranks of a block.
  int steps;
  unsigned row_blocks, column_blocks;
};

template <class T>
struct alignas(128) FusionStorage {
  SharedArray<T, kSlots, kTile * kDepth<T>> x;
  SharedArray<T, kSlots, kDepth<T> * kTile> factor;
};

// t += x factor for 32 rows and 32 columns, as far as these are wanted.
template <class T>
DEVICE_INLINE void multiply_tiles(float (&t)[2][4][4], const Shared<T>& x, const Shared<T>& factor, int first_row,
                                  int first_column, int columns, int products) {
  // Not unrolled: there are no registers for the addresses of more.
#pragma unroll 1
  for (int k = 0; k < products; ++k) {
    Operand<T, 4> a[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_rows<T>(a[m], x, first_row + 16 * m, k);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      if (first_column + 16 * pair >= columns) break;
      uint32_t b[4];
      load_columns<T, 4>(b, factor, first_column + 16 * pair, k);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        Operand<T, 2> right;
#pragma unroll
        for (int i = 0; i < 2; ++i) right.set(i, b[2 * n + i]);
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_operands<T>(t[m][2 * pair + n], a[m], right);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2) fusion_kernel(const Fusion<T> p) {
  auto& shared = static_shared<FusionStorage<T>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 64 * kWarpTile, warp_column = thread / 32 % 2 * kWarpTile;
  const int first_row = static_cast<int>(blockIdx.x % p.row_blocks) * kTile, rows = min(p.rows - first_row, kTile);
  const int first_column = static_cast<int>(blockIdx.x / p.row_blocks % p.column_blocks) * kTile;
  const auto part = static_cast<int>(blockIdx.x / p.row_blocks / p.column_blocks);
  const int columns = min(p.out - first_column, kTile);
  const int begin = part * p.steps, end = min(begin + p.steps, p.rank);

  // Pieces of the depth of every input that is not projected yet, for every rank.
  struct {
    int r, input, depth;
  } ahead = {begin, 0, 0};
  const auto copy = [&](int slot) {
    while (ahead.r < end && (p.inputs[ahead.input].is_projected || ahead.depth >= p.inputs[ahead.input].dim)) {
      ahead.depth = 0;
      if (++ahead.input < p.count) continue;
      ahead.input = 0;
      ++ahead.r;
    }
    if (ahead.r >= end) return;
    const Input<T>& input = p.inputs[ahead.input];
    const int left = input.dim - ahead.depth;
    copy_tile<T, kDepth<T>, kTile>(shared.x[slot], input.x + (int64_t{first_row} * input.x_stride + ahead.depth),
                                   input.x_stride, rows, left, input.x_width);
    const int64_t row = int64_t{ahead.r} * (1 + input.dim) + 1 + ahead.depth;
    copy_tile<T, kTile, kDepth<T>>(shared.factor[slot], input.factor + (row * p.out + first_column), p.out, left,
                                   columns, input.factor_width);
    ahead.depth += kDepth<T>;
  };
  Ring<kSlots> ring;
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) ring.fill(copy);

  const auto row_of = [&](int m, int e) { return warp_row + 16 * m + e / 2 * 8 + group; };
  const auto column_of = [&](int n, int e) { return warp_column + 8 * n + 2 * member + e % 2; };
  float sum[2][4][4] = {};
#pragma unroll 1
  for (int r = begin; r < end; ++r) {
    const float weight = p.weight ? to_float(p.weight[r]) : 1.0f;
    float product[2][4][4];
#pragma unroll
    for (auto& of_rows : product)
#pragma unroll
      for (auto& of_columns : of_rows)
#pragma unroll
        for (float& x : of_columns) x = weight;
#pragma unroll 1
    for (int index = 0; index < p.count; ++index) {
      const Input<T>& input = p.inputs[index];
      const Global<float> projections = input.projections + (r * input.rows * p.out + first_column);
      float t[2][4][4];
      if (input.is_projected) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = row_of(m, 2 * half);
            const Global<float> from = projections + int64_t{(first_row + row) / input.repeat} * p.out;
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                t[m][n][2 * half + i] = row < rows && column_of(n, i) < columns ? float(from[column_of(n, i)]) : 0.0f;
          }
      } else {
        const Global<const T> one = input.factor + (int64_t{r} * (1 + input.dim) * p.out + first_column);
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float of_one =
                to_float(load_if(column_of(n, i) < columns, one + column_of(n, i), from_float<T>(0.0f)));
#pragma unroll
            for (int m = 0; m < 2; ++m) t[m][n][i] = t[m][n][2 + i] = of_one;
          }
#pragma unroll 1
        for (int depth = 0; depth < input.dim; depth += kDepth<T>) {
          const int slot = ring.next(copy);
          // Zeros follow up to a whole number of granules.
          const int products = (min(input.dim - depth, kDepth<T>) + kGranule<T> - 1) / kGranule<T> * 2;
          if (warp_row < rows)
            multiply_tiles<T>(t, shared.x[slot], shared.factor[slot], warp_row, warp_column, columns, products);
        }
        if (input.projections) {
          const bool in_pairs = p.out % 2 == 0;
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
              for (int e = 0; e < 4; e += 2) {
                if (row_of(m, e) >= rows || column_of(n, e) >= columns) continue;
                const Global<float> to = projections + (int64_t{first_row + row_of(m, e)} * p.out + column_of(n, e));
                if (in_pairs) {
                  store(to, Vector<float, 2>{t[m][n][e], t[m][n][e + 1]});
                } else {
                  to[0] = t[m][n][e];
                  store_if(column_of(n, e) + 1 < columns, to + 1, t[m][n][e + 1]);
                }
              }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) product[m][n][e] *= t[m][n][e];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] += product[m][n][e];
  }

  if (!p.partials && !p.results) return;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (row_of(m, e) >= rows || column_of(n, e) >= columns) continue;
        const int column = first_column + column_of(n, e);
        const int64_t at = (int64_t{part} * p.rows + first_row + row_of(m, e)) * p.out + column;
        if (p.partials)
          p.partials[at] = sum[m][n][e];
        else
          p.results[at] = from_float<T>(p.bias ? sum[m][n][e] + to_float(p.bias[column]) : sum[m][n][e]);
      }
}

// Nothing but shapes decides, so that all devices give the same bits.
struct Plan {
  int64_t row_blocks, column_blocks, steps, parts;

  explicit Plan(const LowRankFusion& p)
      : row_blocks(divide_up(p.rows(), kTile)), column_blocks(divide_up(p.out(), kTile)) {
    const int64_t tiles = std::max<int64_t>(1, row_blocks * column_blocks);
    // Projections alone are no sum.
    const int64_t most = p.z ? std::max<int64_t>(1, kBlocks / tiles) : p.rank();
    steps = std::max<int64_t>(1, divide_up(p.rank(), std::max<int64_t>(1, most)));
    parts = std::max<int64_t>(1, divide_up(p.rank(), steps));
  }
};

constexpr int kAcross = 32, kDown = kThreads / kAcross;

template <class T>
struct Gradients {
  ReadOnly<T> grad, weight;
  ReadOnly<float> projections[kMostInputs];
  int64_t input_rows[kMostInputs];
  Global<T> to[kMostInputs];
  Global<float> sums;
  int count;
  // Rows of the result that belong together, because one row of some input serves them; `entries` of them, each in
  // `pieces` of `piece` rows.
  int unit, entries, pieces, piece, pieces_of_block;
  int out, ranks;
  unsigned column_blocks, blocks;
};

struct GradientsStorage {
  BlockSum<float> sum;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) gradients_kernel(const Gradients<T> p) {
  auto& shared = static_shared<GradientsStorage>();
  const unsigned block = blockIdx.x % p.blocks;
  const auto r = static_cast<int>(blockIdx.x / p.blocks);
  const int column = (static_cast<int>(block % p.column_blocks) * kAcross + static_cast<int>(threadIdx.x)) * kWidth;
  const int first = static_cast<int>(block / p.column_blocks) * p.pieces_of_block;
  const int last = column < p.out ? min(first + p.pieces_of_block, p.entries * p.pieces) : first;
  const float weight = to_float(p.weight[r]);
  float sum = 0.0f;
#pragma unroll 1
  for (int piece = first + static_cast<int>(threadIdx.y); piece < last; piece += kDown) {
    float product[kMostInputs][kWidth] = {}, held[kMostInputs][kWidth] = {};
    const int entry = piece / p.pieces, begin = entry * p.unit + piece % p.pieces * p.piece;
    const int end = min(begin + p.piece, (entry + 1) * p.unit);
    for (int row = begin; row < end; ++row) {
      const auto grad = load<kWidth>(p.grad + (int64_t{row} * p.out + column));
      float before[kWidth], after[kWidth], others[kMostInputs][kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        before[i] = to_float(grad[i]);
        after[i] = weight;
      }
#pragma unroll
      for (int m = 0; m < kMostInputs; ++m) {
        if (m >= p.count) continue;
        const bool serves_all = p.input_rows[m] == p.entries;
        if (!serves_all || row == begin) {
          const auto one =
              load<kWidth>(p.projections[m] + ((r * p.input_rows[m] + (serves_all ? entry : row)) * p.out + column));
#pragma unroll
          for (int i = 0; i < kWidth; ++i) product[m][i] = one[i];
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          others[m][i] = before[i];
          before[i] *= product[m][i];
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += before[i];
#pragma unroll
      for (int m = kMostInputs - 1; m >= 0; --m) {
        if (m >= p.count) continue;
        const bool serves_all = p.input_rows[m] == p.entries, is_last = row + 1 == end;
        Vector<T, kWidth> values;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float gradient = others[m][i] * after[i];
          after[i] *= product[m][i];
          held[m][i] = serves_all ? held[m][i] + gradient : gradient;
          values[i] = from_float<T>(held[m][i]);
        }
        if (p.to[m] && (!serves_all || is_last))
          store(p.to[m] + ((int64_t{serves_all ? piece : row} * p.ranks + r) * p.out + column), values);
      }
    }
  }
  const float total = block_sum(sum, shared.sum);
  if (threadIdx.x == 0 && threadIdx.y == 0) p.sums[blockIdx.x] = total;
}

bool fits_vectors(const LowRankGradients& p) {
  bool fits = p.out() % 4 == 0 && is_aligned(p.grad, 4);
  for (int m = 0; m < p.count; ++m) fits = fits && is_aligned(p.projections[m], 4) && is_aligned(p.to[m], 4);
  return fits;
}

// Nothing but shapes decides here either.
struct GradientsPlan {
  int64_t entries, unit, pieces, piece;

  explicit GradientsPlan(const LowRankGradients& p) : entries(p.rows()) {
    for (int m = 0; m < p.count; ++m) entries = std::min(entries, p.input_rows(m));
    unit = entries > 0 ? p.rows() / entries : 1;
    // Warps of the widest accesses, and rows for which what a piece leaves does not count.
    constexpr int64_t kWanted = 4096, kLeast = 8;
    const int64_t warps = std::max<int64_t>(1, entries * divide_up(p.out(), kAcross * 4) * p.ranks());
    piece = std::min(unit, std::max(kLeast, divide_up(unit, divide_up(kWanted, warps))));
    pieces = divide_up(unit, piece);
  }
};

struct GradientsBlocks {
  int64_t columns, pieces_of_block, blocks;

  GradientsBlocks(const LowRankGradients& p, const GradientsPlan& plan)
      : columns(divide_up(p.out(), kAcross * (fits_vectors(p) ? 4 : 1))),
        // More than one per thread where they are short.
        pieces_of_block((plan.unit == 1 ? 4 : 1) * kDown),
        blocks(columns * divide_up(plan.entries * plan.pieces, pieces_of_block)) {}
};

}  // namespace

int64_t low_rank_partials(const LowRankFusion& p) {
  const Plan plan(p);
  return p.z && plan.parts > 1 ? plan.parts * p.rows() * p.out() : 0;
}

void low_rank_fusion(const LowRankFusion& p, Stream stream) {
  if (p.rows() == 0 || p.out() == 0) return;
  const Plan plan(p);
  const bool is_apart = low_rank_partials(p) > 0;
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    Fusion<T> f{};
    for (int m = 0; m < p.count; ++m) {
      const LowRankInput& from = p.inputs[m];
      Input<T>& to = f.inputs[m];
      to.x = global<const T>(from.x);
      to.factor = global<const T>(from.factor);
      to.projections = global<float>(from.projections);
      to.is_projected = from.is_projected;
      to.x_width = copy_width(from.x);
      to.factor_width = copy_width(from.factor);
      to.x_stride = from.x.stride[2];
      to.rows = from.x.size[2];
      to.dim = static_cast<int>(from.x.size[3]);
      to.repeat = static_cast<int>(p.rows() / from.x.size[2]);
    }
    f.count = p.count;
    f.weight = global<const T>(p.weight);
    if (is_apart) {
      f.partials = global<float>(p.partials);
    } else {
      f.bias = global<const T>(p.bias);
      f.results = global<T>(p.z);
    }
    f.rows = static_cast<int>(p.rows());
    f.out = static_cast<int>(p.out());
    f.rank = static_cast<int>(p.rank());
    f.steps = static_cast<int>(plan.steps);
    f.row_blocks = static_cast<unsigned>(plan.row_blocks);
    f.column_blocks = static_cast<unsigned>(plan.column_blocks);
    const int64_t blocks = plan.row_blocks * plan.column_blocks * plan.parts;
    launch<fusion_kernel<T>>(static_cast<unsigned>(blocks), kThreads, 0, stream, f);
  });
  if (is_apart) sum_parts(p.partials, p.bias, p.z, plan.parts, stream);
}

int64_t low_rank_gradient_rows(const LowRankGradients& p, int m) {
  const GradientsPlan plan(p);
  return p.input_rows(m) * (p.input_rows(m) == plan.entries ? plan.pieces : 1);
}

int64_t low_rank_gradient_blocks(const LowRankGradients& p) {
  return GradientsBlocks(p, GradientsPlan(p)).blocks;
}

void low_rank_gradients(const LowRankGradients& p, Stream stream) {
  const GradientsPlan plan(p);
  const GradientsBlocks of_rank(p, plan);
  if (of_rank.blocks == 0 || p.ranks() == 0) return;
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    Gradients<T> g{};
    g.grad = global<const T>(p.grad);
    g.weight = global<const T>(p.weight);
    for (int m = 0; m < p.count; ++m) {
      g.projections[m] = global<const float>(p.projections[m]);
      g.input_rows[m] = p.input_rows(m);
      g.to[m] = global<T>(p.to[m]);
    }
    g.sums = global<float>(p.sums);
    g.count = p.count;
    g.entries = static_cast<int>(plan.entries);
    g.unit = static_cast<int>(plan.unit);
    g.pieces = static_cast<int>(plan.pieces);
    g.piece = static_cast<int>(plan.piece);
    g.pieces_of_block = static_cast<int>(of_rank.pieces_of_block);
    g.out = static_cast<int>(p.out());
    g.ranks = static_cast<int>(p.ranks());
    g.column_blocks = static_cast<unsigned>(of_rank.columns);
    g.blocks = static_cast<unsigned>(of_rank.blocks);
    const auto blocks = static_cast<unsigned>(of_rank.blocks * p.ranks());
    if (fits_vectors(p))
      launch<gradients_kernel<T, 4>>(blocks, dim3(kAcross, kDown), 0, stream, g);
    else
      launch<gradients_kernel<T, 1>>(blocks, dim3(kAcross, kDown), 0, stream, g);
  });
}

}  // namespace velm::cuda
