// Arguments that are not always there.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace velm {

// An argument without which what is asked for cannot be computed: an operator whose declaration does not keep it for
// that gradient raises an error, where reading it would end the process.
inline const torch::stable::Tensor& needed(const std::optional<torch::stable::Tensor>& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.has_value(), name, ": expected a tensor, given None");
  return *tensor;
}

}  // namespace velm
