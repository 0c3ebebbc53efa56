// The arguments of the attention operators as plain pointers and sizes, and what each row of
// queries may see.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "simd/dtype.h"

namespace velm::attention {

using simd::ScalarType;
using simd::with_type;
using torch::stable::Tensor;

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Float ? 4 : 2;
}

// Rows of contiguous elements, found by batch, head and row; strides in elements.
struct Rows {
  const char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t batch = 0, head = 0, row = 0;

  const char* at(int64_t b, int64_t h, int64_t i) const {
    return data + (b * batch + h * head + i * row) * element_size(dtype);
  }
  char* mutable_at(int64_t b, int64_t h, int64_t i) const { return const_cast<char*>(at(b, h, i)); }
};

// A broadcastable (batch, heads, queries, keys) operand; broadcast dimensions have stride 0.
struct Scores {
  const char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t element = 0;
  int64_t stride[4] = {};

  explicit operator bool() const { return data != nullptr; }
  const char* row(int64_t b, int64_t h, int64_t i) const {
    return data + (b * stride[0] + h * stride[1] + i * stride[2]) * element;
  }
};

// Keys a row may see: j with lo <= j < hi.
struct Range {
  int32_t lo = 0, hi = 0;
};

// The tensors both operators take, in the order of their schemas.
struct Arguments {
  Tensor query, key, value;
  std::optional<Tensor> key_lengths, range_start, range_stop, key_mask, mask, bias, rel_pos_height, rel_pos_width,
      query_norm_weight, key_norm_weight, seed, cu_seqlens_q, cu_seqlens_k;
  bool is_causal;
  double scale, softcap, norm_eps, dropout_p;
};

struct Problem {
  explicit Problem(const Arguments& arguments);

  int64_t batch, heads, kv_heads, group;
  int64_t queries, keys;  // of a whole tensor: of one batch entry, or all packed tokens
  int64_t head_dim, value_dim;
  ScalarType dtype;
  bool varlen;
  Rows q, k, v;
  Scores mask, bias;
  // Whether keys are a grid: key j stands in row j / grid_width and column j % grid_width, which both have a bias.
  bool on_grid = false;
  Rows rel_pos_height, rel_pos_width;
  int64_t grid_height = 0, grid_width = 0;
  float scale, softcap;
  bool dropout = false;
  uint32_t dropout_below = 0;  // a random word below this drops its weight
  float dropout_scale = 1.0f;
  uint64_t seed = 0;

  int64_t first_query(int64_t b) const { return varlen ? query_offsets_[b] : 0; }
  int64_t first_key(int64_t b) const { return varlen ? key_offsets_[b] : 0; }
  int64_t query_count(int64_t b) const { return varlen ? query_offsets_[b + 1] - query_offsets_[b] : queries; }
  int64_t key_count(int64_t b) const { return varlen ? key_offsets_[b + 1] - key_offsets_[b] : keys; }
  // Position of (b, h, i) in logsumexp, and of (b, h, j) in key_mass.
  int64_t row_index(int64_t b, int64_t h, int64_t i) const {
    return varlen ? h * queries + first_query(b) + i : (b * heads + h) * queries + i;
  }
  int64_t mass_index(int64_t b, int64_t h, int64_t j) const {
    return varlen ? h * keys + first_key(b) + j : (b * heads + h) * keys + j;
  }
  // Biases of the rows and columns of the grid that a query has.
  int64_t grid() const { return grid_height + grid_width; }
  int64_t mass_size() const { return (varlen ? 1 : batch) * heads * keys; }
  // The keys that query i of batch entry b may see by lengths, ranges and causality.
  Range range(int64_t b, int64_t i) const;
  // Which keys of the range are masked besides; null where all may be attended.
  const bool* holes(int64_t b) const { return holes_.empty() ? nullptr : holes_[b]; }
  // Calls f(j) for the keys that query i of head h of batch entry b may attend to, until f returns true; whether it
  // did. Mask and bias are read, which takes its time.
  template <class F>
  bool any_seen(int64_t b, int64_t h, int64_t i, const F& f) const;
  bool sees_any(int64_t b, int64_t h, int64_t i) const {
    return any_seen(b, h, i, [](int64_t) { return true; });
  }
  // Whether a key can be hidden from one row and visible to another.
  bool masked_by_row() const { return ranges_ || causal_ || mask || bias; }

 private:
  bool causal_, ranges_ = false;
  const int32_t *start_ = nullptr, *stop_ = nullptr;
  std::vector<Range> key_bounds_;   // of every batch entry, from lengths and key_mask
  std::vector<const bool*> holes_;  // empty where no key_mask leaves holes
  std::vector<int64_t> query_offsets_, key_offsets_;
};

template <class F>
bool Problem::any_seen(int64_t b, int64_t h, int64_t i, const F& f) const {
  const Range seen = range(b, i);
  const bool* not_hole = holes(b);
  const char* allowed = mask ? mask.row(b, h, i) : nullptr;
  const auto any = [&](const auto& hidden_by_bias) {
    for (int64_t j = seen.lo; j < seen.hi; ++j) {
      const bool is_seen =
          (!not_hole || not_hole[j]) && (!allowed || allowed[j * mask.stride[3]]) && !hidden_by_bias(j);
      if (is_seen && f(j)) return true;
    }
    return false;
  };
  if (!bias) return any([](int64_t) { return false; });
  return with_type(bias.dtype, [&](auto tag) {
    const auto* row = reinterpret_cast<const decltype(tag)*>(bias.row(b, h, i));
    return any(
        [&](int64_t j) { return simd::to_float(row[j * bias.stride[3]]) == -std::numeric_limits<float>::infinity(); });
  });
}

// The element type, which is one of those that with_type knows.
ScalarType dtype_of(const Tensor& t);
// Rows of a (B, H, N, D) tensor or of a packed (T, H, D) one.
Rows rows_of(const Tensor& t, bool varlen);

}  // namespace velm::attention
