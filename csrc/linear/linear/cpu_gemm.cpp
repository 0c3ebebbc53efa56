// Around the micro-kernel (R rows by V vectors of C in registers) the loops are those of Goto and van de Geijn (2008):
// a panel of A stays in the first-level cache while the panels of a block of B stream from the second-level cache. A
// block of C is finished while it is still in the second-level cache. The order of additions in one element of C
// depends on the depth alone, so neither blocks nor threads change a bit of it.

#include "linear/linear/cpu_gemm.h"

#include <stdexcept>

#include "linear/linear/cpu_pack.h"
#include "simd/parallel.h"

namespace velm::linear {
namespace {

constexpr int kV = 2;
constexpr int kR = simd::kTileRows<kV>;
constexpr int kN = kV * kLanes;

// Words of depth between two visits of a tile of C: R x 384 floats of A fill half of a first-level cache of 32 KiB.
constexpr int64_t kDepthBlock = 384;
// With that depth, 256 columns of B are 384 KiB: they fit a second-level cache of 1 MiB beside blocks of A and C.
constexpr int64_t kBlockRows = 8 * kR;
constexpr int64_t kBlockColumns = 8 * kN;
// What is packed at a time, in words: bounds the extra memory whatever the size of the matrices.
constexpr int64_t kMaxPackedA = int64_t{2} << 20;
constexpr int64_t kMaxPackedB = int64_t{6} << 20;
// Rows after which a product over rows (the depth of a weight gradient) is added to what came before.
constexpr int64_t kDepthSlab = 2048;
// Rows of one task of packing across the depth.
constexpr int64_t kPackRows = kSumRows;

// c (R x N, row stride kBlockColumns) = or += A panel times B panel over `words` of depth.
template <class Word>
__attribute__((noinline)) void micro_kernel(int64_t words, const Word* a, const Word* b, float* c, bool first) {
  simd::Tile<kR, kV> tile;
  if (first)
    tile.clear();
  else
    tile.load(c, kBlockColumns);
  tile.multiply_add(words, a, 1, kR, b, kN);
  tile.store(c, kBlockColumns);
}

// Multiplies packed A (panels of kR rows) by packed B (panels of kN columns), all of depth `words`.
template <class Word, class F>
void multiply_packed(const Word* a, const Word* b, int64_t rows, int64_t columns, int64_t words, const F& finish) {
  const int64_t row_blocks = divide_up(rows, kBlockRows), column_blocks = divide_up(columns, kBlockColumns);
  const int64_t depth_blocks = divide_up(words, kDepthBlock);
  const int64_t depth_block = depth_blocks ? divide_up(words, depth_blocks) : 0;
  const auto scratch = [] { return Buffer<float>(kBlockRows * kBlockColumns); };
  simd::parallel_workers(row_blocks * column_blocks, scratch, [&](const Buffer<float>& block, int64_t task) {
    float* c = block.get();
    const int64_t row = task % row_blocks * kBlockRows, column = task / row_blocks * kBlockColumns;
    const int64_t height = std::min(kBlockRows, rows - row), width = std::min(kBlockColumns, columns - column);
    if (words == 0) std::fill_n(c, kBlockRows * kBlockColumns, 0.0f);
    for (int64_t k = 0; k < words; k += depth_block) {
      const int64_t steps = std::min(depth_block, words - k);
      for (int64_t i = 0; i < height; i += kR) {
        const Word* a_panel = a + (row + i) * words + k * kR;
        for (int64_t j = 0; j < width; j += kN)
          micro_kernel(steps, a_panel, b + (column + j) * words + k * kN, c + i * kBlockColumns + j, k == 0);
      }
    }
    finish(c, row, height, column, width);
  });
}

// Packs `count` rows of `in` from `row` on, contiguous along the depth, into panels of W rows.
template <int W, class Format>
void pack_rows(Format format, typename Format::Word* out, const Source& in, int64_t row, int64_t count, int64_t depth) {
  const int64_t words = divide_up(depth, Format::kDepth);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, W * depth));
  simd::parallel_ranges(divide_up(count, W), grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      pack_along_depth<W>(format, out + p * W * words, in, row + p * W,
                          static_cast<int>(std::min<int64_t>(W, count - p * W)), depth);
  });
}

// Packs `count` columns of `in` from `column` on, over rows [first_row, first_row + depth), into panels of W columns.
// If sums is given it receives, for every kPackRows rows, their sum: (divide_up(depth, kPackRows), round_up(count, W)).
template <int W, class Format>
void pack_columns(Format format, typename Format::Word* out, const Source& in, int64_t column, int64_t count,
                  int64_t first_row, int64_t depth, float* sums) {
  const int64_t words = divide_up(depth, Format::kDepth);
  const int64_t panels = divide_up(count, W), chunks = divide_up(depth, kPackRows);
  // A group of panels is about 1 KiB of every row, so that rows are read in long pieces.
  constexpr int64_t kGroup = std::max<int64_t>(1, 256 / W);
  const int64_t groups = divide_up(panels, kGroup);
  simd::parallel_ranges(groups * chunks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / groups * kPackRows, last = std::min(first + kPackRows, depth);
      const int64_t panel = task % groups * kGroup, some = std::min(kGroup, panels - panel);
      pack_across_depth<W>(format, out + panel * W * words, words, in, column + panel * W, some,
                           std::min(some * W, count - panel * W), first_row, first, last,
                           sums ? sums + (task / groups * panels + panel) * W : nullptr);
    }
  });
}

// Rows of A (columns of B) packed at a time.
int64_t slab_of(int64_t total, int64_t words, int64_t limit, int64_t multiple) {
  const int64_t fitting = std::max<int64_t>(1, limit / std::max<int64_t>(1, words) / multiple) * multiple;
  return std::min(total, fitting);
}

// C = A B: pack_a(out, row, rows) and pack_b(out, column, columns) pack slabs of the operands.
template <class Format, class PackA, class PackB, class F>
void multiply(Format, int64_t rows, int64_t columns, int64_t depth, const PackA& pack_a, const PackB& pack_b,
              const F& finish) {
  using Word = typename Format::Word;
  const int64_t words = divide_up(depth, Format::kDepth);
  const int64_t a_slab = slab_of(rows, words, kMaxPackedA, kBlockRows);
  const int64_t b_slab = slab_of(columns, words, kMaxPackedB, kBlockColumns);
  const Buffer<Word> a(round_up(a_slab, kR) * words), b(round_up(b_slab, kN) * words);
  for (int64_t column = 0; column < columns; column += b_slab) {
    const int64_t width = std::min(b_slab, columns - column);
    pack_b(b.get(), column, width);
    for (int64_t row = 0; row < rows; row += a_slab) {
      const int64_t height = std::min(a_slab, rows - row);
      pack_a(a.get(), row, height);
      multiply_packed(a.get(), b.get(), height, width, words,
                      [&](const float* c, int64_t i, int64_t block_rows, int64_t j, int64_t block_columns) {
                        finish(c, row + i, block_rows, column + j, block_columns);
                      });
    }
  }
}

template <class F>
void with_format(Precision precision, F&& f) {
#if defined(VELM_BF16_DOT)
  if (precision == Precision::kBf16) return f(Pairs16{});
#endif
  static_cast<void>(precision);
  f(Words32{});
}

}  // namespace

void multiply_transposed(Precision precision, const Source& a, const Source& b, int64_t rows, int64_t columns,
                         int64_t depth, Finish finish) {
  with_format(precision, [&](auto format) {
    multiply(
        format, rows, columns, depth,
        [&](auto* to, int64_t row, int64_t count) { pack_rows<kR>(format, to, a, row, count, depth); },
        [&](auto* to, int64_t column, int64_t count) { pack_rows<kN>(format, to, b, column, count, depth); },
        [&](const float* c, int64_t row, int64_t height, int64_t column, int64_t width) {
          finish(c, kBlockColumns, row, height, column, width);
        });
  });
}

void multiply_plain(Precision precision, const Source& a, const Source& b, int64_t rows, int64_t columns, int64_t depth,
                    Finish finish) {
  with_format(precision, [&](auto format) {
    multiply(
        format, rows, columns, depth,
        [&](auto* to, int64_t row, int64_t count) { pack_rows<kR>(format, to, a, row, count, depth); },
        [&](auto* to, int64_t column, int64_t count) {
          pack_columns<kN>(format, to, b, column, count, 0, depth, nullptr);
        },
        [&](const float* c, int64_t row, int64_t height, int64_t column, int64_t width) {
          finish(c, kBlockColumns, row, height, column, width);
        });
  });
}

int64_t depth_slabs(int64_t depth) {
  return std::max<int64_t>(1, divide_up(depth, kDepthSlab));
}

void multiply_over_rows(Precision precision, const Source& a, const Source& b, int64_t rows, int64_t columns,
                        int64_t depth, double* sums, FinishSlab finish) {
  const Buffer<float> partial(sums ? divide_up(std::min(depth, kDepthSlab), kSumRows) * round_up(rows, kR) : 0);
  with_format(precision, [&](auto format) {
    for (int64_t slab = 0; slab < depth_slabs(depth); ++slab) {
      const int64_t begin = slab * kDepthSlab, steps = std::min(kDepthSlab, depth - begin);
      // A is packed again for every slab of columns, but summed once.
      int64_t summed = 0;
      multiply(
          format, rows, columns, steps,
          [&](auto* to, int64_t row, int64_t count) {
            float* part = sums && row == summed ? partial.get() : nullptr;
            pack_columns<kR>(format, to, a, row, count, begin, steps, part);
            if (!part) return;
            summed += count;
            for (int64_t chunk = 0; chunk < divide_up(steps, kSumRows); ++chunk)
              for (int64_t i = 0; i < count; ++i) sums[row + i] += part[chunk * round_up(count, kR) + i];
          },
          [&](auto* to, int64_t column, int64_t count) {
            pack_columns<kN>(format, to, b, column, count, begin, steps, nullptr);
          },
          [&](const float* c, int64_t row, int64_t height, int64_t column, int64_t width) {
            finish(slab, c, kBlockColumns, row, height, column, width);
          });
    }
  });
}

namespace {

// Every element of C is a dot product of a row of a and a row of b, both contiguous along the depth.
constexpr int kDotRows = simd::kRegisters == 32 ? 4 : 3;
constexpr int kDotColumns = simd::kRegisters == 32 ? 5 : 3;
constexpr int64_t kDotBlock = 4 * kDotColumns;

template <int Rows, class T>
__attribute__((noinline)) void dot_tile(const T* a, int64_t a_stride, const T* const (&b)[kDotColumns], int64_t depth,
                                        float* out) {
  Vec sum[Rows][kDotColumns];
  simd::unroll<Rows>([&](auto r) VELM_INLINE_LAMBDA {
    simd::unroll<kDotColumns>([&](auto j) VELM_INLINE_LAMBDA { sum[r][j] = simd::zero(); });
  });
  const auto step = [&](const auto& read) VELM_INLINE_LAMBDA {
    Vec columns[kDotColumns];
    simd::unroll<kDotColumns>([&](auto j) VELM_INLINE_LAMBDA { columns[j] = read(b[j]); });
    simd::unroll<Rows>([&](auto r) VELM_INLINE_LAMBDA {
      const Vec row = read(a + r * a_stride);
      simd::unroll<kDotColumns>([&](auto j) VELM_INLINE_LAMBDA { sum[r][j] = simd::fma(row, columns[j], sum[r][j]); });
    });
  };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) step([&](const T* p) VELM_INLINE_LAMBDA { return simd::load(p + k); });
  if (k < depth)
    step([&](const T* p) VELM_INLINE_LAMBDA { return simd::load_first(p + k, static_cast<int>(depth - k)); });
  simd::unroll<Rows>([&](auto r) VELM_INLINE_LAMBDA {
    simd::unroll<kDotColumns>([&](auto j) VELM_INLINE_LAMBDA { out[r * kDotBlock + j] = simd::sum_lanes(sum[r][j]); });
  });
}

template <class T>
void few_rows(const Tensor& a, const Tensor& b, Finish finish) {
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(0), a_stride = a.stride(0),
                b_stride = b.stride(0);
  const T* left = static_cast<const T*>(a.const_data_ptr());
  const T* right = static_cast<const T*>(b.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, depth * kDotBlock));
  simd::parallel_ranges(divide_up(columns, kDotBlock), grain, [&](int64_t begin, int64_t end) {
    const Buffer<float> block(rows * kDotBlock);
    float* c = block.get();
    for (int64_t first = begin * kDotBlock; first < std::min(end * kDotBlock, columns); first += kDotBlock) {
      const int64_t count = std::min(kDotBlock, columns - first);
      for (int64_t j = 0; j < count; j += kDotColumns) {
        // columns that are not there repeat the last one
        const T* b_rows[kDotColumns];
        for (int64_t n = 0; n < kDotColumns; ++n) b_rows[n] = right + std::min(first + j + n, columns - 1) * b_stride;
        int64_t i = 0;
        for (; i + kDotRows <= rows; i += kDotRows)
          dot_tile<kDotRows>(left + i * a_stride, a_stride, b_rows, depth, c + i * kDotBlock + j);
        for (; i < rows; ++i) dot_tile<1>(left + i * a_stride, a_stride, b_rows, depth, c + i * kDotBlock + j);
      }
      finish(c, kDotBlock, 0, rows, first, count);
    }
  });
}

}  // namespace

void multiply_few_rows(const Tensor& a, const Tensor& b, Finish finish) {
  if (a.scalar_type() == ScalarType::Float) return few_rows<float>(a, b, finish);
  if (a.scalar_type() == ScalarType::BFloat16) return few_rows<simd::bf16>(a, b, finish);
  if (a.scalar_type() == ScalarType::Half) return few_rows<simd::fp16>(a, b, finish);
  throw std::runtime_error("velm: expected float32, bfloat16 or float16");
}

}  // namespace velm::linear
