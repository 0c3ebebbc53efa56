// merge_patches: the tokens of squares beside each other, moved as bits.

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "common/tensor.h"
#include "pooling/windows_cpu.h"
#include "simd/vec.h"

namespace velm {
namespace {

using pooling::Windows;

// Features that are moved between tokens and one result at once, so that the lines of all stay in the cache.
constexpr int64_t kFeatures = 64;

// Calls f with a number of the size of an element.
template <class F>
void with_bits(const Tensor& t, const F& f) {
  switch (t.element_size()) {
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    default:
      throw std::runtime_error("velm: expected float32, bfloat16 or float16");
  }
}

// The tokens of a square that lies `width` wide among rows `stride` elements apart.
template <class U>
struct Square {
  U* first;
  int64_t width, stride, factor;

  U* token(int64_t i) const { return first + (i / factor * width + i % factor) * stride; }
};

// merged[c * Count + i] = token i's feature c, or back.
template <int Count, bool kBack, class U, class V>
void channels_of(const Square<U>& square, V* merged, int64_t dim) {
  U* token[Count];
  for (int i = 0; i < Count; ++i) token[i] = square.token(i);
  for (int64_t c = 0; c < dim; ++c) {
    simd::unroll<Count>([&](auto i) {
      if constexpr (kBack) {
        token[i][c] = merged[c * Count + i];
      } else {
        merged[c * Count + i] = token[i][c];
      }
    });
  }
}

template <bool kBack, class U, class V>
void move(const Square<U>& square, V* merged, int64_t dim, bool channels) {
  const int64_t factor = square.factor, count = factor * factor;
  if (!channels) {
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kBack) {
        std::memcpy(square.token(i), merged + i * dim, sizeof(U) * static_cast<size_t>(dim));
      } else {
        std::memcpy(merged + i * dim, square.token(i), sizeof(V) * static_cast<size_t>(dim));
      }
    }
    return;
  }
  if (factor == 2) return channels_of<4, kBack>(square, merged, dim);
  if (factor == 3) return channels_of<9, kBack>(square, merged, dim);
  if (factor == 4) return channels_of<16, kBack>(square, merged, dim);
  for (int64_t c0 = 0; c0 < dim; c0 += kFeatures) {
    const int64_t c1 = std::min(dim, c0 + kFeatures);
    for (int64_t i = 0; i < count; ++i) {
      U* token = square.token(i);
      for (int64_t c = c0; c < c1; ++c) {
        if constexpr (kBack) {
          token[c] = merged[c * count + i];
        } else {
          merged[c * count + i] = token[c];
        }
      }
    }
  }
}

void merge_patches_forward(Tensor x, std::optional<Tensor> table, int64_t height, int64_t width, int64_t factor,
                           bool channels, Tensor out) {
  in_large_pages(out);
  const int64_t dim = x.size(2), batch_stride = x.stride(0), row_stride = x.stride(1);
  const Windows windows(table, x.size(0), x.size(1), height, width, factor);
  with_bits(x, [&](auto u) {
    using U = decltype(u);
    const U* from = const_data<U>(x);
    U* to = mutable_data<U>(out);
    const int64_t features = factor * factor * dim;
    windows.for_each(features * static_cast<int64_t>(sizeof(U)),
                     [&](int64_t entry, int64_t row, const Windows::Window& window) {
                       U* merged = to + (entry * windows.rows + row) * features;
                       if (window.first < 0) {
                         std::fill_n(merged, features, U{});
                         return;
                       }
                       const U* first = from + entry * batch_stride + window.first * row_stride;
                       move<false>(Square<const U>{first, window.width, row_stride, factor}, merged, dim, channels);
                     });
  });
}

void merge_patches_backward(Tensor grad, std::optional<Tensor> table, int64_t tokens, int64_t dim, int64_t height,
                            int64_t width, int64_t factor, bool channels, Tensor grad_x) {
  in_large_pages(grad_x);
  const int64_t batch_stride = grad.stride(0), row_stride = grad.stride(1);
  const Windows windows(table, grad.size(0), tokens, height, width, factor);
  windows.clear_others(grad_x);
  with_bits(grad, [&](auto u) {
    using U = decltype(u);
    const U* from = const_data<U>(grad);
    U* to = mutable_data<U>(grad_x);
    const int64_t bytes = factor * factor * dim * static_cast<int64_t>(sizeof(U));
    windows.for_each(bytes, [&](int64_t entry, int64_t row, const Windows::Window& window) {
      if (window.first < 0) return;
      U* first = to + (entry * tokens + window.first) * dim;
      const U* merged = from + entry * batch_stride + row * row_stride;
      move<true>(Square<U>{first, window.width, dim, factor}, merged, dim, channels);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "merge_patches_forward", merge_patches_forward);
  VELM_KERNEL(m, "merge_patches_backward", merge_patches_backward);
}

}  // namespace
}  // namespace velm
