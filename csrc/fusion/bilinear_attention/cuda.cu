// Bilinear attention: sums over k of h[g, k] v[i, k] q[j, k] for all glimpses g, regions i and words j, their softmax
// over all pairs, and its gradient. The products with the weights of pairs are in cuda_products.cu.
//
// Sums: 2 batch glimpses regions words k operations in matrix instructions (float32: three times as many). Beside each
// of them a lane multiplies two elements of q by h (float32: one for three, and splits it), rounded to the type of the
// tensors as the scaled rows of plain PyTorch are. A block has 64 regions and 8 units of 16 words of one glimpse, so
// that v and q are read once for 8 glimpses of up to 16 words: at 64 x 36 regions, 14 words, k = 3840 and 8 glimpses
// 25 MB in 16 bits for 2 GFLOP, or 3 with what is padded, which an H100 takes longer to read than to compute. There are
// 64 blocks there, so k is shared out among 256, whose sums, 4 MB, the softmax adds in a fixed order. Rows that do not
// count are zeros in the tiles, and what they give is replaced afterwards.
//
// The softmax and its gradient read what they need twice, the second time from caches: 4 bytes per part, and the type
// of the tensors for each map and gradient.

#include <algorithm>

#include "device/launch.h"
#include "device/reduce.h"
#include "fusion/bilinear_attention/cuda_tiles.h"

namespace velm::cuda {
namespace {

constexpr int kWords = 32, kSlots = 3;
// 16 words of a glimpse each; a warp has every other one of a block.
constexpr int kUnits = 8, kUnitWords = 16, kWarpUnits = kUnits / 2;

template <class T>
struct Scores {
  SideRows<T> v, q;
  ReadOnly<T> h;
  int64_t h_batch;
  int h_width;
  int batch, glimpses, k;
  // k of a part.
  int depth;
  unsigned unit_blocks, word_blocks, row_blocks;
  Global<float> to;
};

template <class T>
struct alignas(128) ScoreStorage {
  SharedArray<T, kSlots, kTile * kDepth<T>> v;
  SharedArray<T, kSlots, kWords * kDepth<T>> q;
  // Of glimpses half as many, but copies take 16 rows at a time.
  SharedArray<T, kSlots, 2 * kUnits * kDepth<T>> h;
  SharedArray<unsigned char, kTile + kWords> counts;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 3) pair_scores_kernel(const Scores<T> p) {
  auto& shared = static_shared<ScoreStorage<T>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 64 * 32, warp_half = thread / 32 % 2;
  unsigned task = blockIdx.x;
  const auto first_unit = static_cast<int>(task % p.unit_blocks) * kUnits;
  task /= p.unit_blocks;
  const auto first_word = static_cast<int>(task % p.word_blocks) * kWords;
  task /= p.word_blocks;
  const auto first_row = static_cast<int>(task % p.row_blocks) * kTile;
  task /= p.row_blocks;
  const auto b = static_cast<int>(task % static_cast<unsigned>(p.batch));
  const auto part = static_cast<int>(task / static_cast<unsigned>(p.batch));

  // What is behind the lengths is neither computed nor written.
  const int v_end = p.v.end(b), q_end = p.q.end(b);
  const int words = min(q_end - first_word, kWords), rows = min(v_end - first_row, kTile);
  // Units of a glimpse: 1 or 2. Of the number of a unit so many bits say which of them it is.
  const int unit_bits = words > kUnitWords ? 1 : 0, units = p.glimpses << unit_bits;
  if (words <= 0 || rows <= 0 || first_unit >= units) return;
  const int first_glimpse = first_unit >> unit_bits;
  const int begin = part * p.depth, end = min(begin + p.depth, p.k);
  {
    const int row = thread < kTile ? first_row + thread : first_word + thread - kTile;
    if (thread < kTile)
      shared.counts[thread] = p.v.counts(b, row, v_end);
    else if (thread < kTile + kWords)
      shared.counts[thread] = p.q.counts(b, row, q_end);
  }
  __syncthreads();

  int ahead = begin;
  const auto copy = [&](int slot) {
    if (ahead >= end) return;
    const auto copy_side = [&]<int kCount>(const Shared<T>& tile, const SideRows<T>& side, int first, int of_counts) {
      copy_rows<T, kDepth<T>, kCount>(tile, end - ahead, side.width, [&](int row) {
        const unsigned char is_there = shared.counts[of_counts + row];
        return is_there ? side.x + (side.at(b, first + row) + ahead) : Global<const T>(nullptr);
      });
    };
    copy_side.template operator()<kTile>(shared.v[slot], p.v, first_row, 0);
    copy_side.template operator()<kWords>(shared.q[slot], p.q, first_word, kTile);
    copy_rows<T, kDepth<T>, 2 * kUnits>(shared.h[slot], end - ahead, p.h_width, [&](int row) {
      const int g = first_glimpse + row;
      return row < kUnits && g < p.glimpses ? p.h + (b * p.h_batch + int64_t{g} * p.k + ahead)
                                            : Global<const T>(nullptr);
    });
    ahead += kDepth<T>;
  };
  Ring<kSlots> ring;
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) ring.fill(copy);

  const bool both = warp_row + 16 < rows;
  float sum[kWarpUnits][2][2][4] = {};
  for (int depth = begin; depth < end; depth += kDepth<T>) {
    const int slot = ring.next(copy);
    if (warp_row >= rows) continue;
    const Shared<T> v = shared.v[slot], q = shared.q[slot], h = shared.h[slot];
    // Zeros follow up to a whole number of granules.
    const int products = (min(end - depth, kDepth<T>) + kGranule<T> - 1) / kGranule<T> * 2;
#pragma unroll 1
    for (int k = 0; k < products; ++k) {
      Operand<T, 4> a[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_rows<T>(a[m], v, warp_row + 16 * m, k);
#pragma unroll
      for (int u = 0; u < kWarpUnits; ++u) {
        const int unit = first_unit + 2 * u + warp_half;
        if (unit >= units) break;
        const int g = (unit >> unit_bits) - first_glimpse;
        const int row = (unit & unit_bits) * kUnitWords + lane % 8 + lane / 16 * 8;
        uint32_t of_q[4], of_h[2];
        ldmatrix<4>(of_q, pointer_cast<__half>(q + row * kDepth<T>) + ((2 * k + lane / 8 % 2) ^ swap_of(row)) * 8);
        const auto factors = pointer_cast<uint32_t>(h + g * kDepth<T>);
#pragma unroll
        for (int i = 0; i < 2; ++i) of_h[i] = factors[((2 * k + i) ^ swap_of(g)) * 4 + member];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          Operand<T, 2> scaled;
#pragma unroll
          for (int i = 0; i < 2; ++i) scaled.set(i, multiply_words<T>(of_q[2 * n + i], of_h[i]));
          multiply_operands<T>(sum[u][0][n], a[0], scaled);
          if (both) multiply_operands<T>(sum[u][1][n], a[1], scaled);
        }
      }
    }
  }

#pragma unroll
  for (int u = 0; u < kWarpUnits; ++u) {
    const int unit = first_unit + 2 * u + warp_half;
    if (unit >= units) break;
    const int64_t matrix = (int64_t{part} * p.batch + b) * p.glimpses + (unit >> unit_bits);
    const int column = (unit & unit_bits) * kUnitWords + 2 * member;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * m + 8 * half + group;
        const Global<float> to = p.to + ((matrix * p.v.rows + first_row + row) * p.q.rows + first_word + column);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            store_if(row < rows && column + 8 * n + i < words, to + (8 * n + i), sum[u][m][n][2 * half + i]);
      }
  }
}

// Blocks of the softmax, which have a glimpse of an entry of the batch.
constexpr int kMapThreads = 512;

// The pairs of one entry of the batch.
template <class T>
struct PairsOf {
  const SideRows<T>&v, &q;
  int64_t b;
  int v_end, q_end;

  DEVICE_INLINE PairsOf(const SideRows<T>& v, const SideRows<T>& q, int64_t b)
      : v(v), q(q), b(b), v_end(v.end(b)), q_end(q.end(b)) {}
  DEVICE_INLINE bool counts(int at) const {
    const int row = at / q.rows;
    return v.counts(b, row, v_end) && q.counts(b, at - row * q.rows, q_end);
  }
};

template <class T>
struct Maps {
  SideRows<T> v, q;
  int glimpses, parts;
  int64_t part_stride;
  Global<float> sums;
  ReadOnly<T> bias;
  Global<T> maps, logits;
};

struct MapStorage {
  BlockSum<float> sum;
  SharedArray<float, 32> largest;
};

// The largest in a block, in every thread. NaN is passed over.
DEVICE_INLINE float block_max(float value, SharedArray<float, 32>& storage) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, step));
  if (lane == 0) storage[warp] = value;
  __syncthreads();
  value = lane < kMapThreads / 32 ? float{storage[lane]} : -kInfinity;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, step));
  return value;
}

template <class T>
__global__ void __launch_bounds__(kMapThreads, 2) pair_maps_kernel(const Maps<T> p) {
  auto& shared = static_shared<MapStorage>();
  const int thread = static_cast<int>(threadIdx.x), size = p.v.rows * p.q.rows;
  const int64_t first = int64_t{blockIdx.x} * size;
  const auto g = static_cast<int>(blockIdx.x) % p.glimpses;
  const PairsOf<T> pairs(p.v, p.q, static_cast<int>(blockIdx.x) / p.glimpses);
  const Global<float> sums = p.sums + first;
  const float bias = p.bias ? to_float(p.bias[g]) : 0.0f;
  float largest = -kInfinity, total = 0.0f;
  bool has_pairs = false;
  for (int at = thread; at < size; at += kMapThreads) {
    float score = p.maps ? -kInfinity : 0.0f;
    if (pairs.counts(at)) {
      has_pairs = true;
      score = 0.0f;
      for (int part = 0; part < p.parts; ++part) score += sums[part * p.part_stride + at];
      score += bias;
    }
    if (p.logits) p.logits[first + at] = from_float<T>(score);
    if (!p.maps) continue;
    sums[at] = score;
    const float larger = fmaxf(largest, score), base = larger == -kInfinity ? 0.0f : larger;
    total = total * expf(largest - base) + expf(score - base);
    largest = larger;
  }
  if (!p.maps) return;
  const float whole = block_max(largest, shared.largest), base = whole == -kInfinity ? 0.0f : whole;
  total = block_sum(total * expf(largest - base), shared.sum);
  // Of pairs with nothing but -inf, 0 divided by 0.
  const float scale = __syncthreads_or(has_pairs) ? 1.0f / total : 0.0f;
  for (int at = thread; at < size; at += kMapThreads) {
    // A NaN is that of all pairs, but not of what is no pair.
    const float score = sums[at], weight = pairs.counts(at) ? expf(score - base) * scale : 0.0f;
    p.maps[first + at] = from_float<T>(weight);
  }
}

template <class T>
struct Slopes {
  SideRows<T> v, q;
  int glimpses;
  ReadOnly<T> maps, grad_maps, grad_logits;
  Global<T> slopes;
  Global<float> of_bias;
};

struct SlopeStorage {
  BlockSum<float> along, of_bias;
};

template <class T>
__global__ void __launch_bounds__(kMapThreads, 2) pair_slopes_kernel(const Slopes<T> p) {
  auto& shared = static_shared<SlopeStorage>();
  const int thread = static_cast<int>(threadIdx.x), size = p.v.rows * p.q.rows;
  const int64_t first = int64_t{blockIdx.x} * size;
  const PairsOf<T> pairs(p.v, p.q, static_cast<int>(blockIdx.x) / p.glimpses);
  float along = 0.0f, of_bias = 0.0f;
  for (int at = thread; at < size; at += kMapThreads) {
    if (!pairs.counts(at)) continue;
    if (p.grad_maps) along = fmaf(to_float(p.maps[first + at]), to_float(p.grad_maps[first + at]), along);
    if (p.grad_logits) of_bias += to_float(p.grad_logits[first + at]);
  }
  along = block_sum(along, shared.along);
  of_bias = block_sum(of_bias, shared.of_bias);
  if (thread == 0) p.of_bias[blockIdx.x] = of_bias;
  for (int at = thread; at < size; at += kMapThreads) {
    float slope = 0.0f;
    if (pairs.counts(at)) {
      if (p.grad_maps) slope = to_float(p.maps[first + at]) * (to_float(p.grad_maps[first + at]) - along);
      if (p.grad_logits) slope += to_float(p.grad_logits[first + at]);
    }
    p.slopes[first + at] = from_float<T>(slope);
  }
}

// How the sums are shared out. Nothing but shapes decides, so that all devices give the same bits.
struct Plan {
  int64_t unit_blocks, word_blocks, row_blocks, depth, parts;

  explicit Plan(const Pairs& p)
      : unit_blocks(divide_up(p.glimpses * (p.q.rows() > kUnitWords ? 2 : 1), kUnits)),
        word_blocks(divide_up(p.q.rows(), kWords)),
        row_blocks(divide_up(p.v.rows(), kTile)) {
    // A part leaves 8 bytes, written and read, for each of its sums: at most half of what it reads.
    const auto of_k = static_cast<int64_t>(bytes_of(p.dtype())) * (p.v.rows() + p.q.rows());
    const int64_t least =
        std::max<int64_t>(256, 16 * p.glimpses * p.v.rows() * p.q.rows() / std::max<int64_t>(1, of_k));
    const int64_t blocks = std::max<int64_t>(1, p.batch() * row_blocks * word_blocks * unit_blocks);
    const int64_t most_parts = std::max<int64_t>(1, kBlocks / blocks);
    // 64 is a whole number of tiles of any type.
    depth = divide_up(std::max(least, divide_up(p.k(), most_parts)), 64) * 64;
    parts = std::max<int64_t>(1, divide_up(p.k(), depth));
  }
};

}  // namespace

int64_t pair_score_parts(const Pairs& p) {
  return Plan(p).parts;
}

void pair_scores(const Pairs& p, const View& h, const View& sums, Stream stream) {
  if (p.count() == 0) return;
  const Plan plan(p);
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    Scores<T> s{};
    s.v = side_of<T>(p.v);
    s.q = side_of<T>(p.q);
    s.h = global<const T>(h);
    s.h_batch = h.stride[1];
    s.h_width = copy_width(h);
    s.batch = static_cast<int>(p.batch());
    s.glimpses = static_cast<int>(p.glimpses);
    s.k = static_cast<int>(p.k());
    s.depth = static_cast<int>(plan.depth);
    s.unit_blocks = static_cast<unsigned>(plan.unit_blocks);
    s.word_blocks = static_cast<unsigned>(plan.word_blocks);
    s.row_blocks = static_cast<unsigned>(plan.row_blocks);
    s.to = global<float>(sums);
    const int64_t blocks = plan.parts * p.batch() * plan.row_blocks * plan.word_blocks * plan.unit_blocks;
    launch<pair_scores_kernel<T>>(static_cast<unsigned>(blocks), kThreads, 0, stream, s);
  });
}

void pair_maps(const Pairs& p, const PairMaps& m, Stream stream) {
  if (p.count() == 0) return;
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    Maps<T> maps{};
    maps.v = side_of<T>(p.v);
    maps.q = side_of<T>(p.q);
    maps.glimpses = static_cast<int>(p.glimpses);
    maps.parts = static_cast<int>(Plan(p).parts);
    maps.part_stride = p.count();
    maps.sums = global<float>(m.sums);
    maps.bias = global<const T>(m.bias);
    maps.maps = global<T>(m.maps);
    maps.logits = global<T>(m.logits);
    launch<pair_maps_kernel<T>>(static_cast<unsigned>(p.batch() * p.glimpses), kMapThreads, 0, stream, maps);
  });
}

void pair_slopes(const Pairs& p, const PairSlopes& m, Stream stream) {
  if (p.batch() * p.glimpses == 0) return;
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    Slopes<T> slopes{};
    slopes.v = side_of<T>(p.v);
    slopes.q = side_of<T>(p.q);
    slopes.glimpses = static_cast<int>(p.glimpses);
    slopes.maps = global<const T>(m.maps);
    slopes.grad_maps = global<const T>(m.grad_maps);
    slopes.grad_logits = global<const T>(m.grad_logits);
    slopes.slopes = global<T>(m.slopes);
    slopes.of_bias = global<float>(m.of_bias);
    launch<pair_slopes_kernel<T>>(static_cast<unsigned>(p.batch() * p.glimpses), kMapThreads, 0, stream, slopes);
  });
}

}  // namespace velm::cuda
