// velm::linear on the CPU: activation(x w^T + bias) + residual and its gradients.

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/kernel.h"
#include "linear/linear/cpu_elementwise.h"
#include "linear/linear/cpu_gemm.h"
#include "simd/parallel.h"

namespace velm::linear {
namespace {

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

Precision precision_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 ? Precision::kBf16 : Precision::kFp32;
}

void linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                    std::string activation, std::string, Tensor out, std::optional<Tensor> kept) {
  const int64_t rows = x.size(0), columns = weight.size(0);
  if (rows == 0 || columns == 0) return;
  const Epilogue after = epilogue_of(out, kept, bias, residual, activation);
  const auto finish = [&](const float* c, int64_t stride, int64_t row, int64_t height, int64_t column, int64_t width) {
    after.from_fp32(after, c, stride, row, height, column, width);
  };
  if (rows <= kFewRows)
    multiply_few_rows(x, weight, finish);
  else
    multiply_transposed(precision_of(x), source_of(x), source_of(weight), rows, columns, x.size(1), finish);
}

// grad_x = grad_z weight: (rows, out_features) times (out_features, in_features).
void gradient_of_x(const Source& grad_z, int64_t rows, const Tensor& weight, const Tensor& grad_x) {
  const int64_t columns = weight.size(1);
  void* out = grad_x.mutable_data_ptr();
  const ScalarType dtype = grad_x.scalar_type();
  const auto finish = [&](const float* c, int64_t stride, int64_t row, int64_t height, int64_t column, int64_t width) {
    for (int64_t i = 0; i < height; ++i) write(dtype, out, (row + i) * columns + column, c + i * stride, width);
  };
  multiply_plain(precision_of(weight), grad_z, source_of(weight), rows, columns, weight.size(0), finish);
}

// grad_weight = grad_z^T x: (rows, out_features)^T times (rows, in_features). Adds grad_z summed over rows to sums.
void gradient_of_weight(const Source& grad_z, const Tensor& x, const Tensor& grad_weight, double* sums) {
  const int64_t rows = x.size(0), in_features = x.size(1), out_features = grad_weight.size(0);
  const ScalarType dtype = grad_weight.scalar_type();
  const int64_t slabs = depth_slabs(rows);
  // The sum over slabs stays in fp32 until the last.
  const bool in_place = dtype == ScalarType::Float;
  const Buffer<float> apart(in_place || slabs == 1 ? 0 : out_features * in_features);
  void* out = grad_weight.mutable_data_ptr();
  float* total = in_place ? static_cast<float*>(out) : apart.get();
  const auto finish = [&](int64_t slab, const float* c, int64_t stride, int64_t row, int64_t height, int64_t column,
                          int64_t width) {
    for (int64_t i = 0; i < height; ++i) {
      const int64_t at = (row + i) * in_features + column;
      const float* values = c + i * stride;
      if (slab > 0) {
        for (int64_t j = 0; j < width; ++j) total[at + j] += values[j];
        values = total + at;
      }
      if (slab == slabs - 1) {
        if (!in_place || slab == 0) write(dtype, out, at, values, width);
      } else if (slab == 0) {
        std::copy_n(values, width, total + at);
      }
    }
  };
  multiply_over_rows(precision_of(x), grad_z, source_of(x), out_features, in_features, rows, sums, finish);
}

// Reads a gradient once: writes it to out if given, and adds its sums over rows to sums if given.
void read_gradient(const Source& source, int64_t rows, int64_t columns, const Tensor* out, double* sums) {
  const int64_t chunks = divide_up(rows, kSumRows);
  const Buffer<float> partial(sums ? chunks * columns : 0);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kSumRows * columns));
  simd::parallel_ranges(chunks, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kColumns = 1024;
    alignas(64) float values[kColumns];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kSumRows, last = std::min(first + kSumRows, rows);
      float* part = partial.get() + chunk * columns;
      if (sums) std::fill_n(part, columns, 0.0f);
      for (int64_t i = first; i < last; ++i) {
        for (int64_t j = 0; j < columns; j += kColumns) {
          const int64_t n = std::min(kColumns, columns - j);
          source(i, j, n, values);
          if (out) write(out->scalar_type(), out->mutable_data_ptr(), i * columns + j, values, n);
          if (sums)
            for (int64_t k = 0; k < n; ++k) part[j + k] += values[k];
        }
      }
    }
  });
  if (!sums) return;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t j = 0; j < columns; ++j) sums[j] += partial.get()[chunk * columns + j];
}

void write_sums(const Tensor& out, const std::vector<double>& sums) {
  const std::vector<float> rounded(sums.begin(), sums.end());
  write(out.scalar_type(), out.mutable_data_ptr(), 0, rounded.data(), static_cast<int64_t>(rounded.size()));
}

void linear_backward(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> weight, std::optional<Tensor> out,
                     std::optional<Tensor> kept, std::string activation, std::string, std::optional<Tensor> grad_x,
                     std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias) {
  const int64_t rows = grad.size(0), out_features = grad.size(1);
  const Source grad_z = gradient_source(grad, kept ? kept : out, activation);
  std::vector<double> sums(grad_bias ? static_cast<size_t>(out_features) : 0);
  double* bias_sums = grad_bias ? sums.data() : nullptr;
  if (grad_x) gradient_of_x(grad_z, rows, *weight, *grad_x);
  if (grad_weight && x->size(1) > 0)
    gradient_of_weight(grad_z, *x, *grad_weight, bias_sums);
  else if (grad_bias)
    read_gradient(grad_z, rows, out_features, nullptr, bias_sums);
  if (grad_bias) write_sums(*grad_bias, sums);
}

// The epilogue alone, after a product of torch.
void linear_epilogue(Tensor z, std::optional<Tensor> bias, std::optional<Tensor> residual, std::string activation,
                     Tensor out, std::optional<Tensor> saved) {
  const int64_t rows = z.size(0), columns = z.size(1);
  if (rows == 0 || columns == 0) return;
  const Epilogue after = epilogue_of(out, saved, bias, residual, activation);
  const char* from = static_cast<const char*>(z.const_data_ptr());
  const int64_t row_bytes = columns * static_cast<int64_t>(z.element_size());
  simd::parallel_ranges(rows, kGrain / columns, [&](int64_t begin, int64_t end) {
    after.from_own(after, from + begin * row_bytes, columns, begin, end - begin, 0, columns);
  });
}

void linear_epilogue_backward(Tensor grad, std::optional<Tensor> saved, std::string activation,
                              std::optional<Tensor> grad_z, std::optional<Tensor> grad_bias) {
  const int64_t rows = grad.size(0), columns = grad.size(1);
  std::vector<double> sums(grad_bias ? static_cast<size_t>(columns) : 0);
  read_gradient(gradient_source(grad, saved, activation), rows, columns, grad_z ? &*grad_z : nullptr,
                grad_bias ? sums.data() : nullptr);
  if (grad_bias) write_sums(*grad_bias, sums);
}

}  // namespace
}  // namespace velm::linear

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "linear_forward", velm::linear::linear_forward);
  VELM_KERNEL(m, "linear_backward", velm::linear::linear_backward);
  VELM_KERNEL(m, "linear_epilogue", velm::linear::linear_epilogue);
  VELM_KERNEL(m, "linear_epilogue_backward", velm::linear::linear_epilogue_backward);
}
