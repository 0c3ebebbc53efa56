// The attention that each key received: the sum of its weights over queries. A block for each tile of keys of one query
// head, over the tiles of its queries. Any head_dim is taken 64 columns at a time, as no results of a product are kept.

#include "attention/cuda_backward.h"
#include "attention/cuda_columns.h"
#include "device/launch.h"
#include "device/products.h"

namespace velm::cuda {
namespace {

constexpr int kPart = 64, kMostParts = 4, kSlots = 2;
template <class T>
constexpr int kQueries = sizeof(T) == 4 ? 32 : 64;

template <class T>
struct Storage {
  SharedArray<T, kMostParts, kRows * kPart> key;
  SharedArray<T, kSlots, kQueries<T> * kPart> ring;
  // Of the tile in use, and the next.
  ColumnTable<kQueries<T>> tables[2];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    key_mass_kernel(const Inputs<T> a, const RowStatistics of_rows, const Global<float> key_mass, int key_blocks) {
  constexpr int kTiles = kQueries<T> / 8;
  auto& shared = dynamic_shared<Storage<T>>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 32 * 16;

  const int key_block = static_cast<int>(blockIdx.x) % key_blocks;
  const int head = static_cast<int>(blockIdx.x) / key_blocks % a.heads, kv_head = head / a.group;
  const int index = static_cast<int>(blockIdx.x) / key_blocks / a.heads;
  const Sequence s(a, index);
  const int first_key = key_block * kRows, warp_key = first_key + warp_row;
  if (first_key >= s.keys) return;
  const KeyBlock<T> keys(a, s, index, first_key);
  const int parts = (a.head_dim + kPart - 1) / kPart;
  const auto columns_of = [&](int part) { return min(a.head_dim - part * kPart, kPart); };

  int tile = keys.template first<kQueries<T>>(1);
  if (tile != kNoTile) {
    const auto from = a.key.at(s.batch, kv_head, s.first_key + first_key);
#pragma unroll 1
    for (int part = 0; part < parts; ++part)
      copy_tile<T, kPart, kRows>(shared.key[part], from + part * kPart, a.key.row, keys.length - first_key,
                                 columns_of(part), a.key_width);
  }
  // The parts of each tile of queries, and with the first of them the table.
  Ring<kSlots> ring;
  int ahead = tile, ahead_part = 0, ahead_table = 0, table = 0;
  const auto copy = [&](int slot) {
    if (ahead == kNoTile) return;
    const int start = ahead * kQueries<T>;
    copy_tile<T, kPart, kQueries<T>>(shared.ring[slot],
                                     a.query.at(s.batch, head, s.first_query + start) + ahead_part * kPart, a.query.row,
                                     s.queries - start, columns_of(ahead_part), a.query_width);
    if (ahead_part == 0) {
      keys.template copy_table<kQueries<T>>(shared.tables[ahead_table], head, start, of_rows);
      ahead_table ^= 1;
    }
    if (++ahead_part < parts) return;
    ahead_part = 0;
    ahead = keys.template next<kQueries<T>>(ahead + 1, 1);
  };
  ring.fill(copy);
  const bool hides = keys.hides();

  float total[2] = {};
  while (tile != kNoTile) {
    const int start = tile * kQueries<T>;
    auto& columns = shared.tables[table];
    table ^= 1;
    float p[kTiles][4] = {};
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      // Where the last part is waited for, the copies are about to begin with the next tile.
      if (part + 1 == parts) tile = ahead;
      const Shared<T> queries = shared.ring[ring.next(copy)];
      multiply_transposed<T, kPart, kTiles>(p, shared.key[part], warp_row, queries, columns_of(part));
    }
    if (a.scales) scale_scores(p, a.product, a.cap);
    if (hides || !keys.template all_see<kQueries<T>>(columns, start, warp_key))
      keys.template mask<kTiles>(p, columns, head, start, warp_key);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float logsumexp = columns.logsumexp[8 * j + 2 * member + i];
        const float shift = columns.shift[8 * j + 2 * member + i];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float x = p[j][2 * half + i];
          // What is hidden has no logsumexp perhaps.
          total[half] += x == kHidden ? 0.0f : weight_of(x, a.unit, logsumexp, shift);
        }
      }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = total[half];
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    const int key = warp_key + group + 8 * half;
    if (member == 0 && key < s.keys) key_mass[(s.batch * int64_t{a.heads} + head) * a.keys + s.first_key + key] = sum;
  }
}

}  // namespace

void attention_key_mass(const Attention& p, const View& logsumexp, const View& shift, const View& key_mass,
                        Stream stream) {
  const int64_t key_blocks = (p.longest_keys + kRows - 1) / kRows, blocks = p.batch * p.heads() * key_blocks;
  if (blocks == 0) return;
  with_type(p.dtype(), [&](auto t) {
    using T = decltype(t);
    launch<key_mass_kernel<T>>(static_cast<unsigned>(blocks), kThreads, sizeof(Storage<T>), stream, inputs_of<T>(p),
                               RowStatistics{global<const float>(logsumexp), global<const float>(shift), nullptr},
                               global<float>(key_mass), static_cast<int>(key_blocks));
  });
}

}  // namespace velm::cuda
