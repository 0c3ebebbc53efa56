// How a kernel is registered: for torch, and for the package, which compares what it takes with what it is declared to.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

// Of this library alone, in build_info.cpp.
extern "C" void velm_note_signature(const char* name, const char* types);

namespace velm {

// Types of arguments as torch writes them in schemas. Without a definition for any other.
template <class T>
struct SchemaType;
template <>
struct SchemaType<torch::stable::Tensor> {
  static std::string name() { return "Tensor"; }
};
template <>
struct SchemaType<int64_t> {
  static std::string name() { return "int"; }
};
template <>
struct SchemaType<double> {
  static std::string name() { return "float"; }
};
template <>
struct SchemaType<bool> {
  static std::string name() { return "bool"; }
};
template <>
struct SchemaType<std::string> {
  static std::string name() { return "str"; }
};
template <>
struct SchemaType<torch::headeronly::ScalarType> {
  static std::string name() { return "ScalarType"; }
};
template <class T>
struct SchemaType<std::optional<T>> {
  static std::string name() { return SchemaType<T>::name() + "?"; }
};
template <class T>
struct SchemaType<std::vector<T>> {
  static std::string name() { return SchemaType<T>::name() + "[]"; }
};

template <class Result, class... Arguments>
void note_kernel(const char* name, Result (*)(Arguments...)) {
  std::string types;
  ((types += (types.empty() ? "" : ", ") + SchemaType<std::remove_cvref_t<Arguments>>::name()), ...);
  velm_note_signature(name, types.c_str());
}

}  // namespace velm

// In a block of STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, key, m): `function` serves the operator `name`.
#define VELM_KERNEL(m, name, function)  \
  m.impl(name, TORCH_BOX(&(function))); \
  ::velm::note_kernel(name, &(function))
