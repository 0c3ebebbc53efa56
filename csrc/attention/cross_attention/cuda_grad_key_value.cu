// The gradients of key and of value: a block for each tile of keys of one key head, over the tiles of queries of all
// heads that share it. Their sums are in one order whatever runs beside them, so that the results have the same bits
// every time.

#include "attention/cuda_backward.h"
#include "attention/cuda_columns.h"
#include "attention/cuda_repair.h"
#include "device/launch.h"
#include "device/products.h"

namespace velm::cuda {
namespace {

// The gradient of key takes grad_out before query, so that of dp and the scores the one can be finished before the
// other is begun; the gradient of value query before grad_out.
enum Kind { kKeyGradient, kValueGradient };

// As in forward.cu and grad_query.cu, with tiles of queries in the ring.
template <int kElement, int kDim, int kKind>
struct Shape {
  static constexpr bool kFew = kDim == 256 && (kElement == 4 || kKind == kKeyGradient);
  static constexpr int kBlockRows = kElement == 4 && kDim == 256 && kKind == kKeyGradient ? 32 : kRows;
  static constexpr int kBlockThreads = 2 * kBlockRows;
  static constexpr int kQueries = kFew ? 16 : kElement == 4 || kDim == 256 ? 32 : 64, kSlots = 2;
  // A tile whose second half is in use, and the next.
  static constexpr int kTables = 2;
};

template <class T, int kDim, int kKind>
struct Storage {
  using Of = Shape<sizeof(T), kDim, kKind>;
  SharedArray<T, Of::kBlockRows * kDim> key;
  SharedArray<T, kKind == kKeyGradient ? Of::kBlockRows * kDim : 8> value;
  SharedArray<T, Of::kSlots, Of::kQueries * kDim> ring;
  ColumnTable<Of::kQueries> tables[Of::kTables];
};

template <class T>
struct Gradients {
  Rows<const T> grad_out;
  int grad_out_width;
  RowStatistics of_rows;
  // One of the two.
  Rows<T> to;
  Rows<float> float_to;
  int to_width;
  float scale;
};

template <class T, int kDim, int kKind>
__global__ void __launch_bounds__(Shape<sizeof(T), kDim, kKind>::kBlockThreads, 2)
    grad_key_value_kernel(const Inputs<T> a, const Gradients<T> g, int key_blocks) {
  using Of = Shape<sizeof(T), kDim, kKind>;
  constexpr int kQueries = Of::kQueries, kTiles = kQueries / 8, kSlots = Of::kSlots;
  constexpr int kBlockRows = Of::kBlockRows, kBlockThreads = Of::kBlockThreads;
  constexpr unsigned kEverything = (1u << 2 * kTiles) - 1;
  auto& shared = dynamic_shared<Storage<T, kDim, kKind>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, member = lane % 4;
  const int warp_row = thread / 32 * 16;

  const int key_block = static_cast<int>(blockIdx.x) % key_blocks, kv_heads = a.heads / a.group;
  const int kv_head = static_cast<int>(blockIdx.x) / key_blocks % kv_heads, first_head = kv_head * a.group;
  const int index = static_cast<int>(blockIdx.x) / key_blocks / kv_heads;
  const Sequence s(a, index);
  const int first_key = key_block * kBlockRows, warp_key = first_key + warp_row;
  if (first_key >= s.keys) return;
  const KeyBlock<T, kBlockRows> keys(a, s, index, first_key);
  const int tiles_of_head = (s.queries + kQueries - 1) / kQueries;

  int tile = keys.template first<kQueries>(a.group);
  if (tile != kNoTile) {
    const int rows = keys.length - first_key;
    copy_tile<T, kDim, kBlockRows, kBlockThreads>(shared.key, a.key.at(s.batch, kv_head, s.first_key + first_key),
                                                  a.key.row, rows, a.head_dim, a.key_width);
    if constexpr (kKind == kKeyGradient)
      copy_tile<T, kDim, kBlockRows, kBlockThreads>(shared.value, a.value.at(s.batch, kv_head, s.first_key + first_key),
                                                    a.value.row, rows, a.value_dim, a.value_width);
  }
  // Queries and the gradients of their outputs in turn, and with the first of them the table.
  Ring<kSlots> ring;
  int ahead = tile, ahead_table = 0, table = 0;
  const auto copy = [&](int slot, bool second) {
    if (ahead == kNoTile) return;
    const int head = first_head + ahead / tiles_of_head, start = ahead % tiles_of_head * kQueries;
    const bool is_query = second == (kKind == kKeyGradient);
    const Rows<const T>& rows = is_query ? a.query : g.grad_out;
    copy_tile<T, kDim, kQueries, kBlockThreads>(shared.ring[slot], rows.at(s.batch, head, s.first_query + start),
                                                rows.row, s.queries - start, is_query ? a.head_dim : a.value_dim,
                                                is_query ? a.query_width : g.grad_out_width);
    if (second) {
      ahead = keys.template next<kQueries>(ahead + 1, a.group);
    } else {
      keys.template copy_table<kQueries>(shared.tables[ahead_table], head, start, g.of_rows);
      ahead_table = ahead_table + 1 == Of::kTables ? 0 : ahead_table + 1;
    }
  };
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) ring.fill(copy, i % 2 != 0);
  const bool hides = keys.hides();

  // Whether a query sees the two keys of the thread: those that none sees are left alone by what is NaN in others.
  bool is_seen[2] = {};
  float total[kDim / 8][4] = {};
  while (tile != kNoTile) {
    const int head = first_head + tile / tiles_of_head, start = tile % tiles_of_head * kQueries, following = ahead;
    auto& columns = shared.tables[table];
    table = table + 1 == Of::kTables ? 0 : table + 1;
    int slot = ring.next(copy, kSlots % 2 == 0);
    [[maybe_unused]] unsigned kept[4] = {};
    if (a.seed) kept_columns<kTiles>(kept, a, index, head, start, warp_key);

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
      slot = ring.next(copy, kSlots % 2 != 0);
    }

    float p[kTiles][4] = {};
    multiply_transposed<T, kDim, kTiles>(p, shared.key, warp_row, shared.ring[slot], a.head_dim);
    if (a.scales) scale_scores(p, a.product, 0.0f);
    if (a.cap != 0.0f) cap_scores(p, a.cap, e, kKind == kKeyGradient);
    unsigned seen = kAll;
    if (hides || !keys.template all_see<kQueries>(columns, start, warp_key)) {
      keys.template mask<kTiles>(p, columns, head, start, warp_key);
      seen = seen_keys(p);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) is_seen[i / 2] |= p[j][i] != kHidden;
    } else {
      is_seen[0] = is_seen[1] = true;
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float logsumexp = columns.logsumexp[8 * j + 2 * member + i];
        const float shift = columns.shift[8 * j + 2 * member + i];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = p[j][2 * half + i];
          // What is hidden has no logsumexp perhaps, and may be NaN in e; of what is seen a NaN there is a result.
          const bool is_hidden = x == kHidden;
          x = weight_of(x, a.unit, logsumexp, shift);
          if constexpr (kKind == kKeyGradient)
            x *= e[j][2 * half + i];
          else if (a.seed && !(kept[2 * i + half] >> 4 * j & 1))
            x = 0.0f;
          x = is_hidden ? 0.0f : x;
        }
      }

    if constexpr (kKind == kValueGradient) slot = ring.next(copy, kSlots % 2 != 0);
    const int dim = kKind == kKeyGradient ? a.head_dim : a.value_dim;
    if (__all_sync(kAll, (seen & kEverything) == kEverything))
      multiply<T, kDim, kTiles, false>(total, p, shared.ring[slot], dim, seen);
    else
      multiply<T, kDim, kTiles, true>(total, p, shared.ring[slot], dim, seen);
    tile = kSlots == 2 ? ahead : following;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) is_seen[half] = (__ballot_sync(kAll, is_seen[half]) >> (lane & ~3) & 15) != 0;
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) total[j][i] = is_seen[i / 2] ? total[j][i] * g.scale : 0.0f;
  const int dim = kKind == kKeyGradient ? a.head_dim : a.value_dim;
  const SpoiledRows spoiled(total, is_seen);
  if (g.float_to.data) {
    store_float_rows<kDim>(total, dim, [&](int row) {
      const int key = warp_key + row;
      return key < s.keys ? g.float_to.at(s.batch, kv_head, s.first_key + key) : Global<float>(nullptr);
    });
  } else {
    const Shared<T> stage = shared.key;
    store_rows<T, kDim>(stage + warp_row * kDim, total, dim, g.to_width, [&](int row) {
      const int key = warp_key + row;
      return key < s.keys ? g.to.at(s.batch, kv_head, s.first_key + key) : Global<T>(nullptr);
    });
  }
  if (!spoiled.any() || !hides_from_some(a)) return;

  __syncwarp();
#pragma unroll 1
  for (int row = 0; row < 16; ++row) {
    const int key = warp_key + row;
    if (key >= s.keys || !spoiled.has(row)) continue;
    RowSum<kDim> sum;
#pragma unroll 1
    for (int i = 0; i < a.group * s.queries && !sum.is_nan(dim); ++i) {
      const int head = first_head + i / s.queries, query = i % s.queries;
      const PairScore pair = score_of(a, s, index, head, query, key);
      if (pair.score == kHidden) continue;
      if constexpr (kKind == kKeyGradient) {
        sum.add(grad_of_score(a, s, index, head, query, key, pair, g.grad_out, g.of_rows),
                a.query.at(s.batch, head, s.first_query + query), dim);
      } else {
        const int64_t at = s.row_number(a, head, query);
        const float weight = weight_of(pair.score, a.unit, g.of_rows.logsumexp[at], g.of_rows.shift[at]);
        sum.add(keeps(a, index, head, query, key) ? weight : 0.0f, g.grad_out.at(s.batch, head, s.first_query + query),
                dim);
      }
    }
    if (g.float_to.data)
      sum.put(g.float_to.at(s.batch, kv_head, s.first_key + key), dim, g.scale);
    else
      sum.put(g.to.at(s.batch, kv_head, s.first_key + key), dim, g.scale);
  }
}

template <int kKind, class T>
void run(const AttentionBackward& p, const Gradients<T>& g, Stream stream) {
  with_dim(std::max(p.head_dim(), p.value_dim()), [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Of = Shape<sizeof(T), kDim, kKind>;
    const int64_t key_blocks = (p.longest_keys + Of::kBlockRows - 1) / Of::kBlockRows;
    const int64_t blocks = p.batch * p.kv_heads() * key_blocks;
    if (blocks == 0) return;
    launch<grad_key_value_kernel<T, kDim, kKind>>(static_cast<unsigned>(blocks), Of::kBlockThreads,
                                                  sizeof(Storage<T, kDim, kKind>), stream, inputs_of<T>(p), g,
                                                  static_cast<int>(key_blocks));
  });
}

template <class T>
Gradients<T> gradients_of(const AttentionBackward& p) {
  Gradients<T> g{};
  g.grad_out = rows_of<const T>(p.grad_out);
  g.grad_out_width = copy_width(p.grad_out);
  g.of_rows = statistics_of(p);
  return g;
}

}  // namespace

void attention_grad_key(const AttentionBackward& p, Stream stream) {
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    Gradients<T> g = gradients_of<T>(p);
    g.scale = static_cast<float>(p.scale);
    if (p.grad_key.dtype == p.dtype())
      g.to = rows_of<T>(p.grad_key);
    else
      g.float_to = rows_of<float>(p.grad_key);
    g.to_width = copy_width(p.grad_key);
    run<kKeyGradient>(p, g, stream);
  });
}

void attention_grad_value(const AttentionBackward& p, Stream stream) {
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    Gradients<T> g = gradients_of<T>(p);
    g.of_rows.delta = nullptr;
    g.scale = p.seed ? static_cast<float>(1.0 / (1.0 - p.dropout_p)) : 1.0f;
    g.to = rows_of<T>(p.grad_value);
    g.to_width = copy_width(p.grad_value);
    run<kValueGradient>(p, g, stream);
  });
}

}  // namespace velm::cuda
