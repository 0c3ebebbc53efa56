// multiscale_deformable_attention on a CUDA device: what the operator hands to the kernels.
#pragma once

#include <algorithm>

#include "device/view.h"

namespace velm::cuda {

using device::Stream;
using device::View;

// out[b, q, h] = the sum over levels and points of weight * bilinear(value of the level and head, location).
struct Deformable {
  int64_t batch, tokens, heads, d, queries, levels, points;
  // (batch, tokens, heads, d), last stride 1.
  View value;
  // int64 (levels, 2) of height and width; (batch, queries, heads, levels, points), for locations times (x, y), in any
  // type of numbers. All contiguous and flat.
  View shapes, locations, weights;
  // (batch, queries, heads, d), contiguous.
  View out, grad;
  // Those that are wanted: contiguous, in the order of what they are the gradients of.
  View grad_value, grad_locations, grad_weights;
  // For the gradient of value: int32 (batch, heads, cells, chunks), zeros; float (batch, heads, levels, queries *
  // points, 4).
  View counts, placed;

  // Samples of one head that read one level.
  int64_t of_level() const { return queries * points; }
  // A cell lies between four tokens, of which those outside of a level are zeros: a level has (height + 1) * (width +
  // 1) of them. The sizes of levels are known on the device alone, but there are no more than these.
  int64_t cells() const { return 2 * (tokens + levels); }
  // Runs of samples that are counted side by side. The results are the same for any number.
  int64_t chunks() const { return std::clamp<int64_t>(of_level() / 512, 1, 16); }
};

void deformable_forward(const Deformable& problem, Stream stream);
// The gradients of locations and weights.
void deformable_samples_backward(const Deformable& problem, Stream stream);
// The gradient of value.
void deformable_value_backward(const Deformable& problem, Stream stream);

}  // namespace velm::cuda
