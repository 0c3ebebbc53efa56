// Tiles of scores with the keys as rows and queries as columns, for what is summed over queries.
#pragma once

#include "attention/cuda_masks.h"
#include "device/async.h"

namespace velm::cuda {

// What belongs to the queries of a tile. They arrive by asynchronous copies, zeros for queries past the end.
template <int kColumns>
struct ColumnTable {
  SharedArray<float, kColumns> logsumexp, delta;
  SharedArray<int, kColumns> start, stop;
};

// The keys of a block of rows, and its queries.
template <class T>
struct KeyBlock {
  const Inputs<T>& a;
  const Sequence& s;
  // The batch entry or sequence, the first key of the block, and the number of keys that lengths leave.
  int index, first_key, length;

  DEVICE_INLINE KeyBlock(const Inputs<T>& a, const Sequence& s, int index, int first_key)
      : a(a), s(s), index(index), first_key(first_key), length(s.keys) {
    if (a.lengths) length = min(length, int{a.lengths[index]});
  }

  // The first number in the arrays of ranges, and of what is kept for each row of a head.
  DEVICE_INLINE int64_t first_range() const { return a.cu_seqlens_q ? s.first_query : index * int64_t{a.queries}; }
  DEVICE_INLINE int64_t first_row(int head) const {
    return a.cu_seqlens_q ? head * int64_t{a.queries} + s.first_query : (index * int64_t{a.heads} + head) * a.queries;
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
        bounds(query, a.range_start[first_range() + query], a.range_stop[first_range() + query], lo, hi);
        sees |= max(lo, first_key) < min(hi, first_key + kRows);
      }
      if (__any_sync(kAll, sees)) return tile;
    }
    return kNoTile;
  }

  // Begins to copy the table of the queries from `start` on.
  template <int kColumns>
  DEVICE_INLINE void copy_table(ColumnTable<kColumns>& table, int head, int start, const ReadOnly<float>& logsumexp,
                                const ReadOnly<float>& delta) const {
    const int i = static_cast<int>(threadIdx.x), query = start + i, size = query < s.queries ? 4 : 0;
    if (i >= kColumns) return;
    const int64_t at = size ? first_row(head) + query : 0;
    cp_async<4>(&table.logsumexp[i], logsumexp + at, size);
    if (delta) cp_async<4>(&table.delta[i], delta + at, size);
    if (a.range_start) {
      const int64_t range = size ? first_range() + query : 0;
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

  // -inf where a query does not see a key, and the bias added elsewhere. `key` is the first of the warp.
  template <int kTiles>
  DEVICE_INLINE void mask(float (&s)[kTiles][4], ColumnTable<8 * kTiles>& table, int head, int start, int key,
                          const bool (&open)[2]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * j + 2 * member + i, query = start + column;
        int lo, hi;
        bounds(query, a.range_start ? int{table.start[column]} : 0, a.range_start ? int{table.stop[column]} : 0, lo,
               hi);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[j][2 * half + i];
          const int n = key + group + 8 * half;
          if (n < lo || n >= hi || !open[half]) {
            x = -kInfinity;
            continue;
          }
          if (a.mask.data && !a.mask.data[a.mask.row(index, head, query) + n * a.mask.stride[3]]) x = -kInfinity;
          if (x == -kInfinity) continue;
          float bias = 0.0f;
          if (a.bias.data) bias = to_float(a.bias.data[a.bias.row(index, head, query) + n * a.bias.stride[3]]);
          if (a.wide_bias.data)
            bias = a.wide_bias.data[a.wide_bias.row(index, head, query) + n * a.wide_bias.stride[3]];
          // Selected, as what -inf hides may be NaN.
          x = bias == -kInfinity ? -kInfinity : x + bias * kLog2E;
        }
      }
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
#pragma unroll
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
