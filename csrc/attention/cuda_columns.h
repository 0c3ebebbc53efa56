// Tiles of scores with the keys as rows and queries as columns, for what is summed over queries.
#pragma once

#include "attention/cuda_masks.h"
#include "device/async.h"

namespace velm::cuda {

// What belongs to the queries of a tile. They arrive by asynchronous copies, zeros for queries past the end.
template <int kColumns>
struct ColumnTable {
  SharedArray<float, kColumns> logsumexp, shift, delta;
  SharedArray<int, kColumns> start, stop;
};

// The kCount keys of a block as rows, and its queries.
template <class T, int kCount = kRows>
struct KeyBlock {
  const Inputs<T>& a;
  const Sequence& s;
  // The batch entry or sequence, the first key of the block, and the number of keys that lengths leave.
  int index, first_key, length;
  // Whether key_mask shows the two keys of the thread.
  bool open[2];

  DEVICE_INLINE KeyBlock(const Inputs<T>& a, const Sequence& s, int index, int first_key)
      : a(a), s(s), index(index), first_key(first_key), length(s.keys), open{true, true} {
    if (a.lengths) length = min(length, int{a.lengths[index]});
    if (!a.key_mask) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
      open[half] = key + 8 * half < length && a.key_mask[index * int64_t{a.keys} + key + 8 * half] != 0;
    }
  }
  // The keys from lo to hi of a query; none of one past the end.
  DEVICE_INLINE void bounds(int query, int start, int stop, int& lo, int& hi) const {
    lo = 0;
    hi = query < s.queries ? length : 0;
    if (a.causal) hi = min(hi, query + 1);
    if (a.range_start) {
      lo = max(start, 0);
      hi = min(hi, stop);
    }
  }

  // The first tile of queries of which some query may see a key of the block, or kNoTile. All threads take part.
  template <int kColumns>
  DEVICE_INLINE int first(int heads) const {
    if (a.key_mask && !__syncthreads_or(open[0] || open[1])) return kNoTile;
    return next<kColumns>(0, heads);
  }

  // The first tile of queries, from number `tile` on, of which some query may see a key of the block; or kNoTile. The
  // heads' tiles are numbered one head behind the other.
  template <int kColumns>
  DEVICE_INLINE int next(int tile, int heads) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, of_head = (s.queries + kColumns - 1) / kColumns;
    if (first_key >= length) return kNoTile;
    for (; tile < heads * of_head; ++tile) {
      const int start = tile % of_head * kColumns;
      if (a.causal && start + kColumns <= first_key) continue;
      if (!a.range_start) return tile;
      bool sees = false;
#pragma unroll
      for (int i = 0; i < kColumns; i += 32) {
        const int query = start + i + lane;
        if (i + lane >= kColumns || query >= s.queries) continue;
        int lo, hi;
        const int64_t at = s.query_number(a, query);
        bounds(query, a.range_start[at], a.range_stop[at], lo, hi);
        sees |= max(lo, first_key) < min(hi, first_key + kCount);
      }
      if (__any_sync(kAll, sees)) return tile;
    }
    return kNoTile;
  }

  // Begins to copy the table of the queries from `start` on.
  template <int kColumns>
  DEVICE_INLINE void copy_table(ColumnTable<kColumns>& table, int head, int start, const RowStatistics& from) const {
    const int i = static_cast<int>(threadIdx.x), query = start + i, size = query < s.queries ? 4 : 0;
    if (i >= kColumns) return;
    const int64_t at = size ? s.row_number(a, head, query) : 0;
    cp_async<4>(&table.logsumexp[i], from.logsumexp + at, size);
    cp_async<4>(&table.shift[i], from.shift + at, size);
    if (from.delta) cp_async<4>(&table.delta[i], from.delta + at, size);
    if (a.range_start) {
      const int64_t range = size ? s.query_number(a, query) : 0;
      cp_async<4>(&table.start[i], a.range_start + range, size);
      cp_async<4>(&table.stop[i], a.range_stop + range, size);
    }
  }

  // Whether all queries of a tile see all keys of the warp from `key` on, as far as lengths, ranges and causality go.
  template <int kColumns>
  DEVICE_INLINE bool all_see(ColumnTable<kColumns>& table, int start, int key) const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kColumns; i += 32) {
      const int column = i + static_cast<int>(threadIdx.x) % 32;
      if (column >= kColumns) continue;
      int lo, hi;
      bounds(start + column, a.range_start ? int{table.start[column]} : 0, a.range_start ? int{table.stop[column]} : 0,
             lo, hi);
      all = all && lo <= key && hi >= key + 16;
    }
    return __all_sync(kAll, all);
  }

  // Whether something but lengths, ranges and causality hides keys of the warp, or there is a bias.
  DEVICE_INLINE bool hides() const {
    return !__all_sync(kAll, open[0] && open[1]) || a.mask.data || a.bias.data || a.float_bias.data;
  }

  // kHidden where a query does not see a key, and the bias added elsewhere. `key` is the first of the warp.
  template <int kTiles>
  DEVICE_INLINE void mask(float (&s)[kTiles][4], ColumnTable<8 * kTiles>& table, int head, int start, int key) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
    const int query = start + 2 * member, first = key + group;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * j + 2 * member + i;
        int lo, hi;
        bounds(start + column, a.range_start ? int{table.start[column]} : 0,
               a.range_start ? int{table.stop[column]} : 0, lo, hi);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int n = first + 8 * half;
          if (n < lo || n >= hi || !open[half]) s[j][2 * half + i] = kHidden;
        }
      }
    if (a.mask.data)
      hide<kTiles>(s, a.mask.data + (a.mask.row(index, head, query) + first * a.mask.stride[3]), a.mask.stride);
    if (a.bias.data)
      add_bias<kTiles, T>(s, a.bias.data + (a.bias.row(index, head, query) + first * a.bias.stride[3]), a.bias.stride);
    if (a.float_bias.data)
      add_bias<kTiles, float>(
          s, a.float_bias.data + (a.float_bias.row(index, head, query) + first * a.float_bias.stride[3]),
          a.float_bias.stride);
  }

 private:
  // What `mask` hides, of which `from` is that of the first score of the thread.
  template <int kTiles>
  DEVICE_INLINE static void hide(float (&s)[kTiles][4], ReadOnly<unsigned char> from, const int64_t (&stride)[4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j, from = from + 8 * stride[2])
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[j][i];
        if (!load_if(x != kHidden, from + (i % 2 * stride[2] + i / 2 * 8 * stride[3]), kShown)) x = kHidden;
      }
  }
  // The same of the bias.
  template <int kTiles, class B>
  DEVICE_INLINE static void add_bias(float (&s)[kTiles][4], ReadOnly<B> from, const int64_t (&stride)[4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j, from = from + 8 * stride[2])
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = biased(s[j][i], from + (i % 2 * stride[2] + i / 2 * 8 * stride[3]));
  }
};

// Which weights dropout keeps: bit 4 j of [2 i + half], of the queries from `start` and the keys from `key` on. The
// generator's four words serve four neighbouring keys, and so four lanes, each of which draws for one of their two rows
// and every second column.
template <int kTiles, class T>
DEVICE_INLINE void kept_columns(unsigned (&kept)[4], const Inputs<T>& a, int index, int head, int start, int key) {
  static_assert(kTiles <= 8, "four bits a tile in one word");
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  const int mine = group % 4, column = 2 * member + mine / 2, row = group + 8 * (mine % 2);
  const auto seed = static_cast<uint64_t>(a.seed[0]);
  unsigned bits = 0;
  // Two generators at once hide each other's latency; all of them would be half of the code.
#pragma unroll 2
  for (int j = 0; j < kTiles; ++j) {
    uint32_t c[4] = {static_cast<uint32_t>(start + 8 * j + column), static_cast<uint32_t>((key + row) / 4),
                     static_cast<uint32_t>(index * a.heads + head), a.direction};
    philox(c, seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) bits |= unsigned{c[w] >= a.drop_below} << (4 * j + w);
  }
#pragma unroll
  for (int other = 0; other < 4; ++other)
    kept[other] = __shfl_sync(kAll, bits, (lane & ~12) | other << 2) >> (group % 4);
}

}  // namespace velm::cuda
