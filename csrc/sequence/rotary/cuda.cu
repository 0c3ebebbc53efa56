// rotary, forward and backward: queries and keys pass through registers once. A thread has a unit of a token, whose
// sines and cosines it reads once for several heads.

#include "sequence/rotary/cuda_pairs.h"

namespace velm::cuda {
namespace {

// Heads that a thread goes through.
constexpr int64_t kHeads = 8;

template <class T>
struct Side {
  ReadOnly<T> x;
  Global<T> out;
  int64_t batch, head, row, to_batch, to_head, to_row, heads;
  unsigned groups, blocks;
};

struct Shape {
  Units units;
  int64_t tokens;
  int lanes;
  unsigned tiles;
  bool back;
};

template <class T, int N, bool kNeighbours>
__global__ void __launch_bounds__(kThreads) rotary_kernel(Side<T> query, Side<T> key, TableRows tables, Shape shape) {
  unsigned block = blockIdx.x;
  Side<T> side = query;
  if (block >= query.blocks) {
    block -= query.blocks;
    side = key;
  }
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes, row = static_cast<int>(threadIdx.x) / shape.lanes;
  const int64_t token = int64_t{block % shape.tiles} * (kThreads / shape.lanes) + row;
  if (token >= shape.tokens) return;
  const int64_t batch = block / shape.tiles / side.groups;
  const int64_t first_head = int64_t{block / shape.tiles % side.groups} * kHeads;
  const int64_t heads = side.heads - first_head < kHeads ? side.heads - first_head : kHeads;
  const auto from = side.x + (batch * side.batch + first_head * side.head + token * side.row);
  const auto to = side.out + (batch * side.to_batch + first_head * side.to_head + token * side.to_row);
  for (int64_t unit = lane; unit < shape.units.units; unit += shape.lanes) {
    const int64_t first = shape.units.template first<N>(unit), second = first + shape.units.step;
    if (unit >= shape.units.rotated_units) {
#pragma unroll 4
      for (int64_t h = 0; h < heads; ++h)
        store(to + (h * side.to_head + first), load<N>(from + (h * side.head + first)));
      continue;
    }
    const Rotation<N, kNeighbours> rotation(tables, batch, token, first, shape.units.step, shape.back);
#pragma unroll 4
    for (int64_t h = 0; h < heads; ++h) {
      float x[2][N];
      load_floats<T>(from + (h * side.head + first), x[0]);
      load_floats<T>(from + (h * side.head + second), x[1]);
      rotation.turn(x);
      store_floats<T>(to + (h * side.to_head + first), x[0]);
      store_floats<T>(to + (h * side.to_head + second), x[1]);
    }
  }
}

template <class T>
struct Summed {
  ReadOnly<T> grad, x;
  int64_t grad_batch, grad_head, grad_row, batch, head, row, heads;
};

// Adds what the heads of a token have of a pair: g[i] * x[i] to cos, g[i] * x[partner of i] to sin.
template <class T>
DEVICE_INLINE void add_heads(const Summed<T>& of, int64_t batch, int64_t token, int64_t first, int64_t second,
                             float (&cos)[2], float (&sin)[2]) {
  const auto grad = of.grad + (batch * of.grad_batch + token * of.grad_row);
  const auto x = of.x + (batch * of.batch + token * of.row);
#pragma unroll 4
  for (int64_t h = 0; h < of.heads; ++h) {
    const float g = to_float(grad[h * of.grad_head + first]), other_g = to_float(grad[h * of.grad_head + second]);
    const float v = to_float(x[h * of.head + first]), other_v = to_float(x[h * of.head + second]);
    cos[0] = fmaf(g, v, cos[0]);
    cos[1] = fmaf(other_g, other_v, cos[1]);
    sin[0] = fmaf(-g, other_v, sin[0]);
    sin[1] = fmaf(other_g, v, sin[1]);
  }
}

// A thread has a pair of a token.
template <class T>
__global__ void __launch_bounds__(kThreads)
    table_gradients_kernel(Summed<T> query, Summed<T> key, AnyResult grad_cos, AnyResult grad_sin, Units units,
                           int64_t tokens, int64_t pairs_of_all) {
  const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (number >= pairs_of_all) return;
  const Quotient of_pair(number, units.rotated_units), of_token(of_pair.quotient, tokens);
  const int64_t first = units.template first<1>(of_pair.rest), second = first + units.step;
  float cos[2] = {}, sin[2] = {};
  if (query.heads) add_heads(query, of_token.quotient, of_token.rest, first, second, cos, sin);
  if (key.heads) add_heads(key, of_token.quotient, of_token.rest, first, second, cos, sin);
  const int64_t at = of_pair.quotient * units.rotated;
  if (grad_cos) {
    store_any(grad_cos, at + first, cos[0]);
    store_any(grad_cos, at + second, cos[1]);
  }
  if (grad_sin) {
    store_any(grad_sin, at + first, sin[0]);
    store_any(grad_sin, at + second, sin[1]);
  }
}

template <class T>
Side<T> side_of(const RotarySide& side, unsigned tiles) {
  Side<T> found{};
  if (!side.out) return found;
  const View &x = side.x, &out = side.out;
  const unsigned groups = divide_up(x.size[1], kHeads);
  return {global<const T>(x),
          global<T>(out),
          x.stride[0],
          x.stride[1],
          x.stride[2],
          out.stride[0],
          out.stride[1],
          out.stride[2],
          x.size[1],
          groups,
          static_cast<unsigned>(x.size[0]) * groups * tiles};
}

template <class T>
Summed<T> summed_of(const View& grad, const View& x) {
  return {global<const T>(grad), global<const T>(x), grad.stride[0], grad.stride[1],      grad.stride[2],
          x.stride[0],           x.stride[1],        x.stride[2],    grad ? x.size[1] : 0};
}

}  // namespace

void rotary(const RotaryTables& tables, bool back, const RotarySide& query, const RotarySide& key, Stream stream) {
  const RotarySide& some = query.out ? query : key;
  if (!some.out) return;
  const int64_t tokens = some.x.size[2], head_dim = some.x.size[3];
  with_type(some.x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto width, auto neighbours) {
      Shape shape{units_of(tables, head_dim, width()), tokens, 0, 0, back};
      shape.lanes = lanes_of(shape.units.units, 1, kThreads);
      shape.tiles = divide_up(tokens, kThreads / shape.lanes);
      const auto of_query = side_of<T>(query, shape.tiles), of_key = side_of<T>(key, shape.tiles);
      launch<rotary_kernel<T, width(), neighbours()>>(of_query.blocks + of_key.blocks, kThreads, 0, stream, of_query,
                                                      of_key, rows_of(tables), shape);
    };
    const auto fits_all = [&](int width) {
      bool all = fits(tables, head_dim, width);
      for (const RotarySide* side : {&query, &key})
        if (side->out) all = all && is_aligned(side->x, width) && is_aligned(side->out, width);
      return all;
    };
    const auto run_by = [&](auto width) {
      tables.layout == kPairs ? run(width, std::true_type{}) : run(width, std::false_type{});
    };
    constexpr int kMost = 16 / static_cast<int>(sizeof(T));
    if (fits_all(kMost)) return run_by(std::integral_constant<int, kMost>{});
    // 8 bytes: heads of 72 columns, whose halves are no multiple of 16.
    if constexpr (kMost == 8)
      if (fits_all(4)) return run_by(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 1>{}, std::false_type{});
  });
}

void rotary_table_gradients(const RotaryTables& tables, const RotaryGradients& p, Stream stream) {
  const int64_t batch = tables.cos.size[1], tokens = tables.cos.size[2];
  const Units units = units_of(tables, tables.rotated(), 1);
  const int64_t all = batch * tokens * units.rotated_units;
  if (all == 0) return;
  with_type(p.grad_query.dtype, [&](auto t) {
    using T = decltype(t);
    launch<table_gradients_kernel<T>>(divide_up(all, kThreads), kThreads, 0, stream,
                                      summed_of<T>(p.grad_query, p.query), summed_of<T>(p.grad_key, p.key),
                                      any_result(p.grad_cos), any_result(p.grad_sin), units, tokens, all);
  });
}

}  // namespace velm::cuda
