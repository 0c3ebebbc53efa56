// What surrounds the product, one element at a time, for matrices of any element type: reading operands as fp32, and
// the epilogue. Chosen once by element type and activation as a function pointer, so that packing and multiplying are
// compiled once and not for every combination.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace velm::linear {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix of fp32 values, contiguous along its rows: a tensor, or the gradient of a pre-activation, which is computed
// from the gradient of the output as it is read.
struct Source {
  const void* data;
  int64_t stride;
  const void* saved = nullptr;
  int64_t saved_stride = 0;
  void (*read)(const Source&, int64_t row, int64_t column, int64_t n, float* out) = nullptr;

  void operator()(int64_t row, int64_t column, int64_t n, float* out) const { read(*this, row, column, n, out); }
};

Source source_of(const Tensor& matrix);
// grad * activation'(z), from the saved tensor of forward.
Source gradient_source(const Tensor& grad, const std::optional<Tensor>& saved, std::string_view activation);

// out = activation(z + bias) + residual, and what backward needs in saved. out and saved may be z.
struct Epilogue {
  void* out;
  int64_t out_stride;
  void* saved = nullptr;  // row stride of out
  const void* bias = nullptr;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  using Run = void (*)(const Epilogue&, const void* z, int64_t z_stride, int64_t row, int64_t rows, int64_t column,
                       int64_t columns);
  Run from_fp32 = nullptr;  // z is fp32, z[0] the element at (row, column)
  Run from_own = nullptr;   // z has the element type of out
};

Epilogue epilogue_of(const Tensor& out, const std::optional<Tensor>& saved, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, std::string_view activation);

// Writes n fp32 values in the element type of `dtype`, from element `at` on.
void write(ScalarType dtype, void* out, int64_t at, const float* values, int64_t n);

}  // namespace velm::linear
