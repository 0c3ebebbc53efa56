// In-register transposes of a square of kLanes x kLanes floats.
#pragma once

#include "vec.h"

namespace velm::simd {

// rows[i][j] becomes rows[j][i].
VELM_INLINE void transpose(Vec (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  unroll<8>([&](auto i) VELM_INLINE_LAMBDA {
    const __m512 x = static_cast<__m512>(rows[2 * i]), y = static_cast<__m512>(rows[2 * i + 1]);
    a[2 * i] = _mm512_unpacklo_ps(x, y);
    a[2 * i + 1] = _mm512_unpackhi_ps(x, y);
  });
  unroll<4>([&](auto i) VELM_INLINE_LAMBDA {
    const __m512d x = _mm512_castps_pd(a[4 * i]), y = _mm512_castps_pd(a[4 * i + 2]);
    const __m512d z = _mm512_castps_pd(a[4 * i + 1]), w = _mm512_castps_pd(a[4 * i + 3]);
    b[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
    b[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    b[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(z, w));
    b[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(z, w));
  });
  unroll<4>([&](auto i) VELM_INLINE_LAMBDA {
    const __m512 low02 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), low13 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
    const __m512 high02 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88),
                 high13 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
    rows[i] = Vec(_mm512_shuffle_f32x4(low02, high02, 0x88));
    rows[4 + i] = Vec(_mm512_shuffle_f32x4(low13, high13, 0x88));
    rows[8 + i] = Vec(_mm512_shuffle_f32x4(low02, high02, 0xdd));
    rows[12 + i] = Vec(_mm512_shuffle_f32x4(low13, high13, 0xdd));
  });
#elif defined(__AVX2__)
  __m256 a[8], b[8];
  unroll<4>([&](auto i) VELM_INLINE_LAMBDA {
    const __m256 x = static_cast<__m256>(rows[2 * i]), y = static_cast<__m256>(rows[2 * i + 1]);
    a[2 * i] = _mm256_unpacklo_ps(x, y);
    a[2 * i + 1] = _mm256_unpackhi_ps(x, y);
  });
  unroll<2>([&](auto i) VELM_INLINE_LAMBDA {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  });
  unroll<4>([&](auto i) VELM_INLINE_LAMBDA {
    rows[i] = Vec(_mm256_permute2f128_ps(b[i], b[4 + i], 0x20));
    rows[4 + i] = Vec(_mm256_permute2f128_ps(b[i], b[4 + i], 0x31));
  });
#else
  __m128 a = static_cast<__m128>(rows[0]), b = static_cast<__m128>(rows[1]);
  __m128 c = static_cast<__m128>(rows[2]), d = static_cast<__m128>(rows[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  rows[0] = Vec(a);
  rows[1] = Vec(b);
  rows[2] = Vec(c);
  rows[3] = Vec(d);
#endif
}

// out[j * out_stride + i] = scale * in[i * in_stride + j], i < rows, j < columns, any element
// type. Lanes of out from `rows` up to the next multiple of kLanes are set to zero, so every
// out row needs room for that many.
template <class T>
inline void transpose_to(float* out, int64_t out_stride, const T* in, int64_t in_stride, int64_t rows, int64_t columns,
                         float scale = 1.0f) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int height = static_cast<int>(rows - i < kLanes ? rows - i : kLanes);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int width = static_cast<int>(columns - j < kLanes ? columns - j : kLanes);
      Vec block[kLanes];
      const T* from = in + i * in_stride + j;
      if (height == kLanes && width == kLanes) {
        unroll<kLanes>([&](auto r) VELM_INLINE_LAMBDA { block[r] = load(from + r * in_stride) * scale; });
      } else {
        for (int r = 0; r < kLanes; ++r)
          block[r] = r < height ? load_first(from + r * in_stride, width) * scale : zero();
      }
      transpose(block);
      float* to = out + j * out_stride + i;
      if (width == kLanes) {
        unroll<kLanes>([&](auto r) VELM_INLINE_LAMBDA { store(to + r * out_stride, block[r]); });
      } else {
        for (int r = 0; r < width; ++r) store(to + r * out_stride, block[r]);
      }
    }
  }
}

// out[j * out_stride + i] = in[i * in_stride + j] back to row-major rows of T: reads `columns`
// rows of kLanes fp32 numbers (i runs over lanes) and writes `rows` rows of `columns` elements.
// lane_scale, if given, multiplies lane i.
template <class T>
inline void transpose_from(T* out, int64_t out_stride, const float* in, int64_t in_stride, int64_t rows,
                           int64_t columns, const float* lane_scale = nullptr) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int height = static_cast<int>(rows - i < kLanes ? rows - i : kLanes);
    const Vec scale = lane_scale ? load_first(lane_scale + i, height) : Vec(1.0f);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int width = static_cast<int>(columns - j < kLanes ? columns - j : kLanes);
      Vec block[kLanes];
      for (int c = 0; c < kLanes; ++c)
        block[c] = c < width ? load_first(in + (j + c) * in_stride + i, height) * scale : zero();
      transpose(block);
      T* to = out + i * out_stride + j;
      for (int r = 0; r < height; ++r) store_first(to + r * out_stride, block[r], width);
    }
  }
}

}  // namespace velm::simd
