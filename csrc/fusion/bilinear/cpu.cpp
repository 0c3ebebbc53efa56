// z_k = x^T W_k y and its gradients without the outer product of x and y.
//
// Rows of x, y and the gradient are packed as fp32 with a tile's worth of them side by side, so that one matrix of the
// weight meets all of them in registers: a tile of W_k y^T is summed against x where it was computed, and a tile of
// g W is summed against y and added to the gradient of y times x. The order of additions depends on the shape alone.

#include <algorithm>
#include <vector>

#include "common/tensor.h"
#include "simd/layout.h"
#include "simd/pages.h"
#include "simd/parallel.h"
#include "simd/scratch.h"
#include "simd/tile.h"
#include "simd/transpose.h"

namespace velm {
namespace {

using namespace simd;

constexpr int kV = 2;
constexpr int kN = kV * kLanes;
constexpr int kR = kTileRows<kV>;
// Rows of a tile for what is left of a dimension after the whole tiles.
constexpr int kFew = kR / 3;
// Depth of a tile between two sums: kR rows of it stay in the first-level cache.
constexpr int64_t kDepth = 384;
// Row length of what is that deep, known to the compiler: rows of a tile are one address and constants.
constexpr int64_t kDeep = padded(kDepth);
// Batch rows between two visits of a part of the weight.
constexpr int64_t kBatchBlock = 512;
constexpr int64_t kBatchStride = padded(kBatchBlock);
// Columns past whole vectors that are summed one by one.
constexpr int64_t kTails = kLanes / 4;
// fp32 numbers of the weight rearranged at a time: half of a second-level cache of 1 MiB.
constexpr int64_t kRearranged = 131072;
// The gradient of y is summed in this many parts at the most, for this many rows of the batch at a time.
constexpr int64_t kParts = 16, kSlab = 1024;
// Rows of the weight of such a part at the least.
constexpr int64_t kPart = 4;
// Rows of the weight that are copied and used at a time, and fp32 numbers that they and those after them may have.
constexpr int64_t kStack = 8 * kR, kStacked = 49152;
// Tasks that forward is cut into at least, where the outputs are fewer.
constexpr int64_t kTasks = 16;

// Equal pieces of a length, none longer than `most`.
int64_t piece_of(int64_t length, int64_t most) {
  return divide_up(length, std::max<int64_t>(1, divide_up(length, most)));
}

// A matrix (rows, columns) as fp32 panels of kN rows: element (b, c) at panel b / kN, row c, lane b % kN. Lanes past
// the last row are zero.
struct Packed {
  float* data;
  int64_t rows, columns;

  float* panel(int64_t tile) const { return data + tile * columns * kN; }
  int64_t tiles() const { return divide_up(rows, kN); }
  // Vectors of a tile that hold rows.
  int vectors(int64_t tile) const { return rows - tile * kN > kLanes ? 2 : 1; }
};

Packed empty_panels(Scratch& memory, int64_t rows, int64_t columns) {
  return {memory.take(round_up(rows, kN) * columns), rows, columns};
}

Packed pack(Scratch& memory, const Tensor& matrix) {
  const Packed packed = empty_panels(memory, matrix.size(0), matrix.size(1));
  with_type(matrix.scalar_type(), [&](auto t) {
    const auto* from = const_data<decltype(t)>(matrix);
    const int64_t stride = matrix.stride(0);
    parallel_items(packed.tiles(), [&](int64_t tile) {
      const int64_t rows = std::min<int64_t>(kN, packed.rows - tile * kN);
      float* to = packed.panel(tile);
      if (rows <= kN - kLanes) std::fill_n(to, packed.columns * kN, 0.0f);
      transpose_to(to, kN, from + tile * kN * stride, stride, rows, packed.columns);
    });
  });
  return packed;
}

// The rows of panels back in a contiguous matrix.
void unpack(const Packed& packed, const Tensor& matrix, int64_t first_row) {
  with_type(matrix.scalar_type(), [&](auto t) {
    auto* to = mutable_data<decltype(t)>(matrix);
    parallel_items(packed.tiles(), [&](int64_t tile) {
      const int64_t rows = std::min<int64_t>(kN, packed.rows - tile * kN);
      transpose_from(to + (first_row + tile * kN) * packed.columns, packed.columns, packed.panel(tile), kN, rows,
                     packed.columns);
    });
  });
}

// Memory that tiles ask for while they compute, `bytes` over `calls` tiles of this depth: at the most a cache line
// every two steps.
struct Prefetch {
  const char* at;
  int64_t pace, share;

  Prefetch(const void* first, int64_t bytes, int64_t calls, int64_t depth) : at(static_cast<const char*>(first)) {
    const int64_t steps = std::max<int64_t>(1, depth / 2);
    pace = std::clamp<int64_t>(divide_up(bytes, std::max<int64_t>(1, calls) * steps), 0, 64);
    share = pace * steps;
  }
  const char* next() {
    at += share;
    return at - share;
  }
};

// Adds a product to a tile, and every two steps of the depth asks for the memory at `ahead`, then `pace` bytes on: what
// is needed next, where no prefetcher of the processor would guess it. Any address may be asked for.
template <int R, int V>
VELM_INLINE void multiply(Tile<R, V>& tile, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                          const float* b, const char* ahead, int64_t pace) {
  for (; depth >= 2; depth -= 2) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += pace;
    tile.multiply_add(2, a, a_row, a_depth, b, kN);
    a += 2 * a_depth;
    b += 2 * kN;
  }
  if (depth > 0) tile.multiply_add(1, a, a_row, a_depth, b, kN);
}

// Calls f(R, V) with the size of a tile as constants.
template <class F>
VELM_INLINE void with_tile(int64_t rows, int vectors, const F& f) {
  if (rows > kFew)
    vectors == 2 ? f(std::integral_constant<int, kR>{}, std::integral_constant<int, 2>{})
                 : f(std::integral_constant<int, kR>{}, std::integral_constant<int, 1>{});
  else
    vectors == 2 ? f(std::integral_constant<int, kFew>{}, std::integral_constant<int, 2>{})
                 : f(std::integral_constant<int, kFew>{}, std::integral_constant<int, 1>{});
}

// sums (a lane each, `lanes` apart for outputs) += sum over rows r of x[r] * (a[r] . y), for `rows` rows of a,
// kDeep apart, of which the first one is row `at` of its output.
__attribute__((noinline)) void forward_tile(int64_t rows, int vectors, int64_t depth, const float* a, const float* y,
                                            const float* x, int64_t at, int64_t height, float* sums, int64_t lanes,
                                            const char* ahead, int64_t pace) {
  with_tile(rows, vectors, [&](auto tile_rows, auto tile_vectors) {
    Tile<tile_rows, tile_vectors> tile;
    tile.clear();
    multiply(tile, depth, a, kDeep, 1, y, ahead, pace);
    Vec sum[tile_vectors];
    const float* from = x + at * kN;
    int64_t next = height - at;
    unroll<tile_vectors>([&](auto v) VELM_INLINE_LAMBDA { sum[v] = load(sums + v * kLanes); });
    unroll<tile_rows>([&](auto r) VELM_INLINE_LAMBDA {
      if (r >= rows) return;
      if (r == next) {
        unroll<tile_vectors>([&](auto v) VELM_INLINE_LAMBDA { store(sums + v * kLanes, sum[v]); });
        sums += lanes;
        from -= height * kN;
        next += height;
        unroll<tile_vectors>([&](auto v) VELM_INLINE_LAMBDA { sum[v] = load(sums + v * kLanes); });
      }
      unroll<tile_vectors>(
          [&](auto v) VELM_INLINE_LAMBDA { sum[v] = fma(tile.c[r][v], load(from + r * kN + v * kLanes), sum[v]); });
    });
    unroll<tile_vectors>([&](auto v) VELM_INLINE_LAMBDA { store(sums + v * kLanes, sum[v]); });
  });
}

// The weight of `count` outputs between rows [first, first + height) of x, against all rows of the batch:
// sums (count, tiles, kN). The rows of the outputs follow one another, so that tiles are full whatever the height.
template <class W>
void forward_task(const W* weight, int64_t out_stride, int64_t row_stride, int64_t count, int64_t first, int64_t height,
                  const Packed& x, const Packed& y, float* a, float* sums) {
  const int64_t lanes = x.tiles() * kN, total = count * height;
  std::fill_n(sums, count * lanes, 0.0f);
  const int64_t depth = piece_of(y.columns, kDepth), pieces = divide_up(y.columns, std::max<int64_t>(1, depth));
  const int64_t stack = std::clamp<int64_t>(kStacked / std::max<int64_t>(1, y.columns) / kR * kR, kR, kStack);
  const auto row = [&](int64_t r) { return weight + r / height * out_stride + (first + r % height) * row_stride; };
  constexpr int64_t kTiles = kBatchBlock / kN;
  for (int64_t block = 0; block < x.tiles(); block += kTiles) {
    const int64_t end = std::min(block + kTiles, x.tiles());
    for (int64_t r = 0; r < total; r += stack) {
      const int64_t some = std::min(stack, total - r), next = r + some;
      Prefetch ahead(row(next < total ? next : 0), std::min(stack, total - next) * row_stride * sizeof(W),
                     pieces * (end - block) * divide_up(some, kR), depth);
      for (int64_t j = 0; j < y.columns; j += depth) {
        const int64_t width = std::min(depth, y.columns - j);
        for (int64_t i = 0; i < some; ++i) convert(a + i * kDeep, row(r + i) + j, width);
        for (int64_t t = block; t < end; ++t)
          for (int64_t i = 0; i < some; i += kR)
            forward_tile(std::min<int64_t>(kR, some - i), x.vectors(t), width, a + i * kDeep, y.panel(t) + j * kN,
                         x.panel(t) + first * kN, (r + i) % height, height, sums + (r + i) / height * lanes + t * kN,
                         lanes, ahead.next(), ahead.pace);
      }
    }
  }
}

// Outputs of a task of forward: as few as leave next to no tile half empty, if that makes tasks enough.
int64_t outputs_of_task(int64_t out, int64_t height) {
  int64_t best = 1;
  const auto waste = [&](int64_t count) {
    return static_cast<double>(round_up(count * height, kR)) / static_cast<double>(count * height);
  };
  for (int64_t count = 2; count <= std::min<int64_t>(kR, out / kTasks); ++count)
    if (waste(count) < waste(best) - 0.02) best = count;
  return best;
}

void bilinear_forward(Tensor x, Tensor y, Tensor weight, std::optional<Tensor> bias, Tensor z) {
  const int64_t rows = x.size(0), out = weight.size(0), dx = weight.size(1);
  if (rows == 0 || out == 0) return;
  Scratch memory;
  const Packed packed_x = pack(memory, x), packed_y = pack(memory, y);
  const int64_t lanes = packed_x.tiles() * kN;
  const int64_t height = round_up(std::max<int64_t>(1, divide_up(dx, std::max<int64_t>(1, kTasks / out))), kR);
  const int64_t pieces = std::max<int64_t>(1, divide_up(dx, height));
  const int64_t group = pieces > 1 || dx == 0 ? 1 : outputs_of_task(out, dx), groups = divide_up(out, group);
  float* sums = memory.take(pieces * out * lanes);
  with_type(weight.scalar_type(), [&](auto t) {
    const auto* w = const_data<decltype(t)>(weight);
    const int64_t out_stride = weight.stride(0), row_stride = weight.stride(1);
    parallel_ranges(pieces * groups, 1, [&](int64_t begin, int64_t end) {
      Scratch own;
      float* a = own.take(kStack * kDeep);
      std::fill_n(a, kStack * kDeep, 0.0f);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / groups * height, k = task % groups * group;
        forward_task(w + k * out_stride, out_stride, row_stride, std::min(group, out - k), first,
                     std::min(height, dx - first), packed_x, packed_y, a, sums + (task / groups * out + k) * lanes);
      }
    });
    parallel_ranges(out, 32768 / lanes, [&](int64_t begin, int64_t end) {
      const auto* added = bias ? const_data<decltype(t)>(*bias) : nullptr;
      for (int64_t k = begin; k < end; ++k) {
        const float first = added ? to_float(added[k]) : 0.0f;
        for (int64_t b = 0; b < lanes; ++b) {
          float sum = sums[k * lanes + b];
          for (int64_t p = 1; p < pieces; ++p) sum += sums[(p * out + k) * lanes + b];
          sums[k * lanes + b] = sum + first;
        }
      }
    });
    auto* to = mutable_data<decltype(t)>(z);
    parallel_items(packed_x.tiles(), [&](int64_t tile) {
      const int64_t count = std::min<int64_t>(kN, rows - tile * kN);
      transpose_from(to + tile * kN * out, out, sums + tile * kN, lanes, count, out);
    });
  });
}

// Columns of a tile of the rearranged weight as they are written: whole vectors, the last of which reach into what is
// written next.
constexpr int kWritten = round_up(kR, kLanes);

// Floats from a panel of the rearranged weight to the next.
int64_t panel_of(int64_t depth) {
  return depth * kR + kWritten - kR;
}

// Rows [0, depth) of a matrix with `columns` columns as panels of kR columns: [panel][depth][kR], zeros past the last.
template <class W>
void rearrange(const W* from, int64_t stride, int64_t depth, int64_t columns, float* to) {
  for (int64_t k = 0; k < depth; ++k, from += stride, to += kR) {
    float* row = to;
    for (int64_t j = 0; j < columns; j += kR, row += panel_of(depth))
      for (int v = 0; v < kWritten; v += kLanes) {
        const int64_t left = columns - j - v;
        store(row + v, left >= kLanes ? load(from + j + v)
                       : left > 0     ? load_first(from + j + v, static_cast<int>(left))
                                      : zero());
      }
  }
}

// What a tile of G W is added to, or written to where it is the first.
struct Target {
  float* data;
  bool is_first;
};

// With G[j] = sum over k of a[k][j] g[k] for the rows j of a tile: grad_x += sum_j y[j] G[j], grad_y[j] += x G[j].
__attribute__((noinline)) void input_tile(int64_t rows, int vectors, int64_t depth, const float* a, const float* g,
                                          const float* x, const float* y, Target grad_x, Target grad_y,
                                          const char* ahead, int64_t pace) {
  with_tile(rows, vectors, [&](auto tile_rows, auto tile_vectors) {
    Tile<tile_rows, tile_vectors> tile;
    tile.clear();
    multiply(tile, depth, a, 1, kR, g, ahead, pace);
    if (grad_x.data) {
      Vec sum[tile_vectors];
      unroll<tile_vectors>(
          [&](auto v) VELM_INLINE_LAMBDA { sum[v] = grad_x.is_first ? zero() : load(grad_x.data + v * kLanes); });
      unroll<tile_rows>([&](auto r) VELM_INLINE_LAMBDA {
        if (r >= rows) return;
        unroll<tile_vectors>(
            [&](auto v) VELM_INLINE_LAMBDA { sum[v] = fma(tile.c[r][v], load(y + r * kN + v * kLanes), sum[v]); });
      });
      unroll<tile_vectors>([&](auto v) VELM_INLINE_LAMBDA { store(grad_x.data + v * kLanes, sum[v]); });
    }
    if (grad_y.data) {
      Vec factor[tile_vectors];
      unroll<tile_vectors>([&](auto v) VELM_INLINE_LAMBDA { factor[v] = load(x + v * kLanes); });
      unroll<tile_rows>([&](auto r) VELM_INLINE_LAMBDA {
        if (r >= rows) return;
        unroll<tile_vectors>([&](auto v) VELM_INLINE_LAMBDA {
          float* to = grad_y.data + r * kN + v * kLanes;
          store(to, grad_y.is_first ? tile.c[r][v] * factor[v] : fma(tile.c[r][v], factor[v], load(to)));
        });
      });
    }
  });
}

// Some rows of the batch that a gradient is computed for at a time.
Packed rows_of(const Packed& all, int64_t first, int64_t rows) {
  return {all.panel(first / kN), rows, all.columns};
}

// The gradients of x and y: one product g W, of which every element is used for both.
void input_gradients(const Packed& all_x, const Packed& all_y, const Packed& all_g, const Tensor& weight,
                     const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_y) {
  const int64_t out = weight.size(0), dx = weight.size(1), dy = weight.size(2);
  const int64_t parts = std::clamp<int64_t>(dx / kPart, 1, kParts), panels = divide_up(dy, kR);
  const int64_t depth = piece_of(out, std::clamp<int64_t>(kRearranged / round_up(dy + 1, kR), 16, 512));
  for (int64_t first = 0; first < all_x.rows; first += kSlab) {
    const int64_t rows = std::min(kSlab, all_x.rows - first);
    const Packed x = rows_of(all_x, first, rows), y = rows_of(all_y, first, rows), g = rows_of(all_g, first, rows);
    Scratch memory;
    const Packed to_x = empty_panels(memory, rows, grad_x ? dx : 0);
    const int64_t part_size = x.tiles() * kN * dy;
    const Packed to_y = {memory.take(grad_y ? parts * part_size : 0), rows, dy};
    if (dx == 0 || dy == 0 || out == 0) {
      if (grad_x) std::fill_n(to_x.data, x.tiles() * kN * dx, 0.0f);
      std::fill_n(to_y.data, grad_y ? parts * part_size : 0, 0.0f);
    }
    with_type(weight.scalar_type(), [&](auto t) {
      const auto* w = const_data<decltype(t)>(weight);
      const int64_t out_stride = weight.stride(0), row_stride = weight.stride(1);
      parallel_ranges(parts, 1, [&](int64_t begin, int64_t end) {
        Scratch own;
        float* rearranged = own.take(panels * panel_of(depth));
        for (int64_t part = begin; part < end; ++part) {
          const Packed mine = {to_y.data + part * part_size, rows, dy};
          const int64_t top = dx * part / parts, bottom = dx * (part + 1) / parts;
          for (int64_t i = top; i < bottom; ++i) {
            for (int64_t k = 0; k < out; k += depth) {
              const int64_t some = std::min(depth, out - k);
              rearrange(w + k * out_stride + i * row_stride, out_stride, some, dy, rearranged);
              // Two tiles ask for a cache line each of every output's next row.
              const bool is_last = k + depth >= out;
              const auto* next =
                  w + (is_last ? 0 : k + depth) * out_stride + std::min(is_last ? i + 1 : i, bottom - 1) * row_stride;
              const int64_t lines = divide_up(dy * static_cast<int64_t>(sizeof(*w)), 64) + 1;
              int64_t asked = 0;
              for (int64_t p = 0; p < panels; ++p) {
                const int64_t j = p * kR;
                for (int64_t tile = 0; tile < x.tiles(); ++tile, ++asked) {
                  const bool asks = asked < 2 * lines;
                  input_tile(std::min<int64_t>(kR, dy - j), x.vectors(tile), some, rearranged + p * panel_of(some),
                             g.panel(tile) + k * kN, x.panel(tile) + i * kN, y.panel(tile) + j * kN,
                             {grad_x ? to_x.panel(tile) + i * kN : nullptr, k == 0 && p == 0},
                             {grad_y ? mine.panel(tile) + j * kN : nullptr, k == 0 && i == top},
                             reinterpret_cast<const char*>(next + asked % 2 * out_stride) + asked / 2 * 64 * asks,
                             2 * out_stride * static_cast<int64_t>(sizeof(*w)) * asks);
                }
              }
            }
          }
        }
      });
    });
    if (grad_x) unpack(to_x, *grad_x, first);
    if (!grad_y) continue;
    parallel_ranges(part_size, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = begin; i < end; ++i) to_y.data[i] += to_y.data[part * part_size + i];
    });
    unpack(to_y, *grad_y, first);
  }
}

// Columns [0, columns) of y, kN at a time, all rows of the batch below one another: [columns / kN][rows][kN].
float* pack_columns(Scratch& memory, const Tensor& y, int64_t columns) {
  const int64_t rows = y.size(0), panels = divide_up(columns, kN);
  float* to = memory.take(panels * rows * kN);
  with_type(y.scalar_type(), [&](auto t) {
    const auto* from = const_data<decltype(t)>(y);
    parallel_items(panels, [&](int64_t p) {
      const int64_t width = std::min<int64_t>(kN, columns - p * kN);
      for (int64_t b = 0; b < rows; ++b) {
        float* row = to + (p * rows + b) * kN;
        convert(row, from + b * y.stride(0) + p * kN, width);
        std::fill(row + width, row + kN, 0.0f);
      }
    });
  });
  return to;
}

// Columns of y from `first` on as rows, `lanes` long, zeros past the last row of the batch.
float* pack_tails(Scratch& memory, const Tensor& y, int64_t first, int64_t lanes) {
  const int64_t rows = y.size(0), columns = y.size(1) - first;
  float* to = memory.take(columns * lanes);
  std::fill_n(to, columns * lanes, 0.0f);
  with_type(y.scalar_type(), [&](auto t) {
    const auto* from = const_data<decltype(t)>(y) + first;
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t j = 0; j < columns; ++j) to[j * lanes + b] = to_float(from[b * y.stride(0) + j]);
  });
  return to;
}

__attribute__((noinline)) void weight_tile(int64_t rows, int vectors, int64_t depth, const float* a, const float* y,
                                           float* to, int64_t ldc, bool first) {
  with_tile(rows, vectors, [&](auto tile_rows, auto tile_vectors) {
    Tile<tile_rows, tile_vectors> tile;
    tile.clear();
    tile.multiply_add(depth, a, kBatchStride, 1, y, kN);
    if (!first) tile.add(to, ldc);
    tile.store(to, ldc);
  });
}

// One column, the sum over a row of a times y. Both are zero from `depth` up to whole tiles.
__attribute__((noinline)) void tail_tile(int64_t depth, const float* a, const float* y, float* to, int64_t ldc,
                                         bool first) {
  Vec sum[kR];
  unroll<kR>([&](auto r) VELM_INLINE_LAMBDA { sum[r] = zero(); });
  for (int64_t b = 0; b < depth; b += kLanes) {
    const Vec factor = load(y + b);
    unroll<kR>([&](auto r) VELM_INLINE_LAMBDA { sum[r] = fma(load(a + r * kBatchStride + b), factor, sum[r]); });
  }
  unroll<kR>([&](auto r) VELM_INLINE_LAMBDA {
    const float total = sum_lanes(sum[r]);
    to[r * ldc] = first ? total : to[r * ldc] + total;
  });
}

// grad_weight[k, i, j] = sum over b of (g[b, k] x[b, i]) y[b, j]. The rows (k, i) of some rows of x, which stay in the
// second-level cache, follow one another in tiles.
void weight_gradient(const Packed& x, const Packed& g, const Tensor& y, const Tensor& grad_weight) {
  const int64_t rows = x.rows, out = g.columns, dx = x.columns, dy = y.size(1), lanes = x.tiles() * kN;
  if (grad_weight.numel() == 0) return;
  // A vector for few columns would be computed for nothing.
  const int64_t tails = dy % kLanes <= kTails ? dy % kLanes : 0, full = dy - tails;
  Scratch memory;
  const float* columns = pack_columns(memory, y, full);
  const float* tail = pack_tails(memory, y, full, lanes);
  const int64_t panels = divide_up(full, kN), ldc = round_up(dy, kN);
  const int64_t height = piece_of(dx, kStack), blocks = divide_up(out * height, kR);
  with_type(grad_weight.scalar_type(), [&](auto t) {
    auto* to = mutable_data<decltype(t)>(grad_weight);
    prefer_huge_pages(to, static_cast<size_t>(grad_weight.numel()) * sizeof(*to));
    parallel_ranges(divide_up(dx, height) * blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch own;
      float* a = own.take(kR * kBatchStride);
      float* sums = own.take(kR * ldc);
      std::fill_n(a, kR * kBatchStride, 0.0f);
      std::fill_n(sums, kR * ldc, 0.0f);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t top = task / blocks * height, some = std::min(height, dx - top);
        const int64_t row = task % blocks * kR, rows_left = std::min<int64_t>(kR, out * some - row);
        for (int64_t b = 0; b < rows && rows_left > 0; b += kBatchBlock) {
          const int64_t depth = std::min(kBatchBlock, rows - b);
          for (int64_t r = 0; r < rows_left; ++r) {
            const int64_t k = (row + r) / some, i = top + (row + r) % some;
            for (int64_t c = 0; c < depth; c += kN) {
              const float* factor = g.panel((b + c) / kN) + k * kN;
              const float* from = x.panel((b + c) / kN) + i * kN;
              for (int v = 0; v < kN; v += kLanes)
                store(a + r * kBatchStride + c + v, load(factor + v) * load(from + v));
            }
          }
          for (int64_t p = 0; p < panels; ++p)
            weight_tile(rows_left, full - p * kN > kLanes ? 2 : 1, depth, a, columns + (p * rows + b) * kN,
                        sums + p * kN, ldc, b == 0);
          for (int64_t j = 0; j < tails; ++j) tail_tile(depth, a, tail + j * lanes + b, sums + full + j, ldc, b == 0);
        }
        for (int64_t r = 0; r < rows_left; ++r) {
          const int64_t k = (row + r) / some, i = top + (row + r) % some;
          convert(to + (k * dx + i) * dy, sums + r * ldc, dy);
        }
      }
    });
  });
}

void bias_gradient(const Tensor& grad, const Tensor& grad_bias) {
  const int64_t rows = grad.size(0), out = grad.size(1);
  with_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = const_data<T>(grad);
    std::vector<double> sums(static_cast<size_t>(out));
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t k = 0; k < out; ++k) sums[static_cast<size_t>(k)] += to_float(from[b * grad.stride(0) + k]);
    for (int64_t k = 0; k < out; ++k)
      store_scalar(mutable_data<T>(grad_bias) + k, static_cast<float>(sums[static_cast<size_t>(k)]));
  });
}

void bilinear_backward(Tensor grad, Tensor x, Tensor y, Tensor weight, std::optional<Tensor> grad_x,
                       std::optional<Tensor> grad_y, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias) {
  Scratch memory;
  const Packed g = pack(memory, grad), packed_x = pack(memory, x);
  if (grad_x || grad_y) input_gradients(packed_x, pack(memory, y), g, weight, grad_x, grad_y);
  if (grad_weight) weight_gradient(packed_x, g, y, *grad_weight);
  if (grad_bias) bias_gradient(grad, *grad_bias);
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "bilinear_forward", bilinear_forward);
  VELM_KERNEL(m, "bilinear_backward", bilinear_backward);
}

}  // namespace
}  // namespace velm
