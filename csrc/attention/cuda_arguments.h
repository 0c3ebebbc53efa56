// What every attention kernel takes, and what a block of it works on.
#pragma once

#include <algorithm>

#include "attention/cuda_problem.h"
#include "device/block.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/tiles.h"

namespace velm::cuda {

using namespace device;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <class T>
struct Rows {
  Global<T> data;
  int64_t batch, head, row;

  DEVICE_INLINE Global<T> at(int b, int h, int r) const { return data + (b * batch + h * head + r * row); }
};

// What broadcasts to (batch, heads, queries, keys).
template <class T>
struct Matrix {
  ReadOnly<T> data;
  int64_t stride[4];

  DEVICE_INLINE int64_t row(int b, int h, int query) const { return b * stride[0] + h * stride[1] + query * stride[2]; }
};

template <class T>
struct Inputs {
  Rows<const T> query, key, value;
  // The widest copies, in bytes, that these three allow: 16, 4 or one element.
  int query_width, key_width, value_width;
  int heads, group, queries, keys, head_dim, value_dim;
  ReadOnly<int32_t> lengths, range_start, range_stop, cu_seqlens_q, cu_seqlens_k;
  ReadOnly<unsigned char> key_mask;
  Matrix<unsigned char> mask;
  // One of the two: the bias has the type of the others, or is float32.
  Matrix<T> bias;
  Matrix<float> float_bias;
  ReadOnly<int64_t> seed;
  uint32_t direction;
  // A random word below this drops its weight.
  uint32_t drop_below;
  float keep_scale;
  // A score is `product` * (q . k), or with a softcap `cap` * tanh(`product` * (q . k)), and then the bias. Where the
  // scale is all that is between the two, kernels keep q . k as it is and scale what they subtract from it: the
  // difference to a maximum or a logsumexp is rounded once, however large the scores are.
  bool scales;
  float product, cap;
  // What is kept times `unit` is a score, and times `unit_base_2` one in base 2.
  float unit, unit_base_2;
  bool causal;

  DEVICE_INLINE bool hides_within_rows() const { return key_mask || mask.data || bias.data || float_bias.data; }
};

// One batch entry, or one packed sequence, kept inside of the tensors whatever the offsets say.
struct Sequence {
  int batch, first_query, queries, first_key, keys;

  template <class T>
  DEVICE_INLINE Sequence(const Inputs<T>& a, int index)
      : batch(index), first_query(0), queries(a.queries), first_key(0), keys(a.keys) {
    if (!a.cu_seqlens_q) return;
    batch = 0;
    first_query = min(max(int{a.cu_seqlens_q[index]}, 0), a.queries);
    queries = max(min(int{a.cu_seqlens_q[index + 1]}, a.queries) - first_query, 0);
    first_key = min(max(int{a.cu_seqlens_k[index]}, 0), a.keys);
    keys = max(min(int{a.cu_seqlens_k[index + 1]}, a.keys) - first_key, 0);
  }

  // The number of a query among all of its head, and of a row among those of all heads: what is kept for each of them
  // lies there.
  template <class T>
  DEVICE_INLINE int64_t query_number(const Inputs<T>& a, int query) const {
    return batch * int64_t{a.queries} + first_query + query;
  }
  template <class T>
  DEVICE_INLINE int64_t row_number(const Inputs<T>& a, int head, int query) const {
    return (batch * int64_t{a.heads} + head) * a.queries + first_query + query;
  }
};

template <class T>
inline Rows<T> rows_of(const View& view) {
  return {global<T>(view), view.stride[0], view.stride[1], view.stride[2]};
}

template <class T>
inline Matrix<T> matrix_of(const View& view) {
  Matrix<T> m{global<const T>(view), {}};
  std::copy(view.stride, view.stride + 4, m.stride);
  return m;
}

template <class T>
inline Inputs<T> inputs_of(const Attention& p) {
  Inputs<T> a{};
  a.query = rows_of<const T>(p.query);
  a.key = rows_of<const T>(p.key);
  a.value = rows_of<const T>(p.value);
  a.query_width = copy_width(p.query);
  a.key_width = copy_width(p.key);
  a.value_width = copy_width(p.value);
  a.heads = static_cast<int>(p.heads());
  a.group = static_cast<int>(p.heads() / p.kv_heads());
  a.queries = static_cast<int>(p.queries());
  a.keys = static_cast<int>(p.keys());
  a.head_dim = static_cast<int>(p.head_dim());
  a.value_dim = static_cast<int>(p.value_dim());
  a.lengths = global<const int32_t>(p.key_lengths);
  a.range_start = global<const int32_t>(p.range_start);
  a.range_stop = global<const int32_t>(p.range_stop);
  a.cu_seqlens_q = global<const int32_t>(p.cu_seqlens_q);
  a.cu_seqlens_k = global<const int32_t>(p.cu_seqlens_k);
  a.key_mask = global<const unsigned char>(p.key_mask);
  a.mask = matrix_of<unsigned char>(p.mask);
  if (p.bias.dtype == p.dtype())
    a.bias = matrix_of<T>(p.bias);
  else
    a.float_bias = matrix_of<float>(p.bias);
  a.seed = global<const int64_t>(p.seed);
  a.direction = p.direction;
  a.drop_below = static_cast<uint32_t>(p.dropout_p * 4294967296.0);
  a.keep_scale = p.seed ? static_cast<float>(1.0 / (1.0 - p.dropout_p)) : 1.0f;
  a.product = static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : p.scale);
  a.cap = static_cast<float>(p.softcap);
  // The largest of products is the largest of scores only if the scale is positive.
  a.scales = p.softcap > 0 || p.bias || !(a.product > 0.0f);
  a.unit = a.scales ? 1.0f : a.product;
  a.unit_base_2 = static_cast<float>((a.scales ? 1.0 : p.scale) * 1.4426950408889634);
  a.causal = p.is_causal;
  return a;
}

// Calls f with the class of a dimension, a compile-time number.
template <int kMost = 256, class F>
inline void with_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
#if !defined(VELM_ONLY_SMALL)
  if (dim <= 128) return f(std::integral_constant<int, 128>{});
  if constexpr (kMost > 128) return f(std::integral_constant<int, 256>{});
#endif
  // The sanitizers' tests have only the first, as all would take long to compile.
  throw std::runtime_error("velm: this kernel is not built for so large a dimension");
}

}  // namespace velm::cuda
