// What is summed over queries: the gradients of key and of value, and the attention that each key received. A block for
// each tile of keys of one key head (or, of what is not a gradient, one query head), over the tiles of queries of all
// heads that share it. Their sums are in one order whatever runs beside them, so that the results have the same bits
// every time.

#include "attention/backward_cuda.h"
#include "attention/cuda_columns.h"
#include "attention/cuda_products.h"
#include "device/launch.h"

namespace velm::cuda {
namespace {

// What a kernel computes. The gradient of key takes grad_out before query, so that of dp and the scores the one can be
// finished before the other is begun; the gradient of value query before grad_out.
enum Kind { kKeyGradient, kValueGradient, kKeyMass };

// As in forward.cu, with tiles of queries in the ring.
template <int kElement, int kDim, int kKind>
struct Shape {
  static constexpr bool kFew = kDim == 256 && (kElement == 4 || kKind == kKeyGradient);
  static constexpr int kQueries = kFew ? 16 : kElement == 4 || kDim == 256 ? 32 : 64, kSlots = 2;
  // A tile whose second half is in use, and the next.
  static constexpr int kTables = 2;
};

template <class T, int kDim, int kKind>
struct Storage {
  using Of = Shape<sizeof(T), kDim, kKind>;
  SharedArray<T, kRows * kDim> key;
  SharedArray<T, kKind == kKeyGradient ? kRows * kDim : 8> value;
  SharedArray<T, Of::kSlots, Of::kQueries * kDim> ring;
  ColumnTable<Of::kQueries> tables[Of::kTables];
};

template <class T>
struct Gradients {
  Rows<const T> grad_out;
  int grad_out_width;
  ReadOnly<float> logsumexp, delta;
  // One of the three.
  Rows<T> to;
  Rows<float> wide_to;
  Global<float> key_mass;
  int to_width;
  float scale;
};

template <class T, int kDim, int kKind>
__global__ void __launch_bounds__(kThreads, 2)
    grad_key_value_kernel(const Inputs<T> a, const Gradients<T> g, int key_blocks) {
  using Of = Shape<sizeof(T), kDim, kKind>;
  constexpr int kQueries = Of::kQueries, kTiles = kQueries / 8, kSlots = Of::kSlots;
  constexpr unsigned kEverything = (1u << 2 * kTiles) - 1;
  auto& shared = dynamic_shared<Storage<T, kDim, kKind>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 32 * 16;

  const int heads = kKind == kKeyMass ? 1 : a.group, blocks_of_heads = a.heads / heads;
  const int key_block = static_cast<int>(blockIdx.x) % key_blocks;
  const int first_head = static_cast<int>(blockIdx.x) / key_blocks % blocks_of_heads * heads;
  const int kv_head = first_head / a.group;
  const int index = static_cast<int>(blockIdx.x) / key_blocks / blocks_of_heads;
  const Sequence s(a, index);
  const int first_key = key_block * kRows, warp_key = first_key + warp_row;
  if (first_key >= s.keys) return;
  const KeyBlock<T> keys(a, s, index, first_key);
  const int tiles_of_head = (s.queries + kQueries - 1) / kQueries;

  int tile = keys.template next<kQueries>(0, heads);
  if (tile != kNoTile) {
    const int rows = keys.length - first_key;
    copy_tile<T, kDim, kRows>(shared.key, a.key.at(s.batch, kv_head, s.first_key + first_key), a.key.row, rows,
                              a.head_dim, a.key_width);
    if constexpr (kKind == kKeyGradient)
      copy_tile<T, kDim, kRows>(shared.value, a.value.at(s.batch, kv_head, s.first_key + first_key), a.value.row, rows,
                                a.value_dim, a.value_width);
  }
  int ahead = tile, ahead_slot = 0, ahead_table = 0, slot = 0, table = 0;
  // The first or the second half of a step over a tile of queries.
  const auto fill = [&](bool second) {
    if (ahead != kNoTile) {
      const int head = first_head + ahead / tiles_of_head, start = ahead % tiles_of_head * kQueries;
      const bool is_query = second == (kKind == kKeyGradient);
      const Rows<const T>& rows = is_query ? a.query : g.grad_out;
      copy_tile<T, kDim, kQueries>(shared.ring[ahead_slot], rows.at(s.batch, head, s.first_query + start), rows.row,
                                   s.queries - start, is_query ? a.head_dim : a.value_dim,
                                   is_query ? a.query_width : g.grad_out_width);
      if (!second) {
        keys.template copy_table<kQueries>(shared.tables[ahead_table], head, start, g.logsumexp, g.delta);
        ahead_table = ahead_table + 1 == Of::kTables ? 0 : ahead_table + 1;
      }
      if (second || kKind == kKeyMass) ahead = keys.template next<kQueries>(ahead + 1, heads);
    }
    cp_async_commit();
    ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
  };
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) fill(kKind != kKeyMass && i % 2);

  // What key_mask shows of the two keys of a thread.
  bool open[2] = {true, true};
  if (a.key_mask) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = warp_key + group + 8 * half;
      open[half] = key < keys.length && a.key_mask[index * int64_t{a.keys} + key] != 0;
    }
  }
  const bool hides = !__all_sync(kAll, open[0] && open[1]) || a.mask.data || a.bias.data || a.wide_bias.data;

  float total[kKind == kKeyMass ? 1 : kDim / 8][4] = {};
  while (tile != kNoTile) {
    const int head = first_head + tile / tiles_of_head, start = tile % tiles_of_head * kQueries;
    auto& columns = shared.tables[table];
    table = table + 1 == Of::kTables ? 0 : table + 1;
    cp_async_wait<kSlots - 2>();
    __syncthreads();
    fill(kKind != kKeyMass && kSlots % 2 == 0);
    [[maybe_unused]] unsigned kept[4] = {};
    if (kKind != kKeyMass && a.seed) kept_columns<kTiles>(kept, a, index, head, start, warp_key);

    // dp - delta
    [[maybe_unused]] float e[kTiles][4] = {};
    if constexpr (kKind == kKeyGradient) {
      multiply_transposed<T, kDim, kTiles>(e, shared.value, warp_row, shared.ring[slot], a.value_dim);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float delta = columns.delta[8 * j + 2 * member + i];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = e[j][2 * half + i];
            if (a.seed && !(kept[2 * i + half] >> 4 * j & 1)) x = 0.0f;
            x = fmaf(x, a.keep_scale, -delta);
          }
        }
      slot = slot + 1 == kSlots ? 0 : slot + 1;
      cp_async_wait<kSlots - 2>();
      __syncthreads();
      fill(kSlots % 2 != 0);
    }

    float p[kTiles][4] = {};
    multiply_transposed<T, kDim, kTiles>(p, shared.key, warp_row, shared.ring[slot], a.head_dim);
    scale_scores(p, a.product, 0.0f);
    if (a.cap != 0.0f) cap_scores(p, a.cap, e, kKind == kKeyGradient);
    unsigned seen = kAll;
    if (hides || !keys.template all_see<kQueries>(columns, start, warp_key)) {
      keys.template mask<kTiles>(p, columns, head, start, warp_key, open);
      seen = seen_keys(p);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float logsumexp = columns.logsumexp[8 * j + 2 * member + i] * kLog2E;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = p[j][2 * half + i];
          // What is hidden has no logsumexp perhaps, and may be NaN in e.
          x = x == -kInfinity ? 0.0f : exp2_approximate(x - logsumexp);
          if constexpr (kKind == kKeyGradient)
            x = x == 0.0f ? 0.0f : x * e[j][2 * half + i];
          else if constexpr (kKind == kKeyMass)
            total[0][half] += x;
          else if (a.seed && !(kept[2 * i + half] >> 4 * j & 1))
            x = 0.0f;
        }
      }

    if constexpr (kKind == kValueGradient) {
      slot = slot + 1 == kSlots ? 0 : slot + 1;
      cp_async_wait<kSlots - 2>();
      __syncthreads();
      fill(kSlots % 2 != 0);
    }
    if constexpr (kKind != kKeyMass) {
      const int dim = kKind == kKeyGradient ? a.head_dim : a.value_dim;
      if (__all_sync(kAll, (seen & kEverything) == kEverything))
        multiply<T, kDim, kTiles, false>(total, p, shared.ring[slot], dim, seen);
      else
        multiply<T, kDim, kTiles, true>(total, p, shared.ring[slot], dim, seen);
    }
    slot = slot + 1 == kSlots ? 0 : slot + 1;
    tile = keys.template next<kQueries>(tile + 1, heads);
  }

  if constexpr (kKind == kKeyMass) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = total[0][half];
      sum += __shfl_xor_sync(kAll, sum, 1);
      sum += __shfl_xor_sync(kAll, sum, 2);
      const int key = warp_key + group + 8 * half;
      if (member == 0 && key < s.keys) {
        const int64_t row = a.cu_seqlens_q ? first_head : index * int64_t{a.heads} + first_head;
        g.key_mass[row * a.keys + s.first_key + key] = sum;
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[j][i] *= g.scale;
    const int dim = kKind == kKeyGradient ? a.head_dim : a.value_dim;
    if (g.wide_to.data) {
      store_wide_rows<kDim>(total, dim, [&](int row) {
        const int key = warp_key + row;
        return key < s.keys ? g.wide_to.at(s.batch, kv_head, s.first_key + key) : Global<float>(nullptr);
      });
    } else {
      const Shared<T> stage = shared.key;
      store_rows<T, kDim>(stage + warp_row * kDim, total, dim, g.to_width, [&](int row) {
        const int key = warp_key + row;
        return key < s.keys ? g.to.at(s.batch, kv_head, s.first_key + key) : Global<T>(nullptr);
      });
    }
  }
}

template <int kKind, class T>
void run(const Attention& p, const Gradients<T>& g, Stream stream) {
  const int64_t key_blocks = (p.longest_keys + kRows - 1) / kRows;
  const int64_t blocks = p.batch * (kKind == kKeyMass ? p.heads : p.kv_heads) * key_blocks;
  if (blocks == 0) return;
  // Two tiles of 64 rows of 256 floats are more shared memory than a block may have.
  constexpr int kMost = sizeof(T) == 4 && kKind == kKeyGradient ? 128 : 256;
  with_dim<kMost>(kKind == kKeyMass ? p.head_dim : std::max(p.head_dim, p.value_dim), [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    launch<grad_key_value_kernel<T, kDim, kKind>>(static_cast<unsigned>(blocks), kThreads,
                                                  sizeof(Storage<T, kDim, kKind>), stream, inputs_of<T>(p), g,
                                                  static_cast<int>(key_blocks));
  });
}

template <class T>
Gradients<T> gradients_of(const AttentionBackward& p) {
  Gradients<T> g{};
  g.grad_out = rows_of<const T>(p.grad_out);
  g.grad_out_width = copy_width(p.grad_out, p.dtype);
  g.logsumexp = global<const float>(p.logsumexp);
  g.delta = global<const float>(p.delta);
  return g;
}

}  // namespace

void attention_grad_key(const AttentionBackward& p, Stream stream) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    Gradients<T> g = gradients_of<T>(p);
    g.scale = static_cast<float>(p.scale);
    if (p.wide_grad_key)
      g.wide_to = rows_of<float>(p.grad_key);
    else
      g.to = rows_of<T>(p.grad_key);
    g.to_width = copy_width(p.grad_key, p.dtype);
    run<kKeyGradient>(p, g, stream);
  });
}

void attention_grad_value(const AttentionBackward& p, Stream stream) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    Gradients<T> g = gradients_of<T>(p);
    g.delta = nullptr;
    g.scale = p.seed ? static_cast<float>(1.0 / (1.0 - p.dropout_p)) : 1.0f;
    g.to = rows_of<T>(p.grad_value);
    g.to_width = copy_width(p.grad_value, p.dtype);
    run<kValueGradient>(p, g, stream);
  });
}

void attention_key_mass(const Attention& p, const Span& logsumexp, const Span& key_mass, Stream stream) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    Gradients<T> g{};
    g.logsumexp = global<const float>(logsumexp);
    g.key_mass = global<float>(key_mass);
    run<kKeyMass>(p, g, stream);
  });
}

}  // namespace velm::cuda
