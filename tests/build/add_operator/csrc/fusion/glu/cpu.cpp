// glu, x * sigmoid(gate): each input and each gradient passes through the processor once.

#include "fusion/regions_cpu.h"
#include "simd/math.h"

namespace velm {
namespace {

VELM_INLINE Vec sigmoid(Vec x) {
  return 1.0f / (1.0f + exp(-x));
}

void glu_forward(Tensor x, Tensor gate, Tensor out) {
  const int64_t rows = x.size(0), dim = x.size(1);
  const Lines from(x, 0, x.stride(0)), gates(gate, 0, gate.stride(0)), to(out, 0, dim);
  parallel_ranges(rows, grain(dim), [&](int64_t begin, int64_t end) {
    Scratch memory;
    float *of_x = memory.take(dim), *of_gate = memory.take(dim), *result = memory.take(dim);
    for (int64_t row = begin; row < end; ++row) {
      const float* values = as_floats(from.type, from.at(0, row), dim, of_x);
      const float* g = as_floats(from.type, gates.at(0, row), dim, of_gate);
      const Result line(from.type, to.at(0, row), result);
      for_vectors(dim, [&](int64_t c, auto read, auto write)
                           VELM_INLINE_LAMBDA { write(line.values + c, read(values + c) * sigmoid(read(g + c))); });
      line.finish(dim);
    }
  });
}

// A gradient that is not wanted is nothing, and x is where that of the gate is not.
void glu_backward(Tensor grad, std::optional<Tensor> x, Tensor gate, std::optional<Tensor> grad_x,
                  std::optional<Tensor> grad_gate) {
  const int64_t rows = grad.size(0), dim = grad.size(1);
  const ScalarType type = grad.scalar_type();
  const Lines incoming(grad, 0, dim), gates(gate, 0, gate.stride(0));
  const Lines from = grad_gate ? Lines(*x, 0, x->stride(0)) : Lines();
  const Lines to_x = grad_x ? Lines(*grad_x, 0, dim) : Lines();
  const Lines to_gate = grad_gate ? Lines(*grad_gate, 0, dim) : Lines();
  parallel_ranges(rows, grain(dim), [&](int64_t begin, int64_t end) {
    Scratch memory;
    float *of_grad = memory.take(dim), *of_gate = memory.take(dim), *of_x = memory.take(dim);
    float* result = memory.take(dim);
    for (int64_t row = begin; row < end; ++row) {
      const float* in = as_floats(type, incoming.at(0, row), dim, of_grad);
      const float* g = as_floats(type, gates.at(0, row), dim, of_gate);
      if (grad_x) {
        const Result line(type, to_x.at(0, row), result);
        for_vectors(dim, [&](int64_t c, auto read, auto write)
                             VELM_INLINE_LAMBDA { write(line.values + c, read(in + c) * sigmoid(read(g + c))); });
        line.finish(dim);
      }
      if (grad_gate) {
        const float* values = as_floats(type, from.at(0, row), dim, of_x);
        const Result line(type, to_gate.at(0, row), result);
        for_vectors(dim, [&](int64_t c, auto read, auto write) VELM_INLINE_LAMBDA {
          // 1 - sigmoid(gate) is sigmoid(-gate), which does not cancel.
          const Vec at = read(g + c);
          write(line.values + c, read(in + c) * read(values + c) * sigmoid(at) * sigmoid(-at));
        });
        line.finish(dim);
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "glu_forward", glu_forward);
  VELM_KERNEL(m, "glu_backward", glu_backward);
}

}  // namespace
}  // namespace velm
