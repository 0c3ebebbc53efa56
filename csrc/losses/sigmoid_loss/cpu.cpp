// The pass over one tile of scores between torch's products: the loss of every pair of rows, summed over columns, and
// the gradient of the scores in their place.
//
// A tile is (images, texts), contiguous, float32 or bfloat16, of products x; its scores are z = scale * x + bias. Image
// i of the tile and text i + diagonal belong together, or those with the same label.

#include <algorithm>
#include <cmath>

#include "losses/cpu_tiles.h"
#include "simd/parallel.h"

namespace velm {
namespace {

using namespace simd;
using Optional = std::optional<Tensor>;

// log(1 + u) for u in [0, 1], relative to the result: 2 atanh(u / (2 + u)).
VELM_INLINE Vec log1p_of_part(Vec u) {
  const Vec t = u / (u + 2.0f), t2 = t * t;
  return 2.0f * t * polynomial(t2, 1.0f / 15, 1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f);
}

// log(1 + e^z) and its derivative.
VELM_INLINE void softplus(Vec z, Vec& value, Vec& slope) {
  const Vec e = exp(-stdx::fabs(z)), whole = 1.0f / (e + 1.0f);
  value = log1p_of_part(e) + maximum(z, zero());
  slope = select(z > zero(), whole, e * whole);
}

struct Row {
  float weight;
  int64_t pair;  // its column in the tile, or -1
  uint32_t label;
};

// Returns the sum of losses and that of gradients.
template <class T, bool kLabels, bool kGradients>
void pass(T* at, int64_t columns, float scale, float bias, const Row& row, const uint32_t* labels, float* loss,
          float* sum) {
  float of_pair = 0.0f, slope_of_pair = 0.0f;
  if (row.pair >= 0) {
    Vec value, slope;
    softplus(-Vec(scale * to_float(at[row.pair]) + bias), value, slope);
    of_pair = value[0];
    slope_of_pair = -slope[0] * row.weight;
  }
  // Among the others it is one that never matches.
  const int64_t with_pair = row.pair < 0 ? -1 : row.pair / kLanes * kLanes;
  const VecMask of_others = stdx::static_simd_cast<Vec>(lane_index()) != Vec(static_cast<float>(row.pair - with_pair));
  const Vec s(scale), b(bias), weight(row.weight);
  Vec losses = zero(), gradients = zero();
  for_columns(columns, [&](int64_t j, auto n) VELM_INLINE_LAMBDA {
    Vec z = scores(at + j, s, b, n), value, slope;
    if (j == with_pair) z = select(of_others, z, Vec(-kInfinity));
    VecMask mine{};
    if constexpr (kLabels) {
      mine = same_label(labels + j, row.label, columns - j);
      z = select(mine, -z, z);
    }
    softplus(z, value, slope);
    losses += value;
    if constexpr (kGradients) {
      slope *= weight;
      if constexpr (kLabels) slope = select(mine, -slope, slope);
      gradients += slope;
      store_some(at + j, slope, n);
    }
  });
  *loss += sum_lanes(losses) + of_pair;
  if constexpr (kGradients) {
    *sum += sum_lanes(gradients) + slope_of_pair;
    if (row.pair >= 0) store_scalar(at + row.pair, slope_of_pair);
  }
}

void sigmoid_pass(Tensor tile, Tensor scale, Optional bias, int64_t diagonal, Optional row_labels,
                  Optional column_labels, Optional weights, bool gradients, Tensor sums) {
  const int64_t rows = tile.size(0), columns = tile.size(1);
  const float s = *const_data<float>(scale), b = bias ? *const_data<float>(*bias) : 0.0f;
  const auto* of_rows = row_labels ? const_data<uint32_t>(*row_labels) : nullptr;
  const auto* of_columns = column_labels ? const_data<uint32_t>(*column_labels) : nullptr;
  const float* weight = weights ? const_data<float>(*weights) : nullptr;
  float *losses = mutable_data<float>(sums), *of_gradients = losses + sums.stride(0);
  with_tile(tile, [&](auto* data) {
    parallel_ranges(rows, 8192 / std::max<int64_t>(1, columns), [&](int64_t begin, int64_t end) {
      const FlushSubnormals quick;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = i + diagonal;
        const Row row{weight ? weight[i] : 1.0f, !of_rows && pair >= 0 && pair < columns ? pair : -1,
                      // What has no label is like nothing, -1 itself included.
                      of_rows ? std::min(of_rows[i], 0xfffffffeu) : 0u};
        auto* at = data + i * columns;
        using T = std::remove_pointer_t<decltype(at)>;
        if (of_rows && gradients)
          pass<T, true, true>(at, columns, s, b, row, of_columns, losses + i, of_gradients + i);
        else if (of_rows)
          pass<T, true, false>(at, columns, s, b, row, of_columns, losses + i, of_gradients + i);
        else if (gradients)
          pass<T, false, true>(at, columns, s, b, row, nullptr, losses + i, of_gradients + i);
        else
          pass<T, false, false>(at, columns, s, b, row, nullptr, losses + i, of_gradients + i);
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(VELM_NAMESPACE, CPU, m) {
  VELM_KERNEL(m, "sigmoid_pass", sigmoid_pass);
}

}  // namespace
}  // namespace velm
