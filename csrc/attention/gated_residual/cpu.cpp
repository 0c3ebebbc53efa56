// residual + tanh(gate) * x, forward and backward, one pass over memory each.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/needed.h"
#include "common/tensor.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace simd;

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// tanh(gate), one for every column or one for all. In double, since backward needs 1 - tanh^2, which cancels.
std::vector<double> tanh_of(const Tensor& gate) {
  return with_type(gate.scalar_type(), [&](auto t) {
    using G = decltype(t);
    std::vector<double> out(static_cast<size_t>(gate.numel()));
    for (size_t i = 0; i < out.size(); ++i) out[i] = std::tanh(static_cast<double>(to_float(const_data<G>(gate)[i])));
    return out;
  });
}

// f(i, lanes) for the vectors that cover [0, n), with n a multiple of kLanes or the last one partial.
template <class F>
VELM_INLINE void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int, kLanes>{});
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class T>
VELM_INLINE Vec load_lanes(const T* p, std::integral_constant<int, kLanes>) {
  return load(p);
}
template <class T>
VELM_INLINE Vec load_lanes(const T* p, int lanes) {
  return load_first(p, lanes);
}
template <class T>
VELM_INLINE void store_lanes(T* p, Vec x, std::integral_constant<int, kLanes>) {
  store(p, x);
}
template <class T>
VELM_INLINE void store_lanes(T* p, Vec x, int lanes) {
  store_first(p, x, lanes);
}

template <class R, class X, class O>
void forward_rows(O* out, const Tensor& residual, const Tensor& x, const std::vector<float>& tanh_gate,
                  const bool* row_mask) {
  const int64_t rows = x.size(0), dim = x.size(1);
  const int64_t residual_stride = residual.stride(0), x_stride = x.stride(0);
  const R* residual_data = const_data<R>(residual);
  const X* x_data = const_data<X>(x);
  const float* gates = tanh_gate.data();
  const bool one_gate = tanh_gate.size() == 1;
  parallel_ranges(rows, kGrain / std::max<int64_t>(dim, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const R* r = residual_data + i * residual_stride;
      const X* branch = x_data + i * x_stride;
      O* o = out + i * dim;
      if (row_mask && !row_mask[i]) {
        for_vectors(dim, [&](int64_t j, auto lanes) { store_lanes(o + j, load_lanes(r + j, lanes), lanes); });
      } else if (one_gate) {
        const Vec gate(gates[0]);
        for_vectors(dim, [&](int64_t j, auto lanes) {
          store_lanes(o + j, fma(gate, load_lanes(branch + j, lanes), load_lanes(r + j, lanes)), lanes);
        });
      } else {
        for_vectors(dim, [&](int64_t j, auto lanes) {
          const Vec gate = load_lanes(gates + j, lanes);
          store_lanes(o + j, fma(gate, load_lanes(branch + j, lanes), load_lanes(r + j, lanes)), lanes);
        });
      }
    }
  });
}

void gated_residual_forward(Tensor residual, Tensor x, Tensor gate, std::optional<Tensor> row_mask, Tensor out) {
  const bool* mask = row_mask ? const_data<bool>(*row_mask) : nullptr;
  const std::vector<double> exact = tanh_of(gate);
  const std::vector<float> tanh_gate(exact.begin(), exact.end());
  with_type(residual.scalar_type(), [&](auto r) {
    with_type(x.scalar_type(), [&](auto b) {
      using R = decltype(r);
      using X = decltype(b);
      using O = std::conditional_t<std::is_same_v<R, X>, R, float>;
      forward_rows<R, X, O>(mutable_data<O>(out), residual, x, tanh_gate, mask);
    });
  });
}

// One chunk of rows: grad_x, and the sums over these rows of grad * x, for every column or (one_gate) over all.
// A float32 sum runs over few rows before it is added to the next level, so that its error does not grow with them.
template <class G, class X>
struct BackwardChunk {
  static constexpr int64_t kRowsASum = 16;

  const G* grad;
  const X* x;
  int64_t x_stride, dim;
  const float* gates;
  bool one_gate;
  const bool* row_mask;
  X* grad_x;
  bool wants_gate;

  void run(int64_t begin, int64_t end, double* sums, float* level) const {
    for (int64_t block = begin; block < end; block += kRowsASum) {
      const int64_t stop = std::min(block + kRowsASum, end);
      if (wants_gate && !one_gate) std::fill(level, level + dim, 0.0f);
      for (int64_t i = block; i < stop; ++i) {
        if (row_mask && !row_mask[i]) {
          if (grad_x) std::fill(grad_x + i * dim, grad_x + (i + 1) * dim, X{});
          continue;
        }
        if (grad_x) scale_row(grad + i * dim, grad_x + i * dim);
        if (wants_gate) add_products(grad + i * dim, x + i * x_stride, sums, level);
      }
      if (wants_gate && !one_gate)
        for (int64_t j = 0; j < dim; ++j) sums[j] += level[j];
    }
  }

 private:
  void scale_row(const G* g, X* out) const {
    if (one_gate) {
      const Vec gate(gates[0]);
      for_vectors(dim, [&](int64_t j, auto lanes) { store_lanes(out + j, gate * load_lanes(g + j, lanes), lanes); });
    } else {
      for_vectors(dim, [&](int64_t j, auto lanes) {
        store_lanes(out + j, load_lanes(gates + j, lanes) * load_lanes(g + j, lanes), lanes);
      });
    }
  }

  void add_products(const G* g, const X* branch, double* sums, float* level) const {
    if (one_gate) {
      constexpr int64_t kPiece = 32 * kLanes;
      for (int64_t first = 0; first < dim; first += kPiece) {
        Vec sum = zero();
        for_vectors(std::min(kPiece, dim - first), [&](int64_t j, auto lanes) {
          sum = fma(load_lanes(g + first + j, lanes), load_lanes(branch + first + j, lanes), sum);
        });
        sums[0] += sum_lanes(sum);
      }
    } else {
      for_vectors(dim, [&](int64_t j, auto lanes) {
        const Vec sum = load_lanes(level + j, lanes);
        store_lanes(level + j, fma(load_lanes(g + j, lanes), load_lanes(branch + j, lanes), sum), lanes);
      });
    }
  }
};

void gated_residual_backward(Tensor grad, std::optional<Tensor> x, Tensor gate, std::optional<Tensor> row_mask,
                             ScalarType x_dtype, std::optional<Tensor> grad_x, std::optional<Tensor> grad_gate) {
  const int64_t rows = grad.size(0), dim = grad.size(1);
  const bool wants_gate = grad_gate.has_value();
  const std::vector<double> exact = tanh_of(gate);
  const std::vector<float> tanh_gate(exact.begin(), exact.end());
  const int64_t gates = gate.numel();

  // Chunks depend on the shape alone: the sums are the same for any number of threads.
  const int64_t chunk = std::max<int64_t>({1, (rows + 63) / 64, kGrain / std::max<int64_t>(dim, 1)});
  const int64_t chunks = (rows + chunk - 1) / chunk;
  std::vector<double> sums(wants_gate ? static_cast<size_t>(chunks * gates) : 0);
  with_type(grad.scalar_type(), [&](auto g) {
    with_type(x_dtype, [&](auto b) {
      using G = decltype(g);
      using X = decltype(b);
      const BackwardChunk<G, X> work{const_data<G>(grad),
                                     wants_gate ? const_data<X>(needed(x, "x")) : nullptr,
                                     wants_gate ? x->stride(0) : 0,
                                     dim,
                                     tanh_gate.data(),
                                     gates == 1,
                                     row_mask ? const_data<bool>(*row_mask) : nullptr,
                                     grad_x ? mutable_data<X>(*grad_x) : nullptr,
                                     wants_gate};
      parallel_items(chunks, [&](int64_t c) {
        std::vector<float> level(wants_gate && gates > 1 ? static_cast<size_t>(dim) : 0);
        work.run(c * chunk, std::min((c + 1) * chunk, rows), sums.data() + (wants_gate ? c * gates : 0), level.data());
      });
    });
  });
  if (wants_gate) {
    with_type(gate.scalar_type(), [&](auto t) {
      auto* out = mutable_data<decltype(t)>(*grad_gate);
      for (int64_t j = 0; j < gates; ++j) {
        double total = 0;
        for (int64_t c = 0; c < chunks; ++c) total += sums[static_cast<size_t>(c * gates + j)];
        const double tanh_j = exact[static_cast<size_t>(j)];
        store_scalar(out + j, static_cast<float>((1 - tanh_j * tanh_j) * total));
      }
    });
  }
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "gated_residual_forward", gated_residual_forward);
  VELM_KERNEL(m, "gated_residual_backward", gated_residual_backward);
}

}  // namespace
}  // namespace velm
