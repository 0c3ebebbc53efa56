// The products of bilinear attention with weights of pairs w: t[g, i, k] = sum_j w[g, i, j] q[j, k], from which, while
// it is in registers, the gradient of a side, sum_g h[g, k] t, and what the pairs pool to, sum_i v[i, k] t, are taken.
// The first is also the gradient of v when the weights are the slopes of logits or, with the gradient of the pooled
// features as h, attention; with the sides exchanged, that of q. The second is the pooled features or, summed over the
// batch, the gradient of h: of one t with that of v.
//
// 2 batch glimpses regions words k operations in matrix instructions (float32: three times as many); beside them one of
// a lane for each element of t and each of the two results, for every 32 j, so that products of few words wait for
// those: 4 of a lane for one or two matrix instructions. Read are the other side once for every 64 rows (16 or 32 where
// there are no more, and then by warps that have different columns), weights once for each tile of columns, mostly from
// caches, and of one's own side what is multiplied by, once. At 64 x 36 regions, 14 words, k = 3840 and 8 glimpses the
// gradients of v and h read 25 MB in 16 bits and write 18, and 8 for the gradient of h; weights, 0.5 MB, are asked for
// 60 times.
//
// The gradient of a side with few rows and columns has few blocks: what it is summed over is not shared out.

#include <algorithm>

#include "device/launch.h"
#include "fusion/bilinear_attention/cuda_tiles.h"

namespace velm::cuda {
namespace {

// Rows of the other side in a tile, and glimpses for which tiles are read once.
constexpr int kOthers = 32, kGroup = 8, kSlots = 2;

template <class T>
struct Products {
  // Of the rows of `own` there is a gradient.
  SideRows<T> own, other;
  ReadOnly<T> weights, h;
  int own_stride, other_stride;
  int64_t h_batch;
  // Not there if only pooled features are asked for.
  Global<T> grad;
  int grad_width;
  Sink<T> joint;
  int batch, glimpses, k;
  // Warps of a block with different rows; the others have different columns.
  int row_warps;
  unsigned column_blocks, row_blocks;
};

template <class T>
struct alignas(128) ProductStorage {
  SharedArray<T, kSlots, kWarps, kOthers * kDepth<T>> other;
  SharedArray<float, kGroup, kWarps * kDepth<T>> h;
  // Of the rows of a warp.
  SharedArray<float, kWarps, kGroup, kDepth<T>> joint;
};

// One of two lanes has the sums of the first half of the values, the other those of the second.
template <int kHalf, int kCount>
DEVICE_INLINE void sum_halves(float (&values)[kCount], int step) {
  const bool upper = static_cast<int>(threadIdx.x) & step;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? values[i] : values[kHalf + i], kept = upper ? values[kHalf + i] : values[i];
    values[i] = kept + __shfl_xor_sync(kAll, given, step);
  }
}
// Sums over the eight lanes with the same number in their quads: the first kCount / 8 values of lane / 4 are those from
// lane / 4 * kCount / 8 on.
template <int kCount>
DEVICE_INLINE void sum_over_groups(float (&values)[kCount]) {
  sum_halves<kCount / 2>(values, 16);
  sum_halves<kCount / 4>(values, 8);
  sum_halves<kCount / 8>(values, 4);
}

template <class T, bool kJoint>
__global__ void __launch_bounds__(kThreads, kJoint ? 2 : 3) pair_products_kernel(const Products<T> p) {
  auto& shared = static_shared<ProductStorage<T>>();
  constexpr int kColumns = kDepth<T> / 8;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int group = lane / 4, member = lane % 4;
  const int tiles = kWarps / p.row_warps, tile = warp / p.row_warps, warp_row = warp % p.row_warps * 16;
  const auto first_column = static_cast<int>(blockIdx.x % p.column_blocks) * tiles * kDepth<T>;
  const auto row_block = static_cast<int>(blockIdx.x / p.column_blocks % p.row_blocks);
  const auto b = static_cast<int>(blockIdx.x / p.column_blocks / p.row_blocks);
  const int first_row = row_block * p.row_warps * 16 + warp_row, column = first_column + tile * kDepth<T>;
  const int columns = min(p.k - column, kDepth<T>);
  const int own_end = p.own.end(b);
  const bool counts[2] = {p.own.counts(b, first_row + group, own_end), p.own.counts(b, first_row + group + 8, own_end)};
  // Rows that count are not multiplied by those of the other side where no pair has them, NaN included.
  const bool works = __any_sync(kAll, counts[0] || counts[1]) && columns > 0;
  // Nothing to sum up for rows behind the last that counts.
  const int others = first_row - warp_row < own_end ? p.other.end(b) : 0;

  [[maybe_unused]] float own[kColumns][4];
  if constexpr (kJoint) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = 8 * n + 2 * member + e % 2;
        own[n][e] = to_float(load_if(counts[e / 2] && at < columns,
                                     p.own.x + (p.own.at(b, first_row + group + e / 2 * 8) + column + at),
                                     from_float<T>(0.0f)));
      }
  }

  float sum[kColumns][4] = {};
  for (int first = 0; first < p.glimpses; first += kGroup) {
    const int glimpses = min(p.glimpses - first, kGroup);
    __syncthreads();
    if (p.grad)
      for (int at = thread; at < glimpses * kWarps * kDepth<T>; at += kThreads) {
        const int g = at / (kWarps * kDepth<T>), of_g = at % (kWarps * kDepth<T>);
        shared.h[g][of_g] = to_float(load_if(of_g < tiles * kDepth<T> && first_column + of_g < p.k,
                                             p.h + (b * p.h_batch + int64_t{first + g} * p.k + first_column + of_g),
                                             from_float<T>(0.0f)));
      }
    if constexpr (kJoint) {
      for (int at = lane; at < kGroup * kDepth<T>; at += 32) shared.joint[warp][at / kDepth<T>][at % kDepth<T>] = 0.0f;
    }
    int ahead = 0;
    const auto copy = [&](int slot) {
      if (ahead >= others) return;
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        const int from = first_column + i * kDepth<T>;
        if (from >= p.k) break;
        copy_rows<T, kDepth<T>, kOthers>(shared.other[slot][i], p.k - from, p.other.width, [&](int row) {
          return p.other.counts(b, ahead + row, others) ? p.other.x + (p.other.at(b, ahead + row) + from)
                                                        : Global<const T>(nullptr);
        });
      }
      ahead += kOthers;
    };
    Ring<kSlots> ring;
    ring.fill(copy);
    for (int j = 0; j < others; j += kOthers) {
      const int slot = ring.next(copy);
      if (!works) continue;
      const Shared<T> other = shared.other[slot][tile];
      const bool both = j + 16 < others;
      unsigned seen = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        seen |= static_cast<unsigned>(p.other.counts(b, j + i / 2 * 8 + 2 * member + i % 2, others)) << i;
      if (!__any_sync(kAll, seen)) continue;
      // Weights of a glimpse: while its products are computed, those of the next are on their way.
      T next[4][4];
      const auto fetch = [&](int g) {
        const auto of_g = p.weights + (int64_t{b} * p.glimpses + g) * p.own.rows * p.other.rows;
        const int at = (first_row + group) * p.own_stride + (j + 2 * member) * p.other_stride;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            next[i][e] =
                load_if(counts[e / 2] && (seen >> (2 * i + e % 2) & 1),
                        of_g + (at + e / 2 * 8 * p.own_stride + (8 * i + e % 2) * p.other_stride), from_float<T>(0.0f));
      };
      fetch(first);
#pragma unroll 1
      for (int g = 0; g < glimpses; ++g) {
        float a[2][2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i / 2][i % 2][e] = to_float(next[i][e]);
        if (g + 1 < glimpses) fetch(first + g + 1);
        float t[kColumns][4] = {};
        multiply<T, kDepth<T>, 2, false>(t, a[0], other, columns, 0);
        if (both) multiply<T, kDepth<T>, 2, false>(t, a[1], other + 16 * kDepth<T>, columns, 0);
        if (p.grad) {
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            const auto factors = load<2>(&shared.h[g][tile * kDepth<T> + 8 * n + 2 * member]);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[n][e] = fmaf(factors[e % 2], t[n][e], sum[n][e]);
          }
        }
        if constexpr (kJoint) {
          constexpr int kOwn = kColumns / 4;
          float of_rows[2 * kColumns];
#pragma unroll
          for (int n = 0; n < kColumns; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) of_rows[2 * n + i] = fmaf(own[n][i], t[n][i], own[n][2 + i] * t[n][2 + i]);
          sum_over_groups(of_rows);
          // Always the same lane's.
          const int number = group * kOwn;
          const auto to = &shared.joint[warp][g][number / 2 * 8 + 2 * member + number % 2];
          auto whole = load<kOwn>(to);
#pragma unroll
          for (int i = 0; i < kOwn; ++i) whole[i] += of_rows[i];
          store(to, whole);
        }
      }
    }
    if constexpr (kJoint) {
      __syncthreads();
      for (int at = thread; at < glimpses * tiles * kDepth<T>; at += kThreads) {
        const int g = at / (tiles * kDepth<T>), of_g = at % (tiles * kDepth<T>);
        if (first_column + of_g >= p.k) continue;
        float whole = 0.0f;
        for (int i = 0; i < p.row_warps; ++i) {
          const float more = shared.joint[of_g / kDepth<T> * p.row_warps + i][g][of_g % kDepth<T>];
          whole += more;
        }
        const int64_t matrix = (int64_t{row_block} * p.batch + b) * p.glimpses + first + g;
        p.joint.put(matrix * p.k + first_column + of_g, whole);
      }
    }
  }

  if (!p.grad) return;
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[n][e] = counts[e / 2] ? sum[n][e] : 0.0f;
  // Tiles are read no more.
  __syncthreads();
  store_rows<T, kDepth<T>>(shared.other[0][warp], sum, columns, p.grad_width, [&](int row) {
    const int of = first_row + row;
    return of < p.own.rows ? p.grad + ((int64_t{b} * p.own.rows + of) * p.k + column) : Global<T>(nullptr);
  });
}

// Warps of a block that have different rows of a side with so many.
int row_warps_of(int64_t rows) {
  return rows > 32 ? 4 : rows > 16 ? 2 : 1;
}
int64_t row_blocks_of(int64_t rows) {
  return std::max<int64_t>(1, divide_up(rows, 16 * row_warps_of(rows)));
}

template <class T, bool kJoint>
void run(const Pairs& p, const PairProducts& m, Stream stream) {
  const PairSide &own = m.of_v ? p.v : p.q, &other = m.of_v ? p.q : p.v;
  Products<T> s{};
  s.own = side_of<T>(own);
  s.other = side_of<T>(other);
  s.weights = global<const T>(m.weights);
  s.h = global<const T>(m.h);
  s.own_stride = m.of_v ? static_cast<int>(p.q.rows()) : 1;
  s.other_stride = m.of_v ? 1 : static_cast<int>(p.q.rows());
  s.h_batch = m.h.stride[1];
  s.grad = global<T>(m.grad);
  s.grad_width = copy_width(m.grad);
  if (m.joint.dtype == Dtype::float32)
    s.joint.partials = global<float>(m.joint);
  else
    s.joint.results = global<T>(m.joint);
  s.batch = static_cast<int>(p.batch());
  s.glimpses = static_cast<int>(p.glimpses);
  s.k = static_cast<int>(p.k());
  s.row_warps = row_warps_of(own.rows());
  s.row_blocks = static_cast<unsigned>(row_blocks_of(own.rows()));
  s.column_blocks = static_cast<unsigned>(divide_up(p.k(), int64_t{kWarps / s.row_warps} * kDepth<T>));
  const int64_t blocks = p.batch() * s.row_blocks * s.column_blocks;
  if (blocks) launch<pair_products_kernel<T, kJoint>>(static_cast<unsigned>(blocks), kThreads, 0, stream, s);
}

}  // namespace

int64_t pair_joint_pieces(const Pairs& p) {
  return row_blocks_of(p.v.rows());
}

void pair_products(const Pairs& p, const PairProducts& m, Stream stream) {
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    if (m.joint)
      run<T, true>(p, m, stream);
    else if (m.grad)
      run<T, false>(p, m, stream);
  });
}

}  // namespace velm::cuda
