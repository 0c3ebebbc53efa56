// weighted_sum, forward and backward: each element passes through a register once. A block takes some regions of an
// entry and columns side by side.

#include "fusion/weighted_sum/cuda.h"

#include "fusion/regions_cuda.h"

namespace velm::cuda {
namespace {

template <class T>
struct FeatureRows {
  ReadOnly<T> from;
  Global<T> grad;
  int64_t batch_stride, region_stride;
  bool is_broadcast;
};

template <class T>
struct Features {
  int count;
  int64_t regions, dim;
  unsigned blocks, column_blocks;
  FeatureRows<T> feature[kMostFeatures];
};

template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(const Features<T> all, ReadOnly<float> weights, Global<T> out) {
  const Share at(all.regions, all.blocks, all.column_blocks, Width);
  if (at.column >= all.dim) return;
  for (int64_t r = at.first; r < at.last; ++r) {
    float sum[Width] = {};
    for (int i = 0; i < all.count; ++i) {
      const auto& feature = all.feature[i];
      const float weight = weights[at.batch * all.count + i];
      float value[Width];
      load_floats(feature.from + (at.batch * feature.batch_stride + r * feature.region_stride + at.column), value);
#pragma unroll
      for (int k = 0; k < Width; ++k) sum[k] = fmaf(weight, value[k], sum[k]);
    }
    store_floats<T>(out + ((at.batch * all.regions + r) * all.dim + at.column), sum);
  }
}

struct Storage {
  // Taken by turns, so that a feature does not wait for all warps to have read what the one before left.
  BlockSum<float> products[2];
};

// The gradient is read once from memory, and by the features after the first from a cache.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_backward_kernel(const Features<T> all, ReadOnly<T> grad, ReadOnly<float> weights,
                                 Global<float> products, Global<float> parts) {
  auto& shared = static_shared<Storage>();
  const Share at(all.regions, all.blocks, all.column_blocks, Width);
  const bool is_inside = at.column < all.dim;
  int turn = 0;
  for (int i = 0; i < all.count; ++i) {
    const auto& feature = all.feature[i];
    if (feature.is_broadcast) continue;
    const float weight = weights[at.batch * all.count + i];
    float product = 0.0f;
    for (int64_t r = at.first; r < at.last && is_inside; ++r) {
      const int64_t place = (at.batch * all.regions + r) * all.dim + at.column;
      float g[Width], value[Width];
      load_floats(grad + place, g);
      if (products) {
        load_floats(feature.from + (at.batch * feature.batch_stride + r * feature.region_stride + at.column), value);
#pragma unroll
        for (int k = 0; k < Width; ++k) product = fmaf(g[k], value[k], product);
      }
      if (feature.grad) {
#pragma unroll
        for (int k = 0; k < Width; ++k) value[k] = g[k] * weight;
        store_floats<T>(feature.grad + place, value);
      }
    }
    if (products) {
      product = block_sum(product, shared.products[turn++ % 2]);
      if (threadIdx.x == 0) products[int64_t{blockIdx.x} * all.count + i] = product;
    }
  }
  if (!parts || !is_inside) return;
  float sum[Width] = {};
#pragma unroll 4
  for (int64_t r = at.first; r < at.last; ++r) {
    float g[Width];
    load_floats(grad + ((at.batch * all.regions + r) * all.dim + at.column), g);
#pragma unroll
    for (int k = 0; k < Width; ++k) sum[k] += g[k];
  }
#pragma unroll
  for (int k = 0; k < Width; ++k) parts[at.part * all.dim + at.column + k] = sum[k];
}

// What features with one region of several get from the sum of the gradient over the regions: one block per entry.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_broadcast_kernel(const Features<T> all, ReadOnly<float> sums, ReadOnly<float> weights,
                                  Global<float> grad_weights) {
  auto& shared = static_shared<Storage>();
  const int64_t batch = blockIdx.x;
  int turn = 0;
  for (int i = 0; i < all.count; ++i) {
    const auto& feature = all.feature[i];
    if (!feature.is_broadcast) continue;
    const float weight = weights[batch * all.count + i];
    float product = 0.0f;
    for (int64_t c = threadIdx.x; c < all.dim; c += kThreads) {
      const float sum = sums[batch * all.dim + c];
      if (feature.grad) feature.grad[batch * all.dim + c] = from_float<T>(sum * weight);
      if (grad_weights) product = fmaf(sum, to_float(feature.from[batch * feature.batch_stride + c]), product);
    }
    if (!grad_weights) continue;
    product = block_sum(product, shared.products[turn++ % 2]);
    if (threadIdx.x == 0) grad_weights[batch * all.count + i] = product;
  }
}

template <class T>
Features<T> features_of(const WeightedSum& p, int width) {
  Features<T> all{};
  all.count = p.count;
  all.regions = p.regions();
  all.dim = p.dim();
  all.blocks = static_cast<unsigned>(region_blocks(p.regions()));
  all.column_blocks = divide_up(p.dim(), kThreads * width);
  for (int i = 0; i < p.count; ++i) {
    const WeightedFeature& f = p.feature[i];
    all.feature[i] = {global<const T>(f.from), global<T>(f.grad), f.from.stride[1], f.from.stride[2], f.is_broadcast};
  }
  return all;
}

template <class T>
bool fits_vectors(const WeightedSum& p) {
  bool fits = p.dim() % kVector<T> == 0 && is_aligned(p.out, kVector<T>);
  for (int i = 0; i < p.count; ++i)
    fits = fits && is_aligned(p.feature[i].from, kVector<T>) && is_aligned(p.feature[i].grad, kVector<T>);
  return fits;
}

}  // namespace

void weighted_sum_forward(const WeightedSum& p, Stream stream) {
  if (p.batch() * p.regions() * p.dim() == 0) return;
  with_type(p.out.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(fits_vectors<T>(p), [&](auto width) {
      const Features<T> all = features_of<T>(p, width);
      launch<weighted_sum_kernel<T, width>>(static_cast<unsigned>(p.batch()) * all.blocks * all.column_blocks, kThreads,
                                            0, stream, all, global<const float>(p.weights), global<T>(p.out));
    });
  });
}

void weighted_sum_backward(const WeightedSum& p, Stream stream) {
  if (p.batch() == 0) return;
  with_type(p.out.dtype, [&](auto t) {
    using T = decltype(t);
    const auto weights = global<const float>(p.weights);
    const int64_t blocks = region_blocks(p.regions());
    int64_t column_blocks = 0;
    if (p.regions() * p.dim() != 0)
      with_width<T>(fits_vectors<T>(p), [&](auto width) {
        const Features<T> all = features_of<T>(p, width);
        column_blocks = all.column_blocks;
        launch<weighted_sum_backward_kernel<T, width>>(
            static_cast<unsigned>(p.batch()) * all.blocks * all.column_blocks, kThreads, 0, stream, all,
            global<const T>(p.out), weights, global<float>(p.products), global<float>(p.parts));
      });
    if (p.grad_weights)
      add_parts<float>(p.products, 0, p.grad_weights, p.batch(), blocks * column_blocks, p.count, p.count, stream);
    if (!p.sums) return;
    add_parts<float>(p.parts, 0, p.sums, p.batch(), blocks, p.dim(), p.dim(), stream);
    launch<weighted_sum_broadcast_kernel<T>>(static_cast<unsigned>(p.batch()), kThreads, 0, stream,
                                             features_of<T>(p, 1), global<const float>(p.sums), weights,
                                             global<float>(p.grad_weights));
  });
}

}  // namespace velm::cuda
