// For each row the most similar of others: a product whose rows are reduced where they are computed.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "common/tensor.h"
#include "simd/parallel.h"
#include "simd/product.h"
#include "simd/scratch.h"

namespace velm {
namespace {

using namespace simd;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Columns of the product that are computed together, and rows of a that share a panel of b while it is in the cache.
constexpr int64_t kPanel = 2 * kLanes, kBlock = 8 * kTileRows<2>;

// Rows as float32, one behind the other.
using Pack = void (*)(float* to, const void* from, int64_t row_stride, int64_t rows, int64_t dim);

template <class T>
void pack(float* to, const void* from, int64_t row_stride, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = static_cast<const T*>(from) + r * row_stride;
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) store(to + r * dim + c, load(row + c));
    if (const int left = static_cast<int>(dim - c); left > 0)
      store_first(to + r * dim + c, load_first(row + c, left), left);
  }
}

// One over the norm of a row; 0 for a row of zeros.
float inverse_norm(const float* row, int64_t dim) {
  Vec sum = zero();
  for (int64_t c = 0; c < dim; c += kLanes) {
    const Vec x = load_first(row + c, static_cast<int>(std::min<int64_t>(dim - c, kLanes)));
    sum = fma(x, x, sum);
  }
  const float total = sum_lanes(sum);
  return total == 0.0f ? 0.0f : 1.0f / std::sqrt(total);
}

// The rows of a tensor (batch, rows, dim), as float32.
struct Source {
  const char* data;
  Pack pack;
  int64_t element, batch_stride, row_stride, rows, dim;

  explicit Source(const Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())),
        element(t.element_size()),
        batch_stride(t.stride(0)),
        row_stride(t.stride(1)),
        rows(t.size(1)),
        dim(t.size(2)) {
    with_type(t.scalar_type(), [&](auto value) { pack = &velm::pack<decltype(value)>; });
  }

  void read(float* to, int64_t batch, int64_t first, int64_t count) const {
    pack(to, data + (batch * batch_stride + first * row_stride) * element, row_stride, count, dim);
  }
};

// b as panels of kPanel columns that are its rows, zeros behind the last, and one over the norm of each.
struct Panels {
  int64_t count, dim;
  float *values, *factors;

  float* panel(int64_t batch, int64_t p) const { return values + (batch * count + p) * dim * kPanel; }
  float* factor(int64_t batch, int64_t p) const { return factors + (batch * count + p) * kPanel; }
};

// The best of each lane of a row so far: rows of panels rise, so that the first of equal ones stays.
struct Best {
  float value[kLanes], column[kLanes];
};

class Matcher {
 public:
  Matcher(const Source& a, const Panels& b, int64_t columns, float* similarity, int32_t* best)
      : a_(a),
        columns_(columns),
        b_(b),
        similarity_(similarity),
        best_(best),
        packed_(memory_.take(kBlock * b.dim)),
        scores_(memory_.take(kBlock * kPanel)),
        state_(memory_.take<Best>(kBlock)) {}

  void operator()(int64_t batch, int64_t first) {
    const int64_t rows = std::min(a_.rows - first, kBlock);
    a_.read(packed_, batch, first, rows);
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(state_[r].value, kLanes, -kInfinity);
      std::fill_n(state_[r].column, kLanes, 0.0f);
    }
    for (int64_t p = 0; p < b_.count; ++p) {
      product<2, false, Start::zero_scale_product>(scores_, kPanel, rows, packed_, b_.dim, b_.dim, b_.panel(batch, p),
                                                   kPanel, b_.factor(batch, p));
      for (int64_t r = 0; r < rows; ++r) compare(state_[r], scores_ + r * kPanel, p * kPanel);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float most = -kInfinity, column = 0.0f;
      for (int i = 0; i < kLanes; ++i) {
        const float value = state_[r].value[i], at = state_[r].column[i];
        if (value > most || (value == most && at < column)) most = value, column = at;
      }
      const float scaled = most * inverse_norm(packed_ + r * b_.dim, b_.dim);
      similarity_[batch * a_.rows + first + r] = scaled == scaled ? scaled : -kInfinity;
      best_[batch * a_.rows + first + r] = static_cast<int32_t>(column);
    }
  }

 private:
  void compare(Best& best, const float* scores, int64_t first) const {
    Vec value = load(best.value), column = load(best.column);
    for (int v = 0; v < 2; ++v) {
      const Vec here = stdx::static_simd_cast<Vec>(lane_index()) + static_cast<float>(first + v * kLanes);
      const Vec score = load(scores + v * kLanes);
      // NaN is never more.
      const VecMask more = score > value && here < Vec(static_cast<float>(columns_));
      value = select(more, score, value);
      column = select(more, here, column);
    }
    store(best.value, value);
    store(best.column, column);
  }

  const Source& a_;
  const int64_t columns_;
  const Panels& b_;
  float* similarity_;
  int32_t* best_;
  Scratch memory_;
  float *packed_, *scores_;
  Best* state_;
};

void match_rows(Tensor a, Tensor b, Tensor similarity, Tensor best) {
  const int64_t batch = a.size(0), rows = a.size(1), columns = b.size(1), dim = a.size(2);
  const Source from_a(a), from_b(b);
  Scratch memory;
  Panels panels{(columns + kPanel - 1) / kPanel, dim, nullptr, nullptr};
  panels.values = memory.take(batch * panels.count * dim * kPanel);
  panels.factors = memory.take(batch * panels.count * kPanel);
  parallel_ranges(batch * panels.count, 1, [&](int64_t begin, int64_t end) {
    Scratch of_thread;
    float* packed = of_thread.take(kPanel * dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / panels.count, p = i % panels.count;
      const int64_t count = std::min(columns - p * kPanel, kPanel);
      from_b.read(packed, n, p * kPanel, count);
      if (count <= kLanes) std::fill_n(panels.panel(n, p), dim * kPanel, 0.0f);
      transpose_to(panels.panel(n, p), kPanel, packed, dim, count, dim);
      for (int64_t c = 0; c < kPanel; ++c)
        panels.factor(n, p)[c] = c < count ? inverse_norm(packed + c * dim, dim) : 0.0f;
    }
  });
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  parallel_workers(
      batch * blocks,
      [&] {
        return std::make_unique<Matcher>(from_a, panels, columns, mutable_data<float>(similarity),
                                         mutable_data<int32_t>(best));
      },
      [&](auto& matcher, int64_t i) { (*matcher)(i / blocks, i % blocks * kBlock); });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "match_rows_forward", match_rows);
}

}  // namespace
}  // namespace velm
