// The gradient of the queries of one side of bidirectional attention: a block for each tile of its rows, over tiles of
// the other side. Each tile of scores is computed once and serves both directions. With x the side of the block and y
// the other, ds = p_x (dp_x - delta_x) + p_y (dp_y - delta_y), where x attends over y with the weights p_x and y over x
// with p_y, and the gradient is the sum of ds times the rows of y.
//
// The block keeps the queries, values and gradients of its rows in shared memory. Of y come in turn the values, the
// gradients and the queries, each into a slot of its own, which is filled again while the other two are in use. Where
// three tiles of 64 rows do not fit beside them, a block has 32 rows, and two warps share 16 of them: each takes half
// of the columns of every tile, and their sums are added at the end.
//
// Where a side has few rows and the other many, as text and a picture have, several blocks share the tiles of the
// other, and a second kernel adds their sums. So it does with the gradients of the two directions, each by the kernel
// of ordinary attention, in float32 of more than 128 dimensions, where three tiles of rows and three of columns do not
// fit.

#include "attention/bidirectional_attention/cuda.h"

#include "attention/cuda_columns.h"
#include "attention/cuda_masks.h"
#include "attention/cuda_repair.h"
#include "attention/cuda_splits.h"
#include "device/launch.h"
#include "device/products.h"

namespace velm::cuda {
namespace {

// Warps one below the other, and rows of y in a tile.
template <int kElement, int kDim>
struct Shape {
  static constexpr int kRowWarps = kElement * kDim <= 256 ? 4 : 2;
  static constexpr int kColumns = kElement * kDim == 128 ? 64 : 32;

  static constexpr int kRows = 16 * kRowWarps;
  // Columns of a warp.
  static constexpr int kOwn = kColumns * kRowWarps / kWarps;
};

enum Slot { kValueSlot, kGradSlot, kQuerySlot, kSlots };

template <class T, int kDim>
struct Storage {
  using Of = Shape<sizeof(T), kDim>;
  SharedArray<T, Of::kRows * kDim> query, value, grad_out;
  SharedArray<T, kSlots, Of::kColumns * kDim> ring;
  // Of the tile in use and the next.
  SharedArray<float, 2, Of::kColumns> logsumexp, shift, delta;
};

// Of the rows of one side.
template <class T>
struct Upstream {
  Rows<const T> grad_out;
  int width;
  RowStatistics of_rows;
};

// `x` is attention of x over y, `y` of y over x.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    grad_side_kernel(const Inputs<T> x, const Inputs<T> y, const Upstream<T> up_x, const Upstream<T> up_y,
                     const Rows<T> grad, int grad_width, float scale, int row_blocks, int splits,
                     const Partials partials) {
  using Of = Shape<sizeof(T), kDim>;
  constexpr int kColumns = Of::kColumns, kOwn = Of::kOwn, kTiles = kOwn / 8;
  auto& shared = dynamic_shared<Storage<T, kDim>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp = thread / 32, warp_row = warp % Of::kRowWarps * 16, warp_column = warp / Of::kRowWarps * kOwn;
  const int split = static_cast<int>(blockIdx.x) % splits, block = static_cast<int>(blockIdx.x) / splits;
  const int first_row = block % row_blocks * Of::kRows;
  const int head = block / row_blocks % x.heads, index = block / row_blocks / x.heads;
  const int tiles = (x.keys + kColumns - 1) / kColumns;
  const int begin = first_of_split(tiles, split, splits) * kColumns;
  const int end = min(first_of_split(tiles, split + 1, splits) * kColumns, x.keys);
  const int64_t rows_x = (index * int64_t{x.heads} + head) * x.queries,
                rows_y = (index * int64_t{x.heads} + head) * x.keys;

  const auto copy_block = [&](const Shared<T>& to, const Rows<const T>& rows, int dim, int width) {
    copy_tile<T, kDim, Of::kRows>(to, rows.at(index, head, first_row), rows.row, x.queries - first_row, dim, width);
  };
  copy_block(shared.query, x.query, x.head_dim, x.query_width);
  copy_block(shared.value, y.value, y.value_dim, y.value_width);
  copy_block(shared.grad_out, up_x.grad_out, x.value_dim, up_x.width);
  // A group of copies for each slot, empty behind the end.
  const auto fill = [&](Slot slot, int start) {
    if (start < end) {
      const auto copy = [&](const Rows<const T>& rows, int dim, int width) {
        copy_tile<T, kDim, kColumns>(shared.ring[slot], rows.at(index, head, start), rows.row, x.keys - start, dim,
                                     width);
      };
      if (slot == kValueSlot) {
        copy(x.value, x.value_dim, x.value_width);
        const int row = start + thread, table = start / kColumns % 2;
        if (thread < kColumns) {
          const int64_t at = row < x.keys ? rows_y + row : 0;
          const int size = row < x.keys ? 4 : 0;
          cp_async<4>(&shared.logsumexp[table][thread], up_y.of_rows.logsumexp + at, size);
          cp_async<4>(&shared.shift[table][thread], up_y.of_rows.shift + at, size);
          cp_async<4>(&shared.delta[table][thread], up_y.of_rows.delta + at, size);
        }
      } else if (slot == kGradSlot) {
        copy(up_y.grad_out, y.value_dim, up_y.width);
      } else {
        copy(x.key, x.head_dim, x.key_width);
      }
    }
    cp_async_commit();
  };
  fill(kValueSlot, begin);
  fill(kGradSlot, begin);
  // The warp's columns of what is there.
  const auto columns = [&](Slot slot) { return Shared<T>(shared.ring[slot]) + warp_column * kDim; };

  // Whether y may attend to the two rows of a thread, and whether they attend to anything.
  bool open[2], live[2];
  float logsumexp[2], shift[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + warp_row + group + 8 * half;
    const bool is_row = row < x.queries;
    open[half] = is_row && (!y.key_mask || y.key_mask[index * int64_t{x.queries} + row]);
    logsumexp[half] = is_row ? float{up_x.of_rows.logsumexp[rows_x + row]} : -kInfinity;
    shift[half] = is_row ? float{up_x.of_rows.shift[rows_x + row]} : 0.0f;
    delta[half] = is_row ? float{up_x.of_rows.delta[rows_x + row]} : 0.0f;
    // The delta of a row with nothing but -inf is NaN, and that of one that sees nothing 0.
    live[half] = logsumexp[half] != -kInfinity || delta[half] != 0.0f;
  }

  float total[kDim / 8][4] = {};
  for (int start = begin; start < end; start += kColumns) {
    const int first_column = start + warp_column, table = start / kColumns % 2;
    // Bits 2 j + i of the columns of a thread: whether x may attend to them, and whether they attend to anything.
    unsigned open_columns = 0, live_columns = 0;
    {
      uint64_t bits = ~uint64_t{0};
      if (x.key_mask) bits = open_keys<kOwn>(x, index, first_column, x.keys);
      const int rest = x.keys - first_column;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * j + 2 * member + i;
          open_columns |= unsigned{column < rest && (bits >> column & 1)} << (2 * j + i);
        }
    }

    cp_async_wait<1>();
    __syncthreads();
    fill(kQuerySlot, start);
    // dp_x - delta_x
    float of_x[kTiles][4] = {};
    multiply_transposed<T, kDim, kTiles>(of_x, shared.grad_out, warp_row, columns(kValueSlot), x.value_dim);
    if (x.seed) {
      unsigned kept[2];
      kept_weights<kTiles>(kept, x, index, head, first_row + warp_row + drawn_row(), first_column);
      drop_weights(of_x, kept);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) of_x[j][i] = fmaf(of_x[j][i], x.keep_scale, -delta[i / 2]);

    cp_async_wait<1>();
    __syncthreads();
    fill(kValueSlot, start + kColumns);
    // dp_y - delta_y
    float of_y[kTiles][4] = {};
    multiply_transposed<T, kDim, kTiles>(of_y, shared.value, warp_row, columns(kGradSlot), y.value_dim);
    unsigned kept[4] = {};
    if (y.seed) kept_columns<kTiles>(kept, y, index, head, first_column, first_row + warp_row);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * j + 2 * member + i;
        const float of_column = shared.delta[table][warp_column + column];
        const float lse = shared.logsumexp[table][warp_column + column];
        const bool is_live = first_column + column < x.keys && (lse != -kInfinity || of_column != 0.0f);
        live_columns |= unsigned{is_live} << (2 * j + i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& e = of_y[j][2 * half + i];
          if (y.seed && !(kept[2 * i + half] >> 4 * j & 1)) e = 0.0f;
          e = fmaf(e, y.keep_scale, -of_column);
        }
      }

    cp_async_wait<1>();
    __syncthreads();
    fill(kGradSlot, start + kColumns);
    float s[kTiles][4] = {};
    multiply_transposed<T, kDim, kTiles>(s, shared.query, warp_row, columns(kQuerySlot), x.head_dim);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float lse = shared.logsumexp[table][warp_column + 8 * j + 2 * member + i];
        const float of_lse = shared.shift[table][warp_column + 8 * j + 2 * member + i];
        const bool is_open = open_columns >> (2 * j + i) & 1, is_live = live_columns >> (2 * j + i) & 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& ds = s[j][2 * half + i];
          const float score = x.scales ? ds * x.product : ds;
          // Selected, as what is hidden may be NaN.
          ds = is_open && live[half] ? weight_of(score, x.unit, logsumexp[half], shift[half]) * of_x[j][2 * half + i]
                                     : 0.0f;
          if (open[half] && is_live) ds = fmaf(weight_of(score, x.unit, lse, of_lse), of_y[j][2 * half + i], ds);
        }
      }
    // What neither attends nor is attended to is not read.
    const unsigned seen = open_columns | live_columns;
    constexpr unsigned kEverything = (1u << 2 * kTiles) - 1;
    if (__all_sync(kAll, seen == kEverything))
      multiply<T, kDim, kTiles, false>(total, s, columns(kQuerySlot), x.head_dim, seen);
    else
      multiply<T, kDim, kTiles, true>(total, s, columns(kQuerySlot), x.head_dim, seen);
  }

  if constexpr (Of::kRowWarps < kWarps) {
    // By way of the ring, each number at a bank of its lane.
    constexpr int kPart = Of::kRowWarps * 32, kParts = Of::kColumns * kDim * static_cast<int>(sizeof(T)) / 4 / kPart;
    const auto place = [&](int part) {
      return pointer_cast<float>(Shared<T>(shared.ring[part / kParts])) + (part % kParts * kPart + thread % kPart);
    };
    __syncthreads();
    if (warp >= Of::kRowWarps) {
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) place(4 * j + i)[0] = total[j][i];
    }
    __syncthreads();
    if (warp >= Of::kRowWarps) return;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[j][i] += place(4 * j + i)[0];
  }
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // A row that neither attends nor is attended to: zero times what others are may be NaN.
      total[j][i] = live[i / 2] || open[i / 2] ? total[j][i] * scale : 0.0f;
    }
  // A row that y may not attend to sees what its mask shows and nothing else; its tiles multiply the rest by 0.
  const bool may_be_spoiled[2] = {!open[0] && fabsf(logsumexp[0]) < kInfinity && fabsf(delta[0]) < kInfinity,
                                  !open[1] && fabsf(logsumexp[1]) < kInfinity && fabsf(delta[1]) < kInfinity};
  const SpoiledRows spoiled(total, may_be_spoiled);
  const auto partial_row = [&](int query) {
    return partials.out + (split * partials.rows + rows_x + query) * partials.stride;
  };
  if (splits > 1) {
    store_float_rows<kDim>(total, x.head_dim, [&](int row) {
      const int query = first_row + warp_row + row;
      return query < x.queries ? partial_row(query) : Global<float>(nullptr);
    });
  } else {
    const Shared<T> stage = shared.query;
    store_rows<T, kDim>(stage + warp_row * kDim, total, x.head_dim, grad_width, [&](int row) {
      const int query = first_row + warp_row + row;
      return query < x.queries ? grad.at(index, head, query) : Global<T>(nullptr);
    });
  }
  if (!spoiled.any() || !x.key_mask) return;

  __syncwarp();
  const Sequence s(x, index);
#pragma unroll 1
  for (int row = 0; row < 16; ++row) {
    const int query = first_row + warp_row + row;
    if (query >= x.queries || !spoiled.has(row)) continue;
    RowSum<kDim> sum;
#pragma unroll 1
    for (int key = begin; key < end && !sum.is_nan(x.head_dim); ++key) {
      const PairScore pair = score_of(x, s, index, head, query, key);
      if (pair.score != kHidden)
        sum.add(grad_of_score(x, s, index, head, query, key, pair, up_x.grad_out, up_x.of_rows),
                x.key.at(index, head, key), x.head_dim);
    }
    if (splits > 1)
      sum.put(partial_row(query), x.head_dim, scale);
    else
      sum.put(grad.at(index, head, query), x.head_dim, scale);
  }
}

// One thread for kVector numbers of a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(const Partials partials, int splits, const Rows<T> grad, int heads, int queries, int dim) {
  const int of_row = partials.stride / kVector;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, at = i / of_row;
  if (at >= partials.rows) return;
  const int column = static_cast<int>(i % of_row) * kVector;
  float total[kVector] = {};
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const auto x = load<kVector>(partials.out + (s * partials.rows + at) * partials.stride + column);
#pragma unroll
    for (int k = 0; k < kVector; ++k) total[k] += x[k];
  }
  const Global<T> to = grad.at(static_cast<int>(at / queries / heads), static_cast<int>(at / queries % heads),
                               static_cast<int>(at % queries));
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    if (column + k < dim) to[column + k] = from_float<T>(total[k]);
}

template <class T>
Upstream<T> upstream_of(const AttentionBackward& p) {
  return {rows_of<const T>(p.grad_out), copy_width(p.grad_out), statistics_of(p)};
}

struct Grid {
  int64_t row_blocks, blocks;
  int splits;
};

template <class T, class F>
void with_grid(const AttentionBackward& x, const AttentionBackward& y, const F& f) {
  constexpr int kMost = sizeof(T) == 4 ? 128 : 256;
  with_dim<kMost>(std::max({x.head_dim(), x.value_dim(), y.value_dim()}), [&](auto dim) {
    constexpr int kRows = Shape<sizeof(T), decltype(dim)::value>::kRows;
    const int64_t row_blocks = (x.queries() + kRows - 1) / kRows, blocks = x.batch * x.heads() * row_blocks;
    const int splits = split_count(blocks, std::min<int64_t>(x.queries(), kRows), x.keys());
    f(dim, Grid{row_blocks, blocks * splits, splits});
  });
}

bool has_no_room(const AttentionBackward& x, const AttentionBackward& y) {
  return x.dtype() == Dtype::float32 && std::max({x.head_dim(), x.value_dim(), y.value_dim()}) > 128;
}

// Floats of one part of the partial sums.
int64_t part_size(const AttentionBackward& x) {
  return x.batch * x.heads() * x.queries() * partial_stride(x.head_dim());
}

template <class T>
void add_parts(const AttentionBackward& x, const View& partial_sums, int count, Stream stream) {
  const Partials partials{global<float>(partial_sums), x.batch * x.heads() * x.queries(), partial_stride(x.head_dim())};
  const int64_t threads = partials.rows * (partials.stride / kVector);
  if (threads == 0) return;
  launch<add_splits_kernel<T>>(static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream,
                               partials, count, rows_of<T>(x.grad_query), static_cast<int>(x.heads()),
                               static_cast<int>(x.queries()), static_cast<int>(x.head_dim()));
}

void add_directions(const AttentionBackward& x, const AttentionBackward& y, const View& partial_sums, Stream stream) {
  const int64_t row = partial_stride(x.head_dim()), head = x.queries() * row;
  const auto bytes = static_cast<std::size_t>(part_size(x)) * sizeof(float);
  AttentionBackward as_queries = x, as_keys = y;
  const auto part = [&](int number) {
    return View{static_cast<char*>(partial_sums.data) + number * bytes,
                bytes,
                Dtype::float32,
                {x.batch, x.heads(), x.queries(), x.head_dim()},
                {x.heads() * head, head, row, 1}};
  };
  as_queries.grad_query = part(0);
  as_keys.grad_key = part(1);
  attention_grad_query(as_queries, stream);
  attention_grad_key(as_keys, stream);
  add_parts<float>(x, partial_sums, 2, stream);
}

}  // namespace

int64_t bidirectional_grad_query_partials(const AttentionBackward& x, const AttentionBackward& y) {
  if (has_no_room(x, y)) return 2 * part_size(x);
  int64_t count = 0;
  with_type(x.dtype(), [&](auto t) {
    with_grid<decltype(t)>(x, y, [&](auto, const Grid& grid) {
      if (grid.splits > 1) count = grid.splits * part_size(x);
    });
  });
  return count;
}

void bidirectional_grad_query(const AttentionBackward& x, const AttentionBackward& y, const View& partial_sums,
                              Stream stream) {
  if (has_no_room(x, y)) return add_directions(x, y, partial_sums, stream);
  with_type(x.dtype(), [&](auto t) {
    using T = decltype(t);
    with_grid<T>(x, y, [&](auto dim, const Grid& grid) {
      constexpr int kDim = decltype(dim)::value;
      if (grid.blocks == 0) return;
      if (grid.blocks > 0x7fffffff)
        throw std::runtime_error("velm: bidirectional attention: more than 2^31 - 1 blocks");
      Partials partials{};
      if (grid.splits > 1)
        partials = {global<float>(partial_sums), x.batch * x.heads() * x.queries(), partial_stride(x.head_dim())};
      launch<grad_side_kernel<T, kDim>>(static_cast<unsigned>(grid.blocks), kThreads, sizeof(Storage<T, kDim>), stream,
                                        inputs_of<T>(x), inputs_of<T>(y), upstream_of<T>(x), upstream_of<T>(y),
                                        rows_of<T>(x.grad_query), copy_width(x.grad_query), static_cast<float>(x.scale),
                                        static_cast<int>(grid.row_blocks), grid.splits, partials);
      if (grid.splits > 1) add_parts<T>(x, partial_sums, grid.splits, stream);
    });
  });
}

}  // namespace velm::cuda
