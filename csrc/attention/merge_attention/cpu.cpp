// Exact merge of attention over shards of the keys: one pass over the shards, forward and backward.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/tensor.h"
#include "simd/math.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace simd;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Work is split into blocks of kLanes queries of one batch entry, all heads: the weights of a block are computed on
// whole vectors, and the rows are then visited in the order in which they usually lie in memory.
struct Shape {
  int64_t batch, heads, queries, dim;

  explicit Shape(const Tensor& t) : batch(t.size(0)), heads(t.size(1)), queries(t.size(2)), dim(t.size(3)) {}
  int64_t query_blocks() const { return (queries + kLanes - 1) / kLanes; }
  int64_t blocks() const { return batch * query_blocks(); }
  // About 32k elements at least for a thread.
  int64_t grain() const { return 32768 / std::max<int64_t>(1, heads * kLanes * dim); }
  int64_t lse_row(int64_t b, int64_t h) const { return (b * heads + h) * queries; }
};

template <class F>
void for_blocks(const Shape& shape, const F& make_worker) {
  if (shape.heads == 0) return;
  parallel_ranges(shape.blocks(), shape.grain(), [&](int64_t begin, int64_t end) {
    const simd::FlushSubnormals flush;
    auto worker = make_worker();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % shape.query_blocks() * kLanes;
      worker(i / shape.query_blocks(), first, static_cast<int>(std::min<int64_t>(kLanes, shape.queries - first)));
    }
  });
}

// A shard that a query has nothing in is not read. The sign of its weight, -0, tells it from one whose weight is so
// small that it is 0.
VELM_INLINE Vec mark_absent(Vec lse, Vec weight) {
  return select(lse == Vec(-kInfinity), Vec(-0.0f), weight);
}
inline bool is_absent(float weight) {
  return weight == 0.0f && std::signbit(weight);
}

template <class T>
void forward(const std::vector<Tensor>& outs, const std::vector<Tensor>& logsumexps, const Tensor& out,
             const Tensor& logsumexp) {
  const Shape shape(out);
  const size_t shards = outs.size();
  float* total = mutable_data<float>(logsumexp);
  const Rows<T> result(out);
  std::vector<Rows<const T>> rows(outs.begin(), outs.end());
  std::vector<const float*> lses;
  for (const Tensor& t : logsumexps) lses.push_back(const_data<float>(t));

  for_blocks(shape, [&] {
    // [heads][shards][kLanes]
    return [&, weights = std::vector<float>(static_cast<size_t>(shape.heads) * shards * kLanes)](
               int64_t b, int64_t first, int lanes) mutable {
      for (int64_t h = 0; h < shape.heads; ++h) {
        const int64_t offset = shape.lse_row(b, h) + first;
        float* w = weights.data() + static_cast<size_t>(h) * shards * kLanes;
        Vec highest(-kInfinity);
        for (size_t s = 0; s < shards; ++s) {
          const Vec lse = load_first(lses[s] + offset, lanes);
          // NaN does not get into it, but into the sum.
          highest = maximum(lse, highest);
        }
        const Vec base = base_of(highest);
        Vec sum = zero();
        for (size_t s = 0; s < shards; ++s) {
          const Vec e = simd::exp(load_first(lses[s] + offset, lanes) - base);
          sum += e;
          store(w + s * kLanes, e);
        }
        const VecMask empty = sum == zero();
        const Vec inverse = select(empty, zero(), select(sum == Vec(kInfinity), Vec(kNaN), 1.0f / sum));
        for (size_t s = 0; s < shards; ++s)
          store(w + s * kLanes, mark_absent(load_first(lses[s] + offset, lanes), load(w + s * kLanes) * inverse));
        store_first(total + offset, select(empty, Vec(-kInfinity), highest + simd::log(sum)), lanes);
      }
      for (int i = 0; i < lanes; ++i) {
        for (int64_t h = 0; h < shape.heads; ++h) {
          const float* w = weights.data() + static_cast<size_t>(h) * shards * kLanes + i;
          T* to = result.at(b, h, first + i);
          for (int64_t j = 0; j < shape.dim; j += kLanes) {
            const int width = static_cast<int>(std::min<int64_t>(kLanes, shape.dim - j));
            Vec sum = zero();
            for (size_t s = 0; s < shards; ++s) {
              if (is_absent(w[s * kLanes])) continue;
              sum = fma(Vec(w[s * kLanes]), load_first(rows[s].at(b, h, first + i) + j, width), sum);
            }
            store_first(to + j, sum, width);
          }
        }
      }
    };
  });
}

template <class T>
void backward(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp, const std::vector<Tensor>& outs,
              const std::vector<Tensor>& logsumexps, const Tensor& logsumexp,
              const std::vector<std::optional<Tensor>>& grad_outs,
              const std::vector<std::optional<Tensor>>& grad_logsumexps) {
  const Shape shape(grad_out);
  const size_t shards = logsumexps.size();
  bool wants_lses = false;
  std::vector<Rows<T>> to(shards);
  std::vector<float*> lse_to(shards);
  for (size_t s = 0; s < shards; ++s) {
    if (grad_outs[s]) to[s] = Rows<T>(*grad_outs[s]);
    if (!grad_logsumexps[s]) continue;
    wants_lses = true;
    lse_to[s] = mutable_data<float>(*grad_logsumexps[s]);
  }
  const float* total = const_data<float>(logsumexp);
  const float* grad_total = grad_logsumexp ? const_data<float>(*grad_logsumexp) : nullptr;
  const Rows<const T> grad(grad_out);
  std::vector<Rows<const T>> rows;
  if (wants_lses) rows = std::vector<Rows<const T>>(outs.begin(), outs.end());
  std::vector<const float*> lses;
  for (const Tensor& t : logsumexps) lses.push_back(const_data<float>(t));

  for_blocks(shape, [&] {
    const size_t floats = static_cast<size_t>(shape.heads) * shards * kLanes;
    return [&, weights = std::vector<float>(floats), dots = std::vector<float>(wants_lses ? floats : 0)](
               int64_t b, int64_t first, int lanes) mutable {
      for (int64_t h = 0; h < shape.heads; ++h) {
        const int64_t offset = shape.lse_row(b, h) + first;
        float* w = weights.data() + static_cast<size_t>(h) * shards * kLanes;
        // exp(lse - total), which is the softmax of the logsumexps but for the rounding of the total: that is as large
        // as the last place of a large number, and divided out. NaN where one of them is +inf.
        const Vec all = load_first(total + offset, lanes);
        Vec sum = zero();
        for (size_t s = 0; s < shards; ++s) {
          const Vec lse = load_first(lses[s] + offset, lanes);
          const Vec e = select(lse == Vec(-kInfinity), zero(), simd::exp(lse - all));
          sum += e;
          store(w + s * kLanes, e);
        }
        const Vec inverse = select(all == Vec(kInfinity), Vec(kNaN), 1.0f / sum);
        for (size_t s = 0; s < shards; ++s)
          store(w + s * kLanes, mark_absent(load_first(lses[s] + offset, lanes), load(w + s * kLanes) * inverse));
      }
      for (int i = 0; i < lanes; ++i) {
        for (int64_t h = 0; h < shape.heads; ++h) {
          const T* g = grad.at(b, h, first + i);
          for (size_t s = 0; s < shards; ++s) {
            const size_t at = (static_cast<size_t>(h) * shards + s) * kLanes + static_cast<size_t>(i);
            const float w = weights[at];
            T* grad_row = to[s].data ? to[s].at(b, h, first + i) : nullptr;
            const T* row = wants_lses && !is_absent(w) ? rows[s].at(b, h, first + i) : nullptr;
            Vec dot = zero();
            for (int64_t j = 0; j < shape.dim; j += kLanes) {
              const int width = static_cast<int>(std::min<int64_t>(kLanes, shape.dim - j));
              const Vec x = is_absent(w) ? zero() : load_first(g + j, width);
              if (grad_row) store_first(grad_row + j, is_absent(w) ? zero() : Vec(w) * x, width);
              if (row) dot = fma(x, load_first(row + j, width), dot);
            }
            if (wants_lses) dots[at] = sum_lanes(dot);
          }
        }
      }
      if (!wants_lses) return;
      for (int64_t h = 0; h < shape.heads; ++h) {
        const int64_t offset = shape.lse_row(b, h) + first;
        const size_t base = static_cast<size_t>(h) * shards * kLanes;
        Vec mean = zero();
        const auto absent = [](Vec w) VELM_INLINE_LAMBDA {
          const auto bits = bits_of(w);
          return mask_of(bits == 0x80000000u);
        };
        for (size_t s = 0; s < shards; ++s) {
          const Vec w = load(weights.data() + base + s * kLanes);
          const Vec sum = fma(w, load(dots.data() + base + s * kLanes), mean);
          mean = select(absent(w), mean, sum);
        }
        const Vec shift = (grad_total ? load_first(grad_total + offset, lanes) : zero()) - mean;
        for (size_t s = 0; s < shards; ++s) {
          if (!lse_to[s]) continue;
          const Vec w = load(weights.data() + base + s * kLanes);
          const Vec g = w * (load(dots.data() + base + s * kLanes) + shift);
          store_first(lse_to[s] + offset, select(absent(w), zero(), g), lanes);
        }
      }
    };
  });
}

void merge_attention_forward(std::vector<Tensor> outs, std::vector<Tensor> logsumexps, Tensor out, Tensor logsumexp) {
  with_type(out.scalar_type(), [&](auto t) { forward<decltype(t)>(outs, logsumexps, out, logsumexp); });
}

void merge_attention_backward(Tensor grad_out, std::optional<Tensor> grad_logsumexp, std::vector<Tensor> outs,
                              std::vector<Tensor> logsumexps, Tensor logsumexp,
                              std::vector<std::optional<Tensor>> grad_outs,
                              std::vector<std::optional<Tensor>> grad_logsumexps) {
  with_type(grad_out.scalar_type(), [&](auto t) {
    backward<decltype(t)>(grad_out, grad_logsumexp, outs, logsumexps, logsumexp, grad_outs, grad_logsumexps);
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "merge_attention_forward", merge_attention_forward);
  VELM_KERNEL(m, "merge_attention_backward", merge_attention_backward);
}

}  // namespace
}  // namespace velm
