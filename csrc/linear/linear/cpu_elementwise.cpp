#include "linear/linear/cpu_elementwise.h"

#include <type_traits>

#include "linear/linear/cpu_activation.h"
#include "simd/dtype.h"
#include "simd/parallel.h"

namespace velm::linear {
namespace {

using simd::kLanes;
using simd::with_type;

// Those with an exponential compute it for large arguments too, where it underflows.
template <Activation A>
struct Flush {};
template <Activation A>
  requires(A != Activation::kNone && A != Activation::kRelu)
struct Flush<A> {
  simd::FlushSubnormals flush;
};

// f(j, lanes) for the vectors that cover [0, n).
template <class F>
VELM_INLINE void for_vectors(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, std::integral_constant<int, kLanes>{});
  if (j < n) f(j, static_cast<int>(n - j));
}
template <class T, class N>
VELM_INLINE Vec load_lanes(const T* p, N n) {
  if constexpr (std::is_same_v<N, int>)
    return simd::load_first(p, n);
  else
    return simd::load(p);
}
template <class T, class N>
VELM_INLINE void store_lanes(T* p, Vec x, N n) {
  if constexpr (std::is_same_v<N, int>)
    simd::store_first(p, x, n);
  else
    simd::store(p, x);
}

template <class T>
void read_plain(const Source& in, int64_t row, int64_t column, int64_t n, float* out) {
  simd::convert(out, static_cast<const T*>(in.data) + row * in.stride + column, n);
}

template <class T, Activation A>
void read_gradient(const Source& in, int64_t row, int64_t column, int64_t n, float* out) {
  [[maybe_unused]] const Flush<A> flush;
  const T* grad = static_cast<const T*>(in.data) + row * in.stride + column;
  const T* saved = static_cast<const T*>(in.saved) + row * in.saved_stride + column;
  for_vectors(n, [&](int64_t j, auto lanes) {
    store_lanes(out + j, activation_gradient<A, T>(load_lanes(grad + j, lanes), load_lanes(saved + j, lanes)), lanes);
  });
}

template <class T, Activation A, class Z>
void run_epilogue(const Epilogue& e, const void* z, int64_t z_stride, int64_t row, int64_t rows, int64_t column,
                  int64_t columns) {
  [[maybe_unused]] const Flush<A> flush;
  const T* bias = e.bias ? static_cast<const T*>(e.bias) + column : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const Z* from = static_cast<const Z*>(z) + i * z_stride;
    const int64_t at = (row + i) * e.out_stride + column;
    T* out = static_cast<T*>(e.out) + at;
    T* saved = e.saved ? static_cast<T*>(e.saved) + at : nullptr;
    const T* residual =
        e.residual ? static_cast<const T*>(e.residual) + (row + i) * e.residual_stride + column : nullptr;
    for_vectors(columns, [&](int64_t j, auto lanes) {
      Vec x = load_lanes(from + j, lanes);
      if (bias) x += load_lanes(bias + j, lanes);
      Vec y = activate<A>(x);
      if (saved) store_lanes(saved + j, kFromValue<A, T> ? y : x, lanes);
      if (residual) y += load_lanes(residual + j, lanes);
      store_lanes(out + j, y, lanes);
    });
  }
}

}  // namespace

Source source_of(const Tensor& matrix) {
  return with_type(matrix.scalar_type(), [&](auto t) {
    return Source{matrix.const_data_ptr(), matrix.stride(0), nullptr, 0, &read_plain<decltype(t)>};
  });
}

Source gradient_source(const Tensor& grad, const std::optional<Tensor>& saved, std::string_view activation) {
  if (activation.empty() || !saved) return source_of(grad);
  return with_type(grad.scalar_type(), [&](auto t) {
    return with_activation(activation, [&](auto a) {
      return Source{grad.const_data_ptr(), grad.stride(0), saved->const_data_ptr(), saved->stride(0),
                    &read_gradient<decltype(t), decltype(a)::value>};
    });
  });
}

Epilogue epilogue_of(const Tensor& out, const std::optional<Tensor>& saved, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, std::string_view activation) {
  Epilogue e{out.mutable_data_ptr(), out.size(1)};
  if (saved) e.saved = saved->mutable_data_ptr();
  if (bias) e.bias = bias->const_data_ptr();
  if (residual) {
    e.residual = residual->const_data_ptr();
    e.residual_stride = residual->stride(0);
  }
  with_type(out.scalar_type(), [&](auto t) {
    with_activation(activation, [&](auto a) {
      using T = decltype(t);
      e.from_fp32 = &run_epilogue<T, decltype(a)::value, float>;
      e.from_own = &run_epilogue<T, decltype(a)::value, T>;
    });
  });
  return e;
}

void write(ScalarType dtype, void* out, int64_t at, const float* values, int64_t n) {
  with_type(dtype, [&](auto t) { simd::convert(static_cast<decltype(t)*>(out) + at, values, n); });
}

}  // namespace velm::linear
