// Tiles of scores: (rows, kColumns) of the rows of a block and as many packed queries, by two ways to multiply.
#pragma once

#include <algorithm>
#include <cstring>

#include "retrieval/topk_similarity/similarity.h"
#include "simd/layout.h"
#include "simd/product.h"

#if defined(__AVX512BF16__) && defined(__linux__) && !defined(VELM_EMULATE_BF16_DOT)
#define VELM_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace velm::topk {

// By vectors, in float32.
struct ByVectors {
  using Element = float;
  using Word = float;
  static constexpr int64_t kColumns = 2 * kLanes;
  // Rows of a tile, and at most of a block.
  static constexpr int64_t kRows = 48, kMostRows = 48;
  // By how much a factor of another type may be off.
  static constexpr float kFactor = 0.0f;

  static int64_t words(int64_t dim) { return dim; }
  static int64_t row_of(int64_t dim) { return dim; }
  static bool is_usable() { return true; }

  // Copies a row; returns the sum of its squares.
  template <class T>
  static float convert(Element* to, const T* from, int64_t dim) {
    simd::convert(to, from, dim);
    return square_sum(to, dim);
  }
  // Queries turned: (dim, kColumns), zeros behind the last one.
  static void pack(Word* to, const float* queries, int64_t count, int64_t dim) {
    for (int64_t j = 0; j < kColumns; ++j)
      for (int64_t i = 0; i < dim; ++i) to[i * kColumns + j] = j < count ? queries[j * dim + i] : 0.0f;
  }
  static void multiply(float* scores, const Element* rows, int64_t stride, int64_t count, int64_t dim,
                       const Word* packed) {
    simd::product<2, false, simd::Start::zero>(scores, kColumns, count, rows, stride, dim, packed, kColumns);
  }
};

#if defined(VELM_AMX)
// By the matrix instructions of AMX, of bfloat16 with sums in float32.
struct ByMatrices {
  using Element = simd::bf16;
  using Word = uint32_t;
  static constexpr int64_t kColumns = 32;
  static constexpr int64_t kRows = 32, kMostRows = 128;
  static constexpr float kFactor = 0x1.01p-9f;
  // Numbers that one instruction adds up.
  static constexpr int64_t kDepth = 32;

  // Tiles of 16 rows of 64 bytes while one of these is alive.
  ByMatrices() { configure(true); }
  ~ByMatrices() { configure(false); }
  ByMatrices(const ByMatrices&) = delete;
  ByMatrices& operator=(const ByMatrices&) = delete;

  static int64_t words(int64_t dim) { return simd::round_up(dim, kDepth) / 2; }
  // An odd number of cache lines.
  static int64_t row_of(int64_t dim) { return (simd::divide_up(dim, kDepth) | 1) * kDepth; }

  // Whether processor and system have them; asks the system for their registers, once.
  static bool is_usable() {
    static const bool usable = [] {
      unsigned a = 0, b = 0, c = 0, d = 0;
      constexpr unsigned kMatrices = 1u << 24, kOfBfloat16 = 1u << 22;
      if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kMatrices) == 0 || (d & kOfBfloat16) == 0) return false;
      constexpr long kAskPermission = 0x1023, kTileData = 18;
      return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
    }();
    return usable;
  }

  // Copies a row, of which two vectors are rounded by one instruction; returns the sum of the squares of what it was.
  template <class T>
  static float convert(Element* to, const T* from, int64_t dim) {
    constexpr int64_t kStep = 2 * kLanes;
    Vec sum[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
    const auto add = [&](auto part, int64_t i) VELM_INLINE_LAMBDA {
      const Vec a = simd::load(from + i), b = simd::load(from + i + kLanes);
      const simd::VecUint both = simd::round_both(a, b);
      std::memcpy(static_cast<void*>(to + i), &both, sizeof(both));
      sum[2 * part] = simd::fma(a, a, sum[2 * part]);
      sum[2 * part + 1] = simd::fma(b, b, sum[2 * part + 1]);
    };
    int64_t i = 0;
    for (; i + 2 * kStep <= dim; i += 2 * kStep) {
      add(std::integral_constant<int, 0>{}, i);
      add(std::integral_constant<int, 1>{}, i + kStep);
    }
    float squares = 0.0f;
    for (; i < dim; ++i) {
      const float x = simd::to_float(from[i]);
      simd::store_scalar(to + i, x);
      squares += x * x;
    }
    return squares + simd::sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  // Pairs of queries' numbers, turned: (words, kColumns).
  static void pack(Word* to, const float* queries, int64_t count, int64_t dim) {
    const auto bits = [&](int64_t j, int64_t i) -> uint32_t {
      return j < count && i < dim ? simd::round_to_bf16_bits(queries[j * dim + i]) : 0;
    };
    for (int64_t j = 0; j < kColumns; ++j)
      for (int64_t i = 0; i < words(dim); ++i) to[i * kColumns + j] = bits(j, 2 * i) | bits(j, 2 * i + 1) << 16;
  }
  // Whole tiles, whatever count: rows are followed by others, or by memory of their own.
  [[gnu::target("amx-tile,amx-bf16")]] static void multiply(float* scores, const Element* rows, int64_t stride,
                                                            int64_t count, int64_t dim, const Word* packed) {
    const int64_t bytes = stride * 2, wide = kColumns * 4;
    const Element* below = rows + (count > 16 ? 16 * stride : 0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < words(dim); i += kDepth / 2) {
      _tile_loadd(4, rows + 2 * i, bytes);
      _tile_loadd(5, below + 2 * i, bytes);
      _tile_loadd(6, packed + i * kColumns, wide);
      _tile_loadd(7, packed + i * kColumns + 16, wide);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, scores, wide);
    _tile_stored(1, scores + 16, wide);
    _tile_stored(2, scores + 16 * kColumns, wide);
    _tile_stored(3, scores + 16 * kColumns + 16, wide);
  }

 private:
  [[gnu::target("amx-tile")]] static void configure(bool begins) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    static_assert(sizeof(config) == 64);
    // Not _tile_loadconfig, of which GCC 12 thinks that it reads 8 bytes.
    if (begins)
      asm volatile("ldtilecfg %0" : : "m"(config));
    else
      _tile_release();
  }
};
#endif

}  // namespace velm::topk
