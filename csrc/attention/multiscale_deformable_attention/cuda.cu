// multiscale_deformable_attention, forward and the gradients of locations and weights. Some neighbouring lanes have a
// query of a head, each some of its columns; the samples are read from memory once for all of these and never kept.

#include "attention/multiscale_deformable_attention/cuda_samples.h"

namespace velm::cuda {
namespace {

// Rows of one head side by side, so that what runs at a time reads the tokens of a few heads.
struct Row {
  int64_t batch, head, place;
  int lane;
  bool exists;

  DEVICE_INLINE Row(const Shape& shape, int64_t rows, int lanes) {
    lane = static_cast<int>(threadIdx.x) % lanes;
    const int64_t number = int64_t{blockIdx.x} * (kThreads / lanes) + static_cast<int>(threadIdx.x) / lanes;
    exists = number < rows;
    const int64_t row = exists ? number : 0;
    head = row / shape.queries % shape.heads;
    batch = row / shape.queries / shape.heads;
    place = shape.row(batch, row % shape.queries, head);
  }
};

// What lies at the four corners of a sample, zeros outside of its level.
template <class T, int Width>
struct Corners {
  Vector<T, Width> values[4];

  DEVICE_INLINE Corners(const Sample& sample, const Level& level, const Shape& shape, const ReadOnly<T>& of_head,
                        int64_t token_stride) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t token = sample.token(k, level, shape.tokens);
      if (token >= 0) {
        values[k] = load<Width>(of_head + token * token_stride);
      } else {
#pragma unroll
        for (int i = 0; i < Width; ++i) values[k][i] = from_float<T>(0.0f);
      }
    }
  }
};

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 6)
    deformable_kernel(ReadOnly<T> value, Global<T> out, Shape shape, int64_t batch_stride, int64_t token_stride,
                      int64_t head_stride, int64_t rows, int lanes) {
  const Row row(shape, rows, lanes);
  if (!row.exists) return;
  const auto of_head = value + (row.batch * batch_stride + row.head * head_stride);
  for (int64_t c = row.lane * Width; c < shape.d; c += lanes * Width) {
    float sum[Width] = {};
    Level level;
    int64_t number = row.place * shape.levels * shape.points;
    for (int l = 0; l < shape.levels; ++l) {
      level.step(shape, l);
#pragma unroll 2
      for (int point = 0; point < shape.points; ++point, ++number) {
        const Sample sample(shape, number, level);
        const Corners<T, Width> corners(sample, level, shape, of_head + c, token_stride);
        float sampled[Width] = {};
        // Zeros are multiplied too: a location that is no number makes NaN.
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float share = sample.along(k) * sample.down(k);
#pragma unroll
          for (int i = 0; i < Width; ++i) sampled[i] = fmaf(share, to_float(corners.values[k][i]), sampled[i]);
        }
#pragma unroll
        for (int i = 0; i < Width; ++i) sum[i] = fmaf(sample.weight, sampled[i], sum[i]);
      }
    }
    store_floats<T>(out + (row.place * shape.d + c), sum);
  }
}

// Where gradients of a type go that is known when a kernel runs.
struct MutableNumbers {
  Global<float> singles;
  Global<__half> halves;
  Global<__nv_bfloat16> bfloats;

  DEVICE_INLINE explicit operator bool() const { return singles || halves || bfloats; }
  DEVICE_INLINE void put(int64_t i, float value) const {
    if (singles) singles[i] = value;
    if (halves) halves[i] = from_float<__half>(value);
    if (bfloats) bfloats[i] = from_float<__nv_bfloat16>(value);
  }
};

MutableNumbers mutable_numbers_of(const View& view) {
  MutableNumbers numbers{};
  if (view.dtype == Dtype::float32) numbers.singles = global<float>(view);
  if (view.dtype == Dtype::float16) numbers.halves = global<__half>(view);
  if (view.dtype == Dtype::bfloat16) numbers.bfloats = global<__nv_bfloat16>(view);
  return numbers;
}

// From what comes in times each corner. Shares are multiplied before the sum over lanes, which are three numbers then.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 6)
    deformable_samples_kernel(ReadOnly<T> grad, ReadOnly<T> value, MutableNumbers grad_locations,
                              MutableNumbers grad_weights, Shape shape, int64_t batch_stride, int64_t token_stride,
                              int64_t head_stride, int64_t rows, int lanes) {
  // All lanes take part in the sums: those behind the last row have the first one.
  const Row row(shape, rows, lanes);
  const auto of_head = value + (row.batch * batch_stride + row.head * head_stride);
  const auto of_row = grad + row.place * shape.d;
  const int64_t first = row.lane * Width, step = lanes * Width;
  float g[Width] = {};
  if (first < shape.d) load_floats(of_row + first, g);
  Level level;
  int64_t number = row.place * shape.levels * shape.points;
  for (int l = 0; l < shape.levels; ++l) {
    level.step(shape, l);
    for (int point = 0; point < shape.points; ++point, ++number) {
      const Sample sample(shape, number, level);
      float dots[4] = {};
      for (int64_t c = first; c < shape.d; c += step) {
        if (step < shape.d) load_floats(of_row + c, g);
        const Corners<T, Width> corners(sample, level, shape, of_head + c, token_stride);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int i = 0; i < Width; ++i) dots[k] = fmaf(g[i], to_float(corners.values[k][i]), dots[k]);
      }
      float of_x = 0.0f, of_y = 0.0f, of_weight = 0.0f;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        of_x = fmaf(sample.down(k), k % 2 ? dots[k] : -dots[k], of_x);
        of_y = fmaf(sample.along(k), k / 2 ? dots[k] : -dots[k], of_y);
        of_weight = fmaf(sample.along(k) * sample.down(k), dots[k], of_weight);
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        of_x += __shfl_xor_sync(kAll, of_x, distance);
        of_y += __shfl_xor_sync(kAll, of_y, distance);
        of_weight += __shfl_xor_sync(kAll, of_weight, distance);
      }
      if (!row.exists || row.lane != 0) continue;
      if (grad_locations) {
        grad_locations.put(2 * number, sample.weight * of_x * static_cast<float>(level.width));
        grad_locations.put(2 * number + 1, sample.weight * of_y * static_cast<float>(level.height));
      }
      if (grad_weights) grad_weights.put(number, of_weight);
    }
  }
}

}  // namespace

void deformable_forward(const Deformable& p, Stream stream) {
  const int64_t rows = p.batch * p.heads * p.queries;
  if (rows * p.d == 0) return;
  with_type(p.out.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(p, {&p.value, &p.out}, [&](auto width) {
      const int lanes = lanes_of(p.d, width);
      launch<deformable_kernel<T, width>>(divide_up(rows, kThreads / lanes), kThreads, 0, stream,
                                          global<const T>(p.value), global<T>(p.out), shape_of(p), p.value.stride[0],
                                          p.value.stride[1], p.value.stride[2], rows, lanes);
    });
  });
}

void deformable_samples_backward(const Deformable& p, Stream stream) {
  const int64_t rows = p.batch * p.heads * p.queries;
  if (rows * p.levels * p.points == 0) return;
  with_type(p.value.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(p, {&p.value, &p.grad}, [&](auto width) {
      const int lanes = lanes_of(p.d, width);
      launch<deformable_samples_kernel<T, width>>(
          divide_up(rows, kThreads / lanes), kThreads, 0, stream, global<const T>(p.grad), global<const T>(p.value),
          mutable_numbers_of(p.grad_locations), mutable_numbers_of(p.grad_weights), shape_of(p), p.value.stride[0],
          p.value.stride[1], p.value.stride[2], rows, lanes);
    });
  });
}

}  // namespace velm::cuda
