// The nearest rows of a database by tiles of scores that stay in the caches. See
// velm_kernels/retrieval/topk_similarity.
//
// Few queries are multiplied with each row as it comes. Of more, tiles of scores tell which rows may be near enough;
// the similarity of those is summed once more, always in the same order. So what is found depends on no tile, thread or
// instruction that scores were made by, and of equal rows the lower index is found.

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "retrieval/topk_similarity/filter.h"
#include "retrieval/topk_similarity/tiles.h"
#include "simd/layout.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace velm {
namespace {

using namespace topk;
using simd::Scratch;

using Optional = std::optional<Tensor>;

// Queries that are multiplied with a row as it comes.
constexpr int64_t kFew = 8;
// Queries that go through the database together: their packed rows stay in a cache.
constexpr int64_t kTogether = 1024;
// Rows that are kept for all of them.
constexpr int64_t kMostFound = 1 << 22;
// Rows of a database below which another thread costs more than it saves.
constexpr int64_t kFewestRows = 512;
// Bytes of some rows that are multiplied with all queries: a part of the second-level cache.
constexpr int64_t kBytes = 1 << 17;
// Queries that one thread takes at least.
constexpr int64_t kFewestQueries = 32;

struct Problem {
  int64_t rows, dim, row_stride;
  const bool* valid;
  const int64_t* ids;
  // Whether queries are bfloat16.
  bool of_bf16;

  bool has(int64_t row) const { return !valid || valid[row]; }
  int64_t id(int64_t row) const { return ids ? ids[row] : row; }
};

// Queries in float32, one after another, and what has been found for each.
struct Queries {
  const float* data;
  const float* square_sums;
  const float* inverse_norms;
  int64_t count;
  Nearest* nearest;
};

template <Metric M>
VELM_INLINE bool offer(const Problem& problem, Nearest& nearest, float similarity, int64_t row) {
  const uint32_t rank = rank_of<M>(similarity);
  return rank >= nearest.least && nearest.offer({problem.id(row), row, rank});
}

template <Metric M, int R, class T>
VELM_INLINE void search_rows(const Problem& problem, const Queries& queries, const T* database,
                             const int64_t (&at)[R]) {
  constexpr bool kDifference = M == Metric::l2;
  constexpr int kPair = simd::kRegisters == 32 ? 2 : 1;
  const T* rows[R];
  float inverse_rows[R];
  simd::unroll<R>([&](auto r) VELM_INLINE_LAMBDA {
    rows[r] = database + at[r] * problem.row_stride;
    inverse_rows[r] = M == Metric::cosine ? 1.0f / norm_of(square_sum(rows[r], problem.dim)) : 1.0f;
  });
  const auto some = [&](auto count, int64_t first) VELM_INLINE_LAMBDA {
    constexpr int Q = decltype(count)::value;
    const float* of[Q];
    float sums[Q][R];
    for (int q = 0; q < Q; ++q) of[q] = queries.data + (first + q) * problem.dim;
    sum_pairs<kDifference>(sums, of, rows, problem.dim);
    for (int q = 0; q < Q; ++q) {
      const float inverse = queries.inverse_norms[first + q];
      for (int r = 0; r < R; ++r)
        offer<M>(problem, queries.nearest[first + q], similarity_of<M>(sums[q][r], inverse, inverse_rows[r]), at[r]);
    }
  };
  int64_t q = 0;
  for (; q + kPair <= queries.count; q += kPair) some(std::integral_constant<int, kPair>{}, q);
  for (; q < queries.count; ++q) some(std::integral_constant<int, 1>{}, q);
}

template <Metric M, class T>
void search_few(const Problem& problem, const Queries& queries, const T* database, int64_t begin, int64_t end) {
  constexpr int kRows = simd::kRegisters == 32 ? 3 : 2;
  int64_t at[kRows];
  int64_t count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (!problem.has(row)) continue;
    at[count++] = row;
    if (count == kRows) {
      search_rows<M>(problem, queries, database, at);
      count = 0;
    }
  }
  for (int64_t i = 0; i < count; ++i) search_rows<M, 1>(problem, queries, database, {at[i]});
}

// Some rows of the database: where they are, one after another as Tiles multiplies them, or as they lie.
template <class T, class Tiles>
struct Block {
  using Element = typename Tiles::Element;

  int64_t* at;
  float* square_sums;
  Element* converted;
  const Element* data = nullptr;
  int64_t count = 0, stride = 0;

  Block(Scratch& scratch, int64_t rows, int64_t dim)
      : at(scratch.take<int64_t>(rows)),
        square_sums(scratch.take(rows)),
        converted(scratch.take<Element>(rows * Tiles::row_of(dim))) {
    std::memset(static_cast<void*>(converted), 0, sizeof(Element) * static_cast<size_t>(rows * Tiles::row_of(dim)));
  }

  // Takes the next rows that count, at most `most`, from `begin` on; returns the first behind them.
  int64_t take(const Problem& problem, const T* database, int64_t begin, int64_t end, int64_t most) {
    constexpr bool kSame = std::is_same_v<T, Element>, kAnyDim = Tiles::kRows == Tiles::kMostRows;
    count = 0;
    int64_t row = begin;
    for (; row < end && count < most; ++row)
      if (problem.has(row)) at[count++] = row;
    // Matrix instructions read whole tiles.
    const bool is_whole = kAnyDim || (count % Tiles::kRows == 0 && 2 * Tiles::words(problem.dim) == problem.dim);
    const bool is_direct = kSame && is_whole && count > 0 && at[count - 1] - at[0] == count - 1;
    const int64_t row_of = Tiles::row_of(problem.dim);
    for (int64_t i = 0; i < count; ++i) {
      const T* from = database + at[i] * problem.row_stride;
      square_sums[i] =
          is_direct ? square_sum(from, problem.dim) : Tiles::convert(converted + i * row_of, from, problem.dim);
    }
    data = converted;
    stride = row_of;
    if constexpr (kSame) {
      if (is_direct) {
        data = database + at[0] * problem.row_stride;
        stride = problem.row_stride;
      }
    }
    return row;
  }
};

template <Metric M, class Tiles, class T>
void search_tiles(const Problem& problem, const Queries& queries, const T* database, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = Tiles::kColumns, kVectors = kColumns / kLanes;
  const int64_t dim = problem.dim, columns = simd::round_up(queries.count, kColumns);
  constexpr int64_t kSize = sizeof(typename Tiles::Element),
                    kLeast = Tiles::kRows == Tiles::kMostRows ? 12 : Tiles::kRows;
  const int64_t most = std::clamp<int64_t>(kBytes / (kSize * dim + 1) / kLeast * kLeast, kLeast, Tiles::kMostRows);
  const Rounding rounding(dim, Tiles::kFactor * static_cast<float>(!std::is_same_v<T, simd::bf16> + !problem.of_bf16));
  Scratch scratch;
  Block<T, Tiles> block(scratch, most, dim);
  const int64_t panel = Tiles::words(dim) * kColumns;
  auto* packed = scratch.take<typename Tiles::Word>(columns / kColumns * panel);
  float* scores = scratch.take(Tiles::kRows * kColumns);
  float* of_rows = scratch.take(most);
  const OfQuery of_queries{scratch.take(columns), scratch.take(columns)};
  const auto set = [&](int64_t q) {
    set_bound<M>(of_queries, q, limit_of<M>(queries.nearest[q]), queries.square_sums[q], rounding);
  };
  for (int64_t first = 0; first < columns; first += kColumns)
    Tiles::pack(packed + first / kColumns * panel, queries.data + first * dim, queries.count - first, dim);
  for (int64_t q = 0; q < columns; ++q) {
    of_queries.offset[q] = kInfinity;
    of_queries.slope[q] = 0.0f;
    if (q < queries.count) set(q);
  }
  const auto decide = [&](int64_t q, int64_t i) {
    const T* row = database + block.at[i] * problem.row_stride;
    const float sum = sum_pair<M == Metric::l2>(queries.data + q * dim, row, dim);
    const float inverse_row = M == Metric::cosine ? 1.0f / norm_of(square_sum(row, dim)) : 1.0f;
    const float similarity = similarity_of<M>(sum, queries.inverse_norms[q], inverse_row);
    if (offer<M>(problem, queries.nearest[q], similarity, block.at[i])) set(q);
  };
  while (begin < end) {
    begin = block.take(problem, database, begin, end, most);
    for (int64_t i = 0; i < block.count; ++i) of_rows[i] = of_row<M>(block.square_sums[i], rounding);
    for (int64_t first = 0; first < columns; first += kColumns) {
      for (int64_t above = 0; above < block.count; above += Tiles::kRows) {
        const int64_t tall = std::min(Tiles::kRows, block.count - above);
        Tiles::multiply(scores, block.data + above * block.stride, block.stride, tall, dim,
                        packed + first / kColumns * panel);
        for (int64_t i = 0; i < tall; ++i) {
          const Vec row(of_rows[above + i]);
          for (int64_t v = 0; v < kVectors; ++v) {
            const int64_t at = first + v * kLanes;
            const auto passes = !(simd::load(scores + i * kColumns + v * kLanes) < bound<M>(of_queries, at, row));
            if (simd::stdx::none_of(passes)) [[likely]]
              continue;
            for (int lane = 0; lane < kLanes; ++lane)
              if (passes[lane] && at + lane < queries.count) decide(at + lane, above + i);
          }
        }
      }
    }
  }
}

template <Metric M, class T>
void search_many(const Problem& problem, const Queries& queries, const T* database, int64_t begin, int64_t end) {
#if defined(VELM_AMX)
  if (ByMatrices::is_usable()) {
    const ByMatrices configured;
    return search_tiles<M, ByMatrices>(problem, queries, database, begin, end);
  }
#endif
  search_tiles<M, ByVectors>(problem, queries, database, begin, end);
}

template <Metric M>
void write_best(std::vector<Found>& all, int64_t k, float* values, int64_t* places) {
  const auto better = [](const Found& a, const Found& b) { return a.is_better(b); };
  const int64_t count = std::min<int64_t>(k, static_cast<int64_t>(all.size()));
  std::partial_sort(all.begin(), all.begin() + count, all.end(), better);
  for (int64_t i = 0; i < k; ++i) {
    values[i] = i < count ? similarity_of_rank<M>(all[static_cast<size_t>(i)].rank)
                          : (M == Metric::l2 ? kInfinity : -kInfinity);
    places[i] = i < count ? all[static_cast<size_t>(i)].place : -1;
  }
}

template <Metric M, class T, class Q>
void search(const Problem& problem, const Tensor& queries, const T* database, Tensor values, Tensor places) {
  const int64_t all = queries.size(0), dim = problem.dim, k = values.size(1);
  const auto* given = const_data<Q>(queries);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t ranges = std::clamp<int64_t>(problem.rows / kFewestRows, 1, threads);
  // No list holds more than there is.
  const int64_t kept = std::min(k, simd::divide_up(problem.rows, ranges));
  const int64_t together = std::clamp<int64_t>(kMostFound / (ranges * kept + 1), kFewestQueries, kTogether);
  for (int64_t first = 0; first < all; first += together) {
    const int64_t count = std::min(together, all - first);
    Scratch scratch;
    float* wide = scratch.take(count * dim);
    float* square_sums = scratch.take(count);
    float* inverse_norms = scratch.take(count);
    for (int64_t q = 0; q < count; ++q) {
      simd::convert(wide + q * dim, given + (first + q) * queries.stride(0), dim);
      square_sums[q] = square_sum(wide + q * dim, dim);
      inverse_norms[q] = 1.0f / norm_of(square_sums[q]);
    }
    const int64_t groups = std::clamp<int64_t>(threads / ranges, 1, simd::divide_up(count, kFewestQueries));
    const int64_t group = simd::round_up(simd::divide_up(count, groups), kFewestQueries);
    std::unique_ptr<Found[]> found(new Found[static_cast<size_t>(ranges * count * kept)]);
    std::vector<Nearest> nearest(static_cast<size_t>(ranges * count));
    for (int64_t i = 0; i < ranges * count; ++i) nearest[static_cast<size_t>(i)] = {found.get() + i * kept, kept, 0, 0};
    simd::parallel_items(ranges * groups, [&](int64_t item) {
      const int64_t range = item % ranges, start = std::min(count, item / ranges * group);
      const Queries some{wide + start * dim, square_sums + start, inverse_norms + start, std::min(group, count - start),
                         nearest.data() + range * count + start};
      if (some.count == 0 || kept == 0) return;
      const int64_t begin = problem.rows * range / ranges, end = problem.rows * (range + 1) / ranges;
      if (some.count <= kFew)
        search_few<M>(problem, some, database, begin, end);
      else
        search_many<M>(problem, some, database, begin, end);
    });
    simd::parallel_ranges(count, 16, [&](int64_t begin, int64_t end) {
      std::vector<Found> of_all;
      for (int64_t q = begin; q < end; ++q) {
        of_all.clear();
        for (int64_t range = 0; range < ranges; ++range) {
          const Nearest& part = nearest[static_cast<size_t>(range * count + q)];
          of_all.insert(of_all.end(), part.heap, part.heap + part.count);
        }
        const int64_t at = (first + q) * k;
        write_best<M>(of_all, k, mutable_data<float>(values) + at, mutable_data<int64_t>(places) + at);
      }
    });
  }
}

void topk_similarity(Tensor queries, Tensor database, Optional valid, Optional ids, int64_t metric, Tensor values,
                     Tensor places) {
  const Problem problem{database.size(0),
                        database.size(1),
                        database.stride(0),
                        valid ? const_data<bool>(*valid) : nullptr,
                        ids ? const_data<int64_t>(*ids) : nullptr,
                        queries.scalar_type() == ScalarType::BFloat16};
  const auto by = [&](auto m) {
    constexpr Metric M = decltype(m)::value;
    with_type(database.scalar_type(), [&](auto t) {
      using T = decltype(t);
      const T* rows = const_data<T>(database);
      if (queries.scalar_type() == ScalarType::Float)
        search<M, T, float>(problem, queries, rows, values, places);
      else
        search<M, T, T>(problem, queries, rows, values, places);
    });
  };
  if (metric == 0)
    by(std::integral_constant<Metric, Metric::dot>{});
  else if (metric == 1)
    by(std::integral_constant<Metric, Metric::cosine>{});
  else
    by(std::integral_constant<Metric, Metric::l2>{});
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "topk_similarity", topk_similarity);
}

}  // namespace
}  // namespace velm
