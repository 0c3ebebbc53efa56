// pool_grid: means of squares of tokens, each token read once and each gradient written once.

#include <algorithm>
#include <optional>

#include "common/tensor.h"
#include "pooling/windows_cpu.h"
#include "simd/vec.h"

namespace velm {
namespace {

using namespace simd;
using pooling::Windows;

// Vectors of features that are summed at once, in registers.
constexpr int kBlock = 8;

// The mean of the tokens of a square, features [c, c + Count * kLanes).
template <int Count, class T>
VELM_INLINE void mean_of(const T* x, int64_t row_stride, const Windows::Window& window, int64_t factor, float share,
                         int64_t c, T* out) {
  Vec sum[Count];
  unroll<Count>([&](auto v) { sum[v] = zero(); });
  for (int64_t line = 0; line < factor; ++line) {
    const T* token = x + (window.first + line * window.width) * row_stride + c;
    for (int64_t i = 0; i < factor; ++i, token += row_stride)
      unroll<Count>([&](auto v) { sum[v] += load(token + v * kLanes); });
  }
  unroll<Count>([&](auto v) { store(out + c + v * kLanes, sum[v] * Vec(share)); });
}

template <class T>
void mean_row(const T* x, int64_t row_stride, const Windows::Window& window, int64_t factor, int64_t dim, T* out) {
  const float share = 1.0f / static_cast<float>(factor * factor);
  int64_t c = 0;
  for (; c + kBlock * kLanes <= dim; c += kBlock * kLanes)
    mean_of<kBlock>(x, row_stride, window, factor, share, c, out);
  for (; c + kLanes <= dim; c += kLanes) mean_of<1>(x, row_stride, window, factor, share, c, out);
  const int left = static_cast<int>(dim - c);
  if (left == 0) return;
  Vec sum = zero();
  for (int64_t line = 0; line < factor; ++line)
    for (int64_t i = 0; i < factor; ++i)
      sum += load_first(x + (window.first + line * window.width + i) * row_stride + c, left);
  store_first(out + c, sum * Vec(share), left);
}

void pool_grid_forward(Tensor x, std::optional<Tensor> table, int64_t height, int64_t width, int64_t factor,
                       Tensor out) {
  in_large_pages(out);
  const int64_t dim = x.size(2), batch_stride = x.stride(0), row_stride = x.stride(1);
  const Windows windows(table, x.size(0), x.size(1), height, width, factor);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = const_data<T>(x);
    T* to = mutable_data<T>(out);
    const int64_t bytes = factor * factor * dim * static_cast<int64_t>(sizeof(T));
    windows.for_each(bytes, [&](int64_t entry, int64_t row, const Windows::Window& window) {
      T* result = to + (entry * windows.rows + row) * dim;
      if (window.first < 0) {
        std::fill_n(result, dim, T{});
      } else {
        mean_row(from + entry * batch_stride, row_stride, window, factor, dim, result);
      }
    });
  });
}

void pool_grid_backward(Tensor grad, std::optional<Tensor> table, int64_t tokens, int64_t height, int64_t width,
                        int64_t factor, Tensor grad_x) {
  in_large_pages(grad_x);
  const int64_t dim = grad.size(2), batch_stride = grad.stride(0), row_stride = grad.stride(1);
  const Windows windows(table, grad.size(0), tokens, height, width, factor);
  windows.clear_others(grad_x);
  const float share = 1.0f / static_cast<float>(factor * factor);
  with_type(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = const_data<T>(grad);
    T* to = mutable_data<T>(grad_x);
    const int64_t bytes = factor * factor * dim * static_cast<int64_t>(sizeof(T));
    windows.for_each(bytes, [&](int64_t entry, int64_t row, const Windows::Window& window) {
      if (window.first < 0) return;
      const T* come = from + entry * batch_stride + row * row_stride;
      T* first = to + (entry * tokens + window.first) * dim;
      int64_t c = 0;
      for (; c + kLanes <= dim; c += kLanes) store(first + c, load(come + c) * Vec(share));
      if (const int left = static_cast<int>(dim - c); left > 0)
        store_first(first + c, load_first(come + c, left) * Vec(share), left);
      // The others are the same, and the first is in the cache.
      for (int64_t line = 0; line < factor; ++line)
        for (int64_t i = line == 0 ? 1 : 0; i < factor; ++i)
          std::copy_n(first, dim, first + (line * window.width + i) * dim);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "pool_grid_forward", pool_grid_forward);
  VELM_KERNEL(m, "pool_grid_backward", pool_grid_backward);
}

}  // namespace
}  // namespace velm
