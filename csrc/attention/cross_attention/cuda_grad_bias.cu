// The gradient of a bias that broadcasts somewhere: a block for each tile of the bias and part of what it was broadcast
// to, over tiles of scores in a fixed order; the parts are added in theirs. No atomics: the same bits every time.

#include "attention/cuda_backward.h"
#include "attention/cuda_masks.h"
#include "device/launch.h"
#include "device/products.h"

namespace velm::cuda {
namespace {

// Blocks to aim for: two for each multiprocessor of a large device.
constexpr int64_t kWantedBlocks = 512;

// Keys of a tile. A stage holds the rows and the keys of one of the two products; where two fit, the second is on its
// way while the first is multiplied.
template <int kElement, int kDim>
struct Shape {
  static constexpr int kKeys = kElement == 4 ? (kDim == 256 ? 16 : 32) : kDim == 256 ? 32 : 64;
  static constexpr int kStages = kElement == 4 && kDim == 256 ? 1 : 2;
};

template <class T, int kDim>
struct Storage {
  using Of = Shape<sizeof(T), kDim>;
  SharedArray<T, Of::kStages, kRows * kDim> rows;
  SharedArray<T, Of::kStages, Of::kKeys * kDim> keys;
  RowTable table;
  SharedArray<float, kWarps, Of::kKeys> column_sums;
};

// How the sum of each tile of the bias is cut: tiles of the bias along heads, rows and columns, and steps along batch,
// heads, rows and columns; of a tile's and a step's number along the same at least one is always 0.
struct Plan {
  int heads, row_tiles, column_tiles, batch_steps, head_steps, row_steps, column_steps;
  int64_t splits, steps_each, elements, blocks;
  bool sums_rows, sums_columns;
};

template <class T>
struct Gradients {
  Rows<const T> grad_out;
  int grad_out_width;
  RowStatistics of_rows;
  // (splits, elements of the bias)
  Global<float> partials;
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    grad_bias_kernel(const Inputs<T> a, const Gradients<T> g, const Plan plan) {
  using Of = Shape<sizeof(T), kDim>;
  constexpr int kKeys = Of::kKeys, kTiles = kKeys / 8;
  auto& shared = dynamic_shared<Storage<T, kDim>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp = thread / 32, warp_row = warp * 16;

  const int64_t split = blockIdx.x % plan.splits;
  int rest = static_cast<int>(blockIdx.x / plan.splits);
  const int column_tile = rest % plan.column_tiles;
  rest /= plan.column_tiles;
  const int row_tile = rest % plan.row_tiles;
  rest /= plan.row_tiles;
  const int bias_head = rest % plan.heads, bias_batch = rest / plan.heads;

  float sums[kTiles][4] = {};
  const int64_t all = int64_t{plan.batch_steps} * plan.head_steps * plan.row_steps * plan.column_steps;
  const int64_t last = min(all, (split + 1) * plan.steps_each);
  for (int64_t step = split * plan.steps_each; step < last; ++step) {
    const int tile = column_tile + static_cast<int>(step % plan.column_steps), start = tile * kKeys;
    const int first_row = (row_tile + static_cast<int>(step / plan.column_steps % plan.row_steps)) * kRows;
    const int head = bias_head + static_cast<int>(step / plan.column_steps / plan.row_steps % plan.head_steps);
    const int index = bias_batch + static_cast<int>(step / plan.column_steps / plan.row_steps / plan.head_steps);
    const int kv_head = head / a.group;
    const Sequence s(a, index);
    // The table and the stages of the previous step are still in use.
    __syncthreads();
    fill_rows(shared.table, a, s, index, head, first_row, s.queries);
    __syncthreads();
    const Horizon horizon(shared.table);
    if (horizon.template next<kKeys>(tile) != tile) continue;
    uint64_t open = ~uint64_t{0};
    if (a.key_mask) open = open_keys<kKeys>(a, index, start, horizon.end);
    if (open == 0) continue;

    const auto fill = [&](bool second) {
      const int stage = second ? Of::kStages - 1 : 0;
      const Rows<const T>& rows = second ? a.query : g.grad_out;
      const Rows<const T>& keys = second ? a.key : a.value;
      const int dim = second ? a.head_dim : a.value_dim;
      copy_tile<T, kDim, kRows>(shared.rows[stage], rows.at(index, head, first_row), rows.row, s.queries - first_row,
                                dim, second ? a.query_width : g.grad_out_width);
      copy_tile<T, kDim, kKeys>(shared.keys[stage], keys.at(index, kv_head, start), keys.row, horizon.end - start, dim,
                                second ? a.key_width : a.value_width);
      cp_async_commit();
    };
    // dp - delta, and then the scores.
    float e[kTiles][4] = {}, p[kTiles][4] = {};
#pragma unroll 1
    for (int half = 0; half < Of::kStages; ++half) fill(half != 0);
    cp_async_wait<Of::kStages - 1>();
    __syncthreads();
    multiply_transposed<T, kDim, kTiles>(e, shared.rows[0], warp_row, shared.keys[0], a.value_dim);
    if (a.seed) {
      unsigned kept[2];
      kept_weights<kTiles>(kept, a, shared.table, index, warp_row, start);
      drop_weights(e, kept);
    }
    float logsumexp[2], shift[2], delta[2];
    read_rows(logsumexp, shift, delta, a, s, shared.table, warp_row, g.of_rows);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) e[j][i] = fmaf(e[j][i], a.keep_scale, -delta[i / 2]);
    if constexpr (Of::kStages == 1) {
      __syncthreads();
      fill(true);
    }
    cp_async_wait<0>();
    __syncthreads();
    multiply_transposed<T, kDim, kTiles>(p, shared.rows[Of::kStages - 1], warp_row, shared.keys[Of::kStages - 1],
                                         a.head_dim);
    scale_scores(p, a.product, a.cap);
    mask_scores(p, a, shared.table, index, warp_row, start, open);
    // What is hidden may be NaN in e.
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[j][i] += p[j][i] == kHidden ? 0.0f : weight_of(p[j][i], a.unit, logsumexp[i / 2], shift[i / 2]) * e[j][i];
  }

  const int64_t rows = plan.sums_rows ? 1 : a.queries, columns = plan.sums_columns ? 1 : a.keys;
  const auto to =
      g.partials + (split * plan.elements + (bias_batch * int64_t{plan.heads} + bias_head) * rows * columns);
  const int row = row_tile * kRows + warp_row + group, column = column_tile * kKeys + 2 * member;
  if (plan.sums_columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) sum += sums[j][2 * half] + sums[j][2 * half + 1];
      sum += __shfl_xor_sync(kAll, sum, 1);
      sum += __shfl_xor_sync(kAll, sum, 2);
      sums[0][half] = sum;
    }
  }
  if (plan.sums_rows) {
    // The first column stands for all where they are summed too.
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = plan.sums_columns ? (j + i == 0 ? sums[0][0] + sums[0][1] : 0.0f) : sums[j][i] + sums[j][2 + i];
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
        if (group == 0) shared.column_sums[warp][8 * j + 2 * member + i] = sum;
      }
    __syncthreads();
    const int key = column_tile * kKeys + thread;
    if (thread >= (plan.sums_columns ? 1 : kKeys) || (!plan.sums_columns && key >= a.keys)) return;
    float sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += shared.column_sums[i][thread];
    to[plan.sums_columns ? 0 : key] = sum;
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= a.queries) continue;
    if (plan.sums_columns) {
      if (member == 0) to[row + 8 * half] = sums[0][half];
      continue;
    }
    const Global<float> of_row = to + ((row + 8 * half) * int64_t{a.keys} + column);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) store_if(column + 8 * j + i < a.keys, of_row + (8 * j + i), sums[j][2 * half + i]);
  }
}

template <class B>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const ReadOnly<float> partials, const Global<B> to, int64_t count, int64_t elements) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += partials[i * elements + at];
  to[at] = from_float<B>(sum);
}

Plan plan_of(const AttentionBackward& p, int keys_of_tile) {
  const auto divide_up = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const int64_t* size = p.grad_bias.size;
  Plan plan{};
  plan.sums_rows = size[2] == 1 && p.queries() > 1;
  plan.sums_columns = size[3] == 1 && p.keys() > 1;
  const auto row_tiles = static_cast<int>(divide_up(p.queries(), kRows));
  const auto column_tiles = static_cast<int>(divide_up(p.keys(), keys_of_tile));
  plan.heads = static_cast<int>(size[1]);
  plan.row_tiles = plan.sums_rows ? 1 : row_tiles;
  plan.column_tiles = plan.sums_columns ? 1 : column_tiles;
  plan.batch_steps = size[0] == 1 ? static_cast<int>(p.batch) : 1;
  plan.head_steps = size[1] == 1 ? static_cast<int>(p.heads()) : 1;
  plan.row_steps = plan.sums_rows ? row_tiles : 1;
  plan.column_steps = plan.sums_columns ? column_tiles : 1;
  const int64_t tiles = size[0] * size[1] * plan.row_tiles * plan.column_tiles;
  const int64_t steps = int64_t{plan.batch_steps} * plan.head_steps * plan.row_steps * plan.column_steps;
  if (tiles == 0 || steps == 0) return plan;
  plan.steps_each = divide_up(steps, std::clamp<int64_t>(kWantedBlocks / tiles, 1, steps));
  plan.splits = divide_up(steps, plan.steps_each);
  plan.elements = size[0] * size[1] * size[2] * size[3];
  plan.blocks = tiles * plan.splits;
  return plan;
}

template <class F>
void with_shape(const AttentionBackward& p, const F& f) {
  with_type(p.dtype(), [&](auto t) { with_dim(std::max(p.head_dim(), p.value_dim()), [&](auto dim) { f(t, dim); }); });
}

Plan plan_of(const AttentionBackward& p) {
  Plan plan{};
  with_shape(p, [&](auto t, auto dim) { plan = plan_of(p, Shape<sizeof(t), decltype(dim)::value>::kKeys); });
  return plan;
}

}  // namespace

int64_t attention_bias_partials(const AttentionBackward& p) {
  const Plan plan = plan_of(p);
  return plan.splits * plan.elements;
}

void attention_grad_bias(const AttentionBackward& p, const View& partials, Stream stream) {
  const Plan plan = plan_of(p);
  if (plan.blocks == 0) return;
  with_shape(p, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    Gradients<T> g{};
    g.grad_out = rows_of<const T>(p.grad_out);
    g.grad_out_width = copy_width(p.grad_out);
    g.of_rows = statistics_of(p);
    g.partials = global<float>(partials);
    launch<grad_bias_kernel<T, kDim>>(static_cast<unsigned>(plan.blocks), kThreads, sizeof(Storage<T, kDim>), stream,
                                      inputs_of<T>(p), g, plan);
  });
  with_type(p.grad_bias.dtype, [&](auto b) {
    using B = decltype(b);
    launch<sum_partials_kernel<B>>(static_cast<unsigned>((plan.elements + kThreads - 1) / kThreads), kThreads, 0,
                                   stream, global<const float>(partials), global<B>(p.grad_bias), plan.splits,
                                   plan.elements);
  });
}

}  // namespace velm::cuda
