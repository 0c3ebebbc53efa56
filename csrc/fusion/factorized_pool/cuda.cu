// normalize(signed_sqrt(sum over the factor of dropout(a * b))) and its gradient: one block per row. Under the norm a
// row is read twice, the second time from a cache.

#include "fusion/factorized_pool/cuda.h"

#include "device/launch.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/philox.h"
#include "device/reduce.h"

namespace velm::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;
// Columns that share counters: element c of a row takes word (c % 64) / 16 of counter (c / 64) * 16 + c % 16.
constexpr int kColumns = 64, kCounters = 16;
constexpr float kEps = 1e-12f, kLargest = 3.402823466e38f;

struct Shape {
  int64_t regions, dim, factor;
  int64_t a_batch_stride, a_region_stride, b_batch_stride, b_region_stride;
  uint32_t threshold;
  float scale;
  bool inner, power_norm, l2_norm;
};

// The products of a row.
template <class T>
struct Row {
  ReadOnly<T> a, b;
  ReadOnly<int64_t> seed;
  const Shape& shape;
  int64_t row;

  DEVICE_INLINE Row(ReadOnly<T> all_a, ReadOnly<T> all_b, ReadOnly<int64_t> seed, const Shape& shape)
      : seed(seed), shape(shape), row(blockIdx.x) {
    const int64_t batch = row / shape.regions, region = row % shape.regions;
    a = all_a + (batch * shape.a_batch_stride + region * shape.a_region_stride);
    b = all_b + (batch * shape.b_batch_stride + region * shape.b_region_stride);
  }

  DEVICE_INLINE int64_t column(int64_t o, int64_t f) const {
    return shape.inner ? o * shape.factor + f : f * shape.dim + o;
  }

  DEVICE_INLINE bool keeps(int64_t c) const {
    if (!seed) return true;
    uint32_t words[4] = {static_cast<uint32_t>(c / kColumns * kCounters + c % kCounters), static_cast<uint32_t>(row),
                         static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), 0};
    philox(words, static_cast<uint64_t>(seed[0]));
    const int which = static_cast<int>(c % kColumns / kCounters);
    const uint32_t word = which < 2 ? (which == 0 ? words[0] : words[1]) : (which == 2 ? words[2] : words[3]);
    return word >= shape.threshold;
  }

  DEVICE_INLINE float sum(int64_t o) const {
    float z = 0.0f;
    for (int64_t f = 0; f < shape.factor; ++f) {
      const int64_t c = column(o, f);
      // Selected, not multiplied by 0: what is dropped may be infinite.
      if (keeps(c)) z += to_float(a[c]) * to_float(b[c]) * shape.scale;
    }
    return z;
  }

  DEVICE_INLINE float root(float z) const { return shape.power_norm ? copysignf(sqrtf(fabsf(z)), z) : z; }
};

struct Storage {
  BlockSum<float> norm, dot;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(ReadOnly<T> a, ReadOnly<T> b, ReadOnly<int64_t> seed, Global<T> out, Shape shape) {
  auto& shared = static_shared<Storage>();
  const Row<T> row(a, b, seed, shape);
  float scale = 1.0f;
  if (shape.l2_norm) {
    float sum = 0.0f;
    for (int64_t o = threadIdx.x; o < shape.dim; o += kThreads) {
      const float z = row.sum(o);
      sum += shape.power_norm ? fabsf(z) : z * z;
    }
    const float norm = sqrtf(block_sum(sum, shared.norm));
    scale = 1.0f / (norm < kEps ? kEps : norm);
  }
  for (int64_t o = threadIdx.x; o < shape.dim; o += kThreads)
    out[row.row * shape.dim + o] = from_float<T>(row.root(row.sum(o)) * scale);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(ReadOnly<T> a, ReadOnly<T> b, ReadOnly<int64_t> seed, ReadOnly<T> grad, Global<T> grad_a,
                    Global<T> grad_b, Shape shape) {
  auto& shared = static_shared<Storage>();
  const Row<T> row(a, b, seed, shape);
  float norm = 1.0f, scale = 1.0f, along = 0.0f;
  if (shape.l2_norm) {
    float sum = 0.0f, dot = 0.0f;
    for (int64_t o = threadIdx.x; o < shape.dim; o += kThreads) {
      const float z = row.sum(o);
      sum += shape.power_norm ? fabsf(z) : z * z;
      dot += row.root(z) * to_float(grad[row.row * shape.dim + o]);
    }
    norm = sqrtf(block_sum(sum, shared.norm));
    dot = block_sum(dot, shared.dot);
    scale = 1.0f / (norm < kEps ? kEps : norm);
    along = norm <= kEps ? 0.0f : dot * scale * scale;
  }
  for (int64_t o = threadIdx.x; o < shape.dim; o += kThreads) {
    const float z = row.sum(o), r = row.root(z);
    const float given = to_float(grad[row.row * shape.dim + o]);
    float g = given;
    // Without the norm the others are not read, which may be NaN; nor is anything of a row of zeros.
    if (shape.l2_norm) g = norm == 0.0f ? 0.0f : (given - r * along) * scale;
    if (shape.power_norm) g = z == 0.0f ? 0.0f : g / (2.0f * fabsf(r));
    // What comes in infinite stays so, and NaN, which compares false.
    if (fabsf(given) <= kLargest && fabsf(along) <= kLargest)
      g = g > kLargest ? kLargest : g < -kLargest ? -kLargest : g;
    for (int64_t f = 0; f < shape.factor; ++f) {
      const int64_t c = row.column(o, f), at = row.row * shape.dim * shape.factor + c;
      const bool keeps = row.keeps(c);
      if (grad_a) grad_a[at] = from_float<T>(keeps ? g * to_float(row.b[c]) * shape.scale : 0.0f);
      if (grad_b) grad_b[at] = from_float<T>(keeps ? g * to_float(row.a[c]) * shape.scale : 0.0f);
    }
  }
}

Shape shape_of(const FactorizedPool& p) {
  return {p.a.size[2],
          p.dim(),
          p.factor,
          p.a.stride[1],
          p.a.stride[2],
          p.b.stride[1],
          p.b.stride[2],
          static_cast<uint32_t>(p.dropout_p * 4294967296.0),
          static_cast<float>(1.0 / (1.0 - p.dropout_p)),
          p.inner,
          p.power_norm,
          p.l2_norm};
}

}  // namespace

void factorized_pool_forward(const FactorizedPool& p, Stream stream) {
  const int64_t rows = p.rows();
  if (rows == 0 || p.dim() == 0) return;
  with_type(p.a.dtype, [&](auto t) {
    using T = decltype(t);
    launch<forward_kernel<T>>(static_cast<unsigned>(rows), kThreads, 0, stream, global<const T>(p.a),
                              global<const T>(p.b), global<const int64_t>(p.seed), global<T>(p.out), shape_of(p));
  });
}

void factorized_pool_backward(const FactorizedPool& p, Stream stream) {
  const int64_t rows = p.rows();
  if (rows == 0 || p.dim() == 0) return;
  with_type(p.a.dtype, [&](auto t) {
    using T = decltype(t);
    launch<backward_kernel<T>>(static_cast<unsigned>(rows), kThreads, 0, stream, global<const T>(p.a),
                               global<const T>(p.b), global<const int64_t>(p.seed), global<const T>(p.grad),
                               global<T>(p.grad_a), global<T>(p.grad_b), shape_of(p));
  });
}

}  // namespace velm::cuda
