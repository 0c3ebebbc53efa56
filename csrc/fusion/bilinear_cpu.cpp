// z_k = x^T W_k y and its gradients without the outer product of x and y.
//
// Rows of x, y and the gradient are packed as fp32 with a tile's worth of them side by side, so that one matrix of the
// weight meets all of them in registers: a tile of W_k y^T is summed against x where it was computed, and a tile of
// g W is summed against y and added to the gradient of y times x. The order of additions depends on the shape alone.

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "attention/small_ops.h"
#include "simd/layout.h"
#include "simd/pages.h"
#include "simd/parallel.h"
#include "simd/scratch.h"
#include "simd/tile.h"
#include "simd/transpose.h"

namespace velm {
namespace {

using namespace simd;

constexpr int64_t kGradX = 1, kGradY = 2, kGradWeight = 4, kGradBias = 8;
constexpr int kV = 2;
constexpr int kN = kV * kLanes;
constexpr int kR = kTileRows<kV>;
// Rows of a tile for what is left of a dimension after the whole tiles.
constexpr int kFew = kR / 3;
// Depth of a tile between two sums: kR rows of it stay in the first-level cache.
constexpr int64_t kDepth = 384;
// Batch rows between two visits of a part of the weight.
constexpr int64_t kBatchBlock = 512;
// fp32 numbers of the weight rearranged at a time: half of a second-level cache of 1 MiB.
constexpr int64_t kRearranged = 131072;
// The gradient of y is summed in this many parts at the most, for this many rows of the batch at a time.
constexpr int64_t kParts = 16, kSlab = 1024;
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

// sums (a lane each) += sum over rows r of x[r] * (a[r] . y), for `rows` rows of a with row stride lda.
__attribute__((noinline)) void forward_tile(int64_t rows, int vectors, int64_t depth, const float* a, int64_t lda,
                                            const float* y, const float* x, float* sums) {
  with_tile(rows, vectors, [&](auto tall, auto wide) {
    Tile<tall, wide> tile;
    tile.clear();
    tile.multiply_add(depth, a, lda, 1, y, kN);
    Vec sum[wide];
    unroll<wide>([&](auto v) VELM_INLINE_LAMBDA { sum[v] = load(sums + v * kLanes); });
    unroll<tall>([&](auto r) VELM_INLINE_LAMBDA {
      if (r >= rows) return;
      unroll<wide>([&](auto v)
                       VELM_INLINE_LAMBDA { sum[v] = fma(tile.c[r][v], load(x + r * kN + v * kLanes), sum[v]); });
    });
    unroll<wide>([&](auto v) VELM_INLINE_LAMBDA { store(sums + v * kLanes, sum[v]); });
  });
}

// The weight of one output between rows [first, last) of x, against all rows of the batch: sums (tiles, kN).
template <class W>
void forward_task(const W* weight, int64_t row_stride, int64_t first, int64_t last, const Packed& x, const Packed& y,
                  float* a, float* sums) {
  std::fill_n(sums, x.tiles() * kN, 0.0f);
  const int64_t depth = piece_of(y.columns, kDepth), lda = round_up(depth, kLanes);
  constexpr int64_t kTiles = kBatchBlock / kN;
  for (int64_t block = 0; block < x.tiles(); block += kTiles) {
    const int64_t end = std::min(block + kTiles, x.tiles());
    for (int64_t i = first; i < last; i += kR) {
      const int64_t rows = std::min<int64_t>(kR, last - i);
      for (int64_t j = 0; j < y.columns; j += depth) {
        const int64_t wide = std::min(depth, y.columns - j);
        for (int64_t r = 0; r < rows; ++r) convert(a + r * lda, weight + (i + r) * row_stride + j, wide);
        for (int64_t t = block; t < end; ++t)
          forward_tile(rows, x.vectors(t), wide, a, lda, y.panel(t) + j * kN, x.panel(t) + i * kN, sums + t * kN);
      }
    }
  }
}

Tensor bilinear_forward(Tensor x, Tensor y, Tensor weight, std::optional<Tensor> bias) {
  const int64_t rows = x.size(0), out = weight.size(0), dx = weight.size(1);
  Tensor z = torch::stable::new_empty(x, {rows, out});
  if (rows == 0 || out == 0) return z;
  Scratch memory;
  const Packed packed_x = pack(memory, x), packed_y = pack(memory, y);
  const int64_t lanes = packed_x.tiles() * kN;
  const int64_t height = round_up(std::max<int64_t>(1, divide_up(dx, std::max<int64_t>(1, kTasks / out))), kR);
  const int64_t pieces = std::max<int64_t>(1, divide_up(dx, height));
  float* sums = memory.take(pieces * out * lanes);
  with_type(weight.scalar_type(), [&](auto t) {
    const auto* w = const_data<decltype(t)>(weight);
    const int64_t out_stride = weight.stride(0), row_stride = weight.stride(1);
    parallel_ranges(pieces * out, 1, [&](int64_t begin, int64_t end) {
      Scratch own;
      float* a = own.take(kR * round_up(kDepth, kLanes));
      std::fill_n(a, kR * round_up(kDepth, kLanes), 0.0f);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / out * height;
        forward_task(w + task % out * out_stride, row_stride, first, std::min(first + height, dx), packed_x, packed_y,
                     a, sums + task * lanes);
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
  return z;
}

// Rows [0, depth) of a matrix with `columns` columns as panels of kR columns: [panel][depth][kR], zeros past the last.
template <class W>
void rearrange(const W* from, int64_t stride, int64_t depth, int64_t columns, float* row, float* to) {
  const int64_t panels = divide_up(columns, kR);
  std::fill(row + columns, row + panels * kR, 0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    convert(row, from + k * stride, columns);
    for (int64_t p = 0; p < panels; ++p) std::memcpy(to + (p * depth + k) * kR, row + p * kR, kR * sizeof(float));
  }
}

// With G[j] = sum over k of a[k][j] g[k] for the rows j of a tile: grad_x += sum_j y[j] G[j], grad_y[j] += x G[j].
__attribute__((noinline)) void input_tile(int64_t rows, int vectors, int64_t depth, const float* a, const float* g,
                                          const float* x, const float* y, float* grad_x, float* grad_y) {
  with_tile(rows, vectors, [&](auto tall, auto wide) {
    Tile<tall, wide> tile;
    tile.clear();
    tile.multiply_add(depth, a, 1, kR, g, kN);
    if (grad_x) {
      Vec sum[wide];
      unroll<wide>([&](auto v) VELM_INLINE_LAMBDA { sum[v] = load(grad_x + v * kLanes); });
      unroll<tall>([&](auto r) VELM_INLINE_LAMBDA {
        if (r >= rows) return;
        unroll<wide>([&](auto v)
                         VELM_INLINE_LAMBDA { sum[v] = fma(tile.c[r][v], load(y + r * kN + v * kLanes), sum[v]); });
      });
      unroll<wide>([&](auto v) VELM_INLINE_LAMBDA { store(grad_x + v * kLanes, sum[v]); });
    }
    if (grad_y) {
      Vec factor[wide];
      unroll<wide>([&](auto v) VELM_INLINE_LAMBDA { factor[v] = load(x + v * kLanes); });
      unroll<tall>([&](auto r) VELM_INLINE_LAMBDA {
        if (r >= rows) return;
        unroll<wide>([&](auto v) VELM_INLINE_LAMBDA {
          float* to = grad_y + r * kN + v * kLanes;
          store(to, fma(tile.c[r][v], factor[v], load(to)));
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
                     const Tensor* grad_x, const Tensor* grad_y) {
  const int64_t out = weight.size(0), dx = weight.size(1), dy = weight.size(2);
  const int64_t parts = std::clamp<int64_t>(dx, 1, kParts), panels = divide_up(dy, kR);
  const int64_t depth = piece_of(out, std::clamp<int64_t>(kRearranged / round_up(dy + 1, kR), 16, 512));
  for (int64_t first = 0; first < all_x.rows; first += kSlab) {
    const int64_t rows = std::min(kSlab, all_x.rows - first);
    const Packed x = rows_of(all_x, first, rows), y = rows_of(all_y, first, rows), g = rows_of(all_g, first, rows);
    Scratch memory;
    const Packed to_x = empty_panels(memory, rows, grad_x ? dx : 0);
    const int64_t part_size = x.tiles() * kN * dy;
    const Packed to_y = {memory.take(grad_y ? parts * part_size : 0), rows, dy};
    with_type(weight.scalar_type(), [&](auto t) {
      const auto* w = const_data<decltype(t)>(weight);
      parallel_ranges(parts, 1, [&](int64_t begin, int64_t end) {
        Scratch own;
        float* row = own.take(panels * kR);
        float* rearranged = own.take(panels * depth * kR + kR);
        for (int64_t part = begin; part < end; ++part) {
          const Packed mine = {to_y.data + part * part_size, rows, dy};
          if (grad_y) std::fill_n(mine.data, part_size, 0.0f);
          for (int64_t i = dx * part / parts; i < dx * (part + 1) / parts; ++i) {
            for (int64_t tile = 0; grad_x && tile < x.tiles(); ++tile) std::fill_n(to_x.panel(tile) + i * kN, kN, 0.0f);
            for (int64_t k = 0; k < out; k += depth) {
              const int64_t some = std::min(depth, out - k);
              rearrange(w + k * weight.stride(0) + i * weight.stride(1), weight.stride(0), some, dy, row, rearranged);
              for (int64_t p = 0; p < panels; ++p) {
                const int64_t j = p * kR;
                for (int64_t tile = 0; tile < x.tiles(); ++tile)
                  input_tile(std::min<int64_t>(kR, dy - j), x.vectors(tile), some, rearranged + p * some * kR,
                             g.panel(tile) + k * kN, x.panel(tile) + i * kN, y.panel(tile) + j * kN,
                             grad_x ? to_x.panel(tile) + i * kN : nullptr,
                             grad_y ? mine.panel(tile) + j * kN : nullptr);
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

// Columns of y, kN at a time, all rows of the batch below one another: [columns / kN][rows][kN].
float* pack_columns(Scratch& memory, const Tensor& y) {
  const int64_t rows = y.size(0), columns = y.size(1), panels = divide_up(columns, kN);
  float* to = memory.take(panels * rows * kN);
  with_type(y.scalar_type(), [&](auto t) {
    const auto* from = const_data<decltype(t)>(y);
    parallel_items(panels, [&](int64_t p) {
      const int64_t wide = std::min<int64_t>(kN, columns - p * kN);
      for (int64_t b = 0; b < rows; ++b) {
        float* row = to + (p * rows + b) * kN;
        convert(row, from + b * y.stride(0) + p * kN, wide);
        std::fill(row + wide, row + kN, 0.0f);
      }
    });
  });
  return to;
}

__attribute__((noinline)) void weight_tile(int64_t rows, int vectors, int64_t depth, const float* a, int64_t lda,
                                           const float* y, float* to, int64_t ldc, bool first) {
  with_tile(rows, vectors, [&](auto tall, auto wide) {
    Tile<tall, wide> tile;
    tile.clear();
    tile.multiply_add(depth, a, lda, 1, y, kN);
    if (!first) tile.add(to, ldc);
    tile.store(to, ldc);
  });
}

// grad_weight[k, i, j] = sum over b of (g[b, k] x[b, i]) y[b, j].
void weight_gradient(const Packed& x, const Packed& g, const Tensor& y, const Tensor& grad_weight) {
  const int64_t rows = x.rows, out = g.columns, dx = x.columns, dy = y.size(1);
  Scratch memory;
  const float* columns = pack_columns(memory, y);
  const int64_t panels = divide_up(dy, kN), ldc = panels * kN, blocks = divide_up(dx, kR);
  with_type(grad_weight.scalar_type(), [&](auto t) {
    auto* to = mutable_data<decltype(t)>(grad_weight);
    prefer_huge_pages(to, static_cast<size_t>(grad_weight.numel()) * sizeof(*to));
    parallel_ranges(out * blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch own;
      float* a = own.take(kR * kBatchBlock);
      float* sums = own.take(kR * ldc);
      std::fill_n(a, kR * kBatchBlock, 0.0f);
      std::fill_n(sums, kR * ldc, 0.0f);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t k = task / blocks, i = task % blocks * kR, tall = std::min<int64_t>(kR, dx - i);
        for (int64_t b = 0; b < rows; b += kBatchBlock) {
          const int64_t depth = std::min(kBatchBlock, rows - b);
          for (int64_t c = 0; c < depth; c += kN) {
            const float* factor = g.panel((b + c) / kN) + k * kN;
            const float* from = x.panel((b + c) / kN) + i * kN;
            for (int64_t r = 0; r < tall; ++r)
              for (int v = 0; v < kN; v += kLanes)
                store(a + r * kBatchBlock + c + v, load(factor + v) * load(from + r * kN + v));
          }
          for (int64_t p = 0; p < panels; ++p)
            weight_tile(tall, dy - p * kN > kLanes ? 2 : 1, depth, a, kBatchBlock, columns + (p * rows + b) * kN,
                        sums + p * kN, ldc, b == 0);
        }
        for (int64_t r = 0; r < tall; ++r) convert(to + (k * dx + i + r) * dy, sums + r * ldc, dy);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> bilinear_backward(Tensor grad, Tensor x, Tensor y, Tensor weight,
                                                             int64_t grad_mask) {
  const int64_t rows = x.size(0), out = weight.size(0), dx = weight.size(1), dy = weight.size(2);
  const auto result = [&](int64_t bit, std::initializer_list<int64_t> shape) {
    return grad_mask & bit ? torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape)) : nothing(x);
  };
  Tensor grad_x = result(kGradX, {rows, dx}), grad_y = result(kGradY, {rows, dy});
  Tensor grad_weight = result(kGradWeight, {out, dx, dy}), grad_bias = result(kGradBias, {out});
  Scratch memory;
  const Packed g = pack(memory, grad), packed_x = pack(memory, x);
  if (grad_mask & (kGradX | kGradY))
    input_gradients(packed_x, pack(memory, y), g, weight, grad_mask & kGradX ? &grad_x : nullptr,
                    grad_mask & kGradY ? &grad_y : nullptr);
  if (grad_mask & kGradWeight) weight_gradient(packed_x, g, y, grad_weight);
  if (grad_mask & kGradBias) bias_gradient(grad, grad_bias);
  return {grad_x, grad_y, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  m.impl("bilinear_forward", TORCH_BOX(&bilinear_forward));
  m.impl("bilinear_backward", TORCH_BOX(&bilinear_backward));
}

}  // namespace
}  // namespace velm
