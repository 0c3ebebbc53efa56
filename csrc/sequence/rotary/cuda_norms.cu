// normed_rotary, forward and backward. A norm is over a head of a token, which some lanes of a warp share, or over all
// heads of a token, which a block shares; either is a team here. What a team needs twice it reads again, from caches.

#include "device/reduce.h"
#include "sequence/rotary/cuda_pairs.h"

namespace velm::cuda {
namespace {

// Rows of a team in backward: a row of sums for the weight is as many times less.
constexpr int kRows = 8;
// Lanes of a team, so that it has at most this many teams in a block.
constexpr int kLeastLanes = 8, kMostTeams = kThreads / kLeastLanes;

template <class T>
struct Rows {
  ReadOnly<T> data;
  int64_t batch, head, row;
};

template <class T>
Rows<T> rows_of(const View& x) {
  return {global<const T>(x), x.stride[0], x.stride[1], x.stride[2]};
}

// A row of the norm: a token, all of whose heads it is over, or one of them.
struct Norm {
  AnyFloats weight;
  int64_t rows, heads, tokens, head_dim;
  bool over_heads;
  int lanes;
  unsigned blocks;
};

struct Team {
  int size, member, number, count;

  DEVICE_INLINE explicit Team(const Norm& norm) {
    size = norm.over_heads ? kThreads : norm.lanes;
    member = static_cast<int>(threadIdx.x) % size;
    number = static_cast<int>(threadIdx.x) / size;
    count = kThreads / size;
  }
};

// Where the norm's row `number` lies, and how many pieces (units of heads) it has: none behind the last row.
struct Place {
  int64_t batch, token, head, items;

  DEVICE_INLINE Place(const Norm& norm, const Units& units, int64_t number) {
    items = number < norm.rows ? (norm.over_heads ? norm.heads : 1) * units.units : 0;
    if (items == 0) {
      batch = token = head = 0;
      return;
    }
    const Quotient of_head(number, norm.over_heads ? 1 : norm.heads), of_token(of_head.quotient, norm.tokens);
    batch = of_token.quotient;
    token = of_token.rest;
    head = of_head.rest;
  }
  template <class P>
  DEVICE_INLINE int64_t at(const P& rows) const {
    return batch * rows.batch + head * rows.head + token * rows.row;
  }
};

// One piece of a row: a unit of one of its heads.
template <int N>
struct Item {
  int64_t head, first, second;
  bool is_rotated;

  DEVICE_INLINE Item(const Units& units, int64_t number) {
    const Quotient of_head(number, units.units);
    head = of_head.quotient;
    is_rotated = of_head.rest < units.rotated_units;
    first = units.template first<N>(of_head.rest);
    second = first + units.step;
  }
  // Both vectors; zeros in the place of a second one that there is not.
  template <class T, class P>
  DEVICE_INLINE void read(const P& row, int64_t head_stride, float (&to)[2][N]) const {
    load_floats<T>(row + (head * head_stride + first), to[0]);
    if (is_rotated) {
      load_floats<T>(row + (head * head_stride + second), to[1]);
      return;
    }
#pragma unroll
    for (int k = 0; k < N; ++k) to[1][k] = 0.0f;
  }
  DEVICE_INLINE void read_weight(const Norm& norm, float (&to)[2][N]) const {
    load_any(norm.weight, head * norm.head_dim + first, to[0]);
    if (is_rotated) load_any(norm.weight, head * norm.head_dim + second, to[1]);
  }
  template <class T>
  DEVICE_INLINE void write(const Global<T>& row, int64_t head_stride, const float (&from)[2][N]) const {
    store_floats<T>(row + (head * head_stride + first), from[0]);
    if (is_rotated) store_floats<T>(row + (head * head_stride + second), from[1]);
  }
};

struct SumsStorage {
  BlockSum<float> sum;
};

// The sum over a team, in all of its threads; the whole block takes part.
DEVICE_INLINE float team_sum(const Norm& norm, float value, SumsStorage& storage) {
  if (norm.over_heads) {
    const float sum = block_sum(value, storage.sum);
    __syncthreads();
    return sum;
  }
  for (int step = norm.lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

DEVICE_INLINE float inverse_rms(const Norm& norm, float squares, float eps) {
  const auto count = static_cast<float>((norm.over_heads ? norm.heads : 1) * norm.head_dim);
  return 1.0f / sqrtf(squares / count + eps);
}

template <class T>
struct Forward {
  Norm norm;
  Rows<T> x;
  Global<T> out;
  int64_t to_batch, to_head, to_row;
};

template <class T, int N, bool kNeighbours>
__global__ void __launch_bounds__(kThreads)
    normed_rotary_kernel(Forward<T> query, Forward<T> key, TableRows tables, Units units, float eps) {
  auto& storage = static_shared<SumsStorage>();
  int64_t block = blockIdx.x;
  Forward<T> side = query;
  if (block >= query.norm.blocks) {
    block -= query.norm.blocks;
    side = key;
  }
  const Team team(side.norm);
  const Place place(side.norm, units, block * team.count + team.number);
  const auto row = side.x.data + place.at(side.x);
  float squares = 0.0f;
  for (int64_t i = team.member; i < place.items; i += team.size) {
    float x[2][N];
    Item<N>(units, i).template read<T>(row, side.x.head, x);
#pragma unroll
    for (int k = 0; k < 2 * N; ++k) squares = fmaf(x[k / N][k % N], x[k / N][k % N], squares);
  }
  const float inverse = inverse_rms(side.norm, team_sum(side.norm, squares, storage), eps);
  const auto to = side.out + (place.batch * side.to_batch + place.head * side.to_head + place.token * side.to_row);
  for (int64_t i = team.member; i < place.items; i += team.size) {
    const Item<N> item(units, i);
    float x[2][N], weight[2][N] = {};
    item.template read<T>(row, side.x.head, x);
    item.read_weight(side.norm, weight);
#pragma unroll
    for (int k = 0; k < 2 * N; ++k) x[k / N][k % N] = x[k / N][k % N] * inverse * weight[k / N][k % N];
    if (item.is_rotated)
      Rotation<N, kNeighbours>(tables, place.batch, place.token, item.first, units.step, false).turn(x);
    item.template write<T>(to, side.to_head, x);
  }
}

template <class T>
struct Backward {
  Norm norm;
  Rows<T> grad, x;
  Global<T> grad_x;
  int64_t to_batch, to_head, to_row;
  Global<float> partials;
};

template <int N>
struct BackwardStorage {
  SumsStorage sums;
  // Of each row of a team: 1 / RMS, and that times the mean of grad * weight * x / RMS.
  SharedArray<float, kMostTeams, kRows> inverse, along;
  SharedArray<float, kThreads, 2 * N + 1> of_weight;
};

// z = x / RMS(x) * weight was rotated; d is what comes in, rotated back. The gradient of the weight is the sum over
// rows of d * x / RMS, that of x (d * weight - x / RMS * mean of d * weight * x / RMS) / RMS.
template <class T, int N, bool kNeighbours>
__global__ void __launch_bounds__(kThreads, 4)
    normed_rotary_backward_kernel(Backward<T> side, TableRows tables, Units units, float eps) {
  auto& storage = static_shared<BackwardStorage<N>>();
  const int64_t block = blockIdx.x;
  const Norm& norm = side.norm;
  const Team team(norm);
  const int64_t first_row = (block * team.count + team.number) * kRows;
  const auto read = [&](const Place& place, const Item<N>& item, float (&d)[2][N], float (&x)[2][N]) {
    item.template read<T>(side.grad.data + place.at(side.grad), side.grad.head, d);
    if (item.is_rotated)
      Rotation<N, kNeighbours>(tables, place.batch, place.token, item.first, units.step, true).turn(d);
    item.template read<T>(side.x.data + place.at(side.x), side.x.head, x);
  };
#pragma unroll 1
  for (int r = 0; r < kRows; ++r) {
    const Place place(norm, units, first_row + r);
    float squares = 0.0f, along = 0.0f;
    for (int64_t i = team.member; i < place.items; i += team.size) {
      const Item<N> item(units, i);
      float d[2][N], x[2][N], weight[2][N] = {};
      read(place, item, d, x);
      item.read_weight(norm, weight);
#pragma unroll
      for (int k = 0; k < 2 * N; ++k) {
        const float v = x[k / N][k % N];
        squares = fmaf(v, v, squares);
        along = fmaf(d[k / N][k % N] * weight[k / N][k % N], v, along);
      }
    }
    const float inverse = inverse_rms(norm, team_sum(norm, squares, storage.sums), eps);
    const auto count = static_cast<float>((norm.over_heads ? norm.heads : 1) * norm.head_dim);
    along = team_sum(norm, along, storage.sums) * inverse / count * inverse;
    if (team.member == 0) {
      storage.inverse[team.number][r] = inverse;
      storage.along[team.number][r] = along;
    }
  }
  __syncthreads();
  const int64_t items = (norm.over_heads ? norm.heads : 1) * units.units;
  // All teams of the block are at the same pieces of their rows.
  for (int64_t base = 0; base < items; base += team.size) {
    float sums[2][N] = {};
    if (base + team.member < items) {
      const Item<N> item(units, base + team.member);
      float weight[2][N] = {};
      item.read_weight(norm, weight);
#pragma unroll 1
      for (int r = 0; r < kRows; ++r) {
        const Place place(norm, units, first_row + r);
        if (place.items == 0) break;
        float d[2][N], x[2][N];
        read(place, item, d, x);
        const float inverse = storage.inverse[team.number][r], along = storage.along[team.number][r];
#pragma unroll
        for (int k = 0; k < 2 * N; ++k) {
          const float in = d[k / N][k % N], v = x[k / N][k % N];
          sums[k / N][k % N] = fmaf(in, v * inverse, sums[k / N][k % N]);
          d[k / N][k % N] = inverse * (in * weight[k / N][k % N] - along * v);
        }
        if (side.grad_x)
          item.template write<T>(
              side.grad_x + (place.batch * side.to_batch + place.head * side.to_head + place.token * side.to_row),
              side.to_head, d);
      }
    }
    if (!side.partials) continue;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2 * N; ++k) storage.of_weight[threadIdx.x][k] = sums[k / N][k % N];
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < team.size * 2 * N; j += kThreads) {
      const int member = j / (2 * N), k = j % (2 * N);
      if (base + member >= items) continue;
      const Item<N> item(units, base + member);
      if (k >= N && !item.is_rotated) continue;
      float sum = 0.0f;
      for (int t = 0; t < team.count; ++t) sum += storage.of_weight[t * team.size + member][k];
      const int64_t column = item.head * norm.head_dim + (k < N ? item.first + k : item.second + k - N);
      side.partials[block * (norm.over_heads ? norm.heads : 1) * norm.head_dim + column] = sum;
    }
  }
}

// Columns of a block, whose threads share the rows of each.
constexpr int kColumns = 8, kStripes = kThreads / kColumns;

struct PartialsStorage {
  SharedArray<float, kStripes, kColumns> sums;
};

// to[c] = the sum over rows of partials[row, c]: of each stripe of rows in order, and of the stripes in order.
__global__ void __launch_bounds__(kThreads)
    weight_sums_kernel(ReadOnly<float> partials, AnyResult to, int64_t rows, int64_t columns) {
  auto& storage = static_shared<PartialsStorage>();
  const int within = static_cast<int>(threadIdx.x) % kColumns, stripe = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = int64_t{blockIdx.x} * kColumns + within;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = stripe; row < rows; row += kStripes) sum += partials[row * columns + column];
  }
  storage.sums[stripe][within] = sum;
  __syncthreads();
  if (stripe != 0 || column >= columns) return;
  float total = 0.0f;
  for (int s = 0; s < kStripes; ++s) total += storage.sums[s][within];
  store_any(to, column, total);
}

Norm norm_of(const View& x, const View& weight, bool over_heads, const Units& units, int rows_of_team) {
  Norm norm{};
  norm.weight = any_floats(weight);
  norm.heads = x.size[1];
  norm.tokens = x.size[2];
  norm.head_dim = x.size[3];
  norm.over_heads = over_heads;
  norm.rows = x.size[0] * norm.tokens * (over_heads ? 1 : norm.heads);
  norm.lanes = lanes_of(units.units, kLeastLanes, 32);
  norm.blocks = divide_up(norm.rows, int64_t{over_heads ? 1 : kThreads / norm.lanes} * rows_of_team);
  return norm;
}

// Calls run with the width of vectors, and whether the partners of columns are beside them.
template <class T, class Aligned, class Run>
void with_units(const RotaryTables& tables, int64_t head_dim, const Aligned& aligned, const Run& run) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  if (!fits(tables, head_dim, kMost) || !aligned(kMost))
    return run(std::integral_constant<int, 1>{}, std::false_type{});
  const std::integral_constant<int, kMost> width;
  tables.layout == kPairs ? run(width, std::true_type{}) : run(width, std::false_type{});
}

bool weight_fits(const View& weight, int width) {
  const int most = 16 / static_cast<int>(bytes_of(weight.dtype));
  return is_aligned(weight, width < most ? width : most);
}

template <class T>
Forward<T> forward_of(const NormedSide& side, const Units& units) {
  if (!side.weight || !side.out) return {};
  return {norm_of(side.x, side.weight, side.is_over_heads(), units, 1),
          rows_of<T>(side.x),
          global<T>(side.out),
          side.out.stride[0],
          side.out.stride[1],
          side.out.stride[2]};
}

template <class T>
Backward<T> backward_of(const NormedGradients& side, const Units& units) {
  return {norm_of(side.x, side.weight, side.is_over_heads(), units, kRows),
          rows_of<T>(side.grad),
          rows_of<T>(side.x),
          global<T>(side.grad_x),
          side.grad_x.stride[0],
          side.grad_x.stride[1],
          side.grad_x.stride[2],
          global<float>(side.partials)};
}

}  // namespace

void normed_rotary(const RotaryTables& tables, float eps, const NormedSide& query, const NormedSide& key,
                   Stream stream) {
  const NormedSide& some = query.weight && query.out ? query : key;
  if (!some.weight || !some.out) return;
  const int64_t head_dim = some.x.size[3];
  with_type(some.x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto aligned = [&](int width) {
      bool all = true;
      for (const NormedSide* side : {&query, &key})
        if (side->weight && side->out)
          all = all && is_aligned(side->x, width) && is_aligned(side->out, width) && weight_fits(side->weight, width);
      return all;
    };
    with_units<T>(tables, head_dim, aligned, [&](auto width, auto neighbours) {
      const Units units = units_of(tables, head_dim, width());
      const auto of_query = forward_of<T>(query, units), of_key = forward_of<T>(key, units);
      launch<normed_rotary_kernel<T, width(), neighbours()>>(of_query.norm.blocks + of_key.norm.blocks, kThreads, 0,
                                                             stream, of_query, of_key, cuda::rows_of(tables), units,
                                                             eps);
    });
  });
}

int64_t normed_rotary_partials(const RotaryTables& tables, const NormedGradients& side) {
  // At least as many as there are whatever the width: the fewest lanes for a row.
  const Units units = units_of(tables, side.x.size[3], 1);
  return norm_of(side.x, side.weight, side.is_over_heads(), units, kRows).blocks;
}

void normed_rotary_backward(const RotaryTables& tables, float eps, const NormedGradients& side, Stream stream) {
  if (!side) return;
  int64_t rows = 0;
  if (side.x)
    with_type(side.x.dtype, [&](auto t) {
      using T = decltype(t);
      const auto aligned = [&](int width) {
        return is_aligned(side.x, width) && is_aligned(side.grad, width) && is_aligned(side.grad_x, width) &&
               weight_fits(side.weight, width);
      };
      with_units<T>(tables, side.x.size[3], aligned, [&](auto width, auto neighbours) {
        const Units units = units_of(tables, side.x.size[3], width());
        const auto problem = backward_of<T>(side, units);
        rows = problem.norm.blocks;
        launch<normed_rotary_backward_kernel<T, width(), neighbours()>>(problem.norm.blocks, kThreads, 0, stream,
                                                                        problem, cuda::rows_of(tables), units, eps);
      });
    });
  if (!side.grad_weight) return;
  const int64_t columns = side.grad_weight.size[3];
  launch<weight_sums_kernel>(divide_up(columns, kColumns), kThreads, 0, stream, global<const float>(side.partials),
                             any_result(side.grad_weight), rows, columns);
}

}  // namespace velm::cuda
