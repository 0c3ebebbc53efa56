#include "attention/cross_attention/cpu_problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "common/needed.h"

namespace velm::attention {

ScalarType dtype_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "expected float32, bfloat16 or float16");
  return dtype;
}

Rows rows_of(const Tensor& t, bool varlen) {
  Rows rows;
  rows.data = static_cast<const char*>(t.const_data_ptr());
  rows.dtype = dtype_of(t);
  const int last = varlen ? 2 : 3;
  STD_TORCH_CHECK(t.dim() == last + 1, "expected ", last + 1, " dimensions");
  STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1, "the last dimension must be contiguous");
  if (varlen) {
    rows.row = t.stride(0);
    rows.head = t.stride(1);
  } else {
    rows.batch = t.stride(0);
    rows.head = t.stride(1);
    rows.row = t.stride(2);
  }
  return rows;
}

namespace {

Scores scores_of(const std::optional<Tensor>& t) {
  Scores s;
  if (!t) return s;
  s.data = static_cast<const char*>(t->const_data_ptr());
  if (t->scalar_type() == ScalarType::Bool) {
    s.element = 1;
  } else {
    s.dtype = dtype_of(*t);
    s.element = element_size(s.dtype);
  }
  for (int d = 0; d < 4; ++d) s.stride[d] = t->size(d) == 1 ? 0 : t->stride(d);
  return s;
}

const int32_t* integers(const std::optional<Tensor>& t) {
  return t ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

// Offsets clamped to rise within [0, tokens]: a wrong value is never followed out of bounds.
std::vector<int64_t> offsets(const Tensor& cu_seqlens, int64_t tokens) {
  const int32_t* p = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  std::vector<int64_t> result(static_cast<size_t>(cu_seqlens.size(0)));
  int64_t last = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    last = std::clamp<int64_t>(p[i], last, tokens);
    result[i] = last;
  }
  return result;
}

}  // namespace

Problem::Problem(const Arguments& a) {
  varlen = a.cu_seqlens_q.has_value();
  dtype = dtype_of(a.query);
  q = rows_of(a.query, varlen);
  k = rows_of(a.key, varlen);
  v = rows_of(a.value, varlen);
  if (varlen) {
    query_offsets_ = offsets(*a.cu_seqlens_q, a.query.size(0));
    key_offsets_ = offsets(needed(a.cu_seqlens_k, "cu_seqlens_k"), a.key.size(0));
    batch = static_cast<int64_t>(query_offsets_.size()) - 1;
    queries = a.query.size(0);
    keys = a.key.size(0);
  } else {
    batch = a.query.size(0);
    queries = a.query.size(2);
    keys = a.key.size(2);
  }
  heads = a.query.size(1);
  kv_heads = a.key.size(1);
  group = kv_heads ? heads / kv_heads : 1;
  head_dim = a.query.size(varlen ? 2 : 3);
  value_dim = a.value.size(varlen ? 2 : 3);
  STD_TORCH_CHECK(keys < INT32_MAX && queries < INT32_MAX, "more than 2^31 - 1 tokens");
  mask = scores_of(a.mask);
  bias = scores_of(a.bias);
  on_grid = a.rel_pos_height.has_value();
  if (on_grid) {
    const Tensor& width = needed(a.rel_pos_width, "rel_pos_width");
    rel_pos_height = rows_of(*a.rel_pos_height, false);
    rel_pos_width = rows_of(width, false);
    grid_height = a.rel_pos_height->size(3);
    grid_width = width.size(3);
    STD_TORCH_CHECK(!varlen && grid_height * grid_width == keys, "expected a grid of all keys");
  }
  scale = static_cast<float>(a.scale);
  softcap = static_cast<float>(a.softcap);
  causal_ = a.is_causal;
  start_ = integers(a.range_start);
  stop_ = integers(a.range_stop);
  ranges_ = start_ != nullptr;
  if (ranges_) needed(a.range_stop, "range_stop");
  if (a.dropout_p > 0) {
    dropout = true;
    dropout_below = static_cast<uint32_t>(std::floor(a.dropout_p * 4294967296.0));
    dropout_scale = static_cast<float>(1.0 / (1.0 - a.dropout_p));
    STD_TORCH_CHECK(a.seed.has_value(), "dropout needs a seed");
    seed = static_cast<uint64_t>(*static_cast<const int64_t*>(a.seed->const_data_ptr()));
  }

  const int32_t* lengths = integers(a.key_lengths);
  const bool* key_mask = a.key_mask ? static_cast<const bool*>(a.key_mask->const_data_ptr()) : nullptr;
  key_bounds_.resize(static_cast<size_t>(batch));
  bool any_holes = false;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t lo = 0, hi = key_count(b);
    if (lengths) hi = std::clamp<int64_t>(lengths[b], 0, hi);
    if (key_mask) {
      const bool* m = key_mask + b * keys;
      while (lo < hi && !m[lo]) ++lo;
      while (hi > lo && !m[hi - 1]) --hi;
      if (std::find(m + lo, m + hi, false) != m + hi) any_holes = true;
    }
    key_bounds_[b] = {static_cast<int32_t>(lo), static_cast<int32_t>(hi)};
  }
  if (any_holes) {
    for (int64_t b = 0; b < batch; ++b) holes_.push_back(key_mask + b * keys);
  }
}

Range Problem::range(int64_t b, int64_t i) const {
  Range r = key_bounds_[b];
  if (ranges_) {
    const int64_t at = varlen ? first_query(b) + i : b * queries + i;
    r.lo = std::max(r.lo, start_[at]);
    r.hi = std::min(r.hi, stop_[at]);
  }
  if (causal_) r.hi = static_cast<int32_t>(std::min<int64_t>(r.hi, i + 1));
  if (r.hi <= r.lo) r = {0, 0};
  return r;
}

}  // namespace velm::attention
