// Bilinear attention on a CUDA device: what the operators hand to the kernels.
#pragma once

#include "device/view.h"

namespace velm::cuda {

using device::Dtype;
using device::Stream;
using device::View;

// Regions or words, (batch, rows, k); the last stride is 1. Which rows count: lengths (batch,) of 32 bits and a mask
// (batch, rows) of a byte, either or both.
struct PairSide {
  View x;
  View lengths, mask;

  int64_t rows() const { return x.size[2]; }
};

struct Pairs {
  int64_t glimpses;
  PairSide v, q;

  Dtype dtype() const { return v.x.dtype; }
  int64_t batch() const { return v.x.size[1]; }
  int64_t k() const { return v.x.size[3]; }
  int64_t count() const { return batch() * glimpses * v.rows() * q.rows(); }
};

// sums[b, g, i, j] = sum_k h[g, k] v[b, i, k] q[b, j, k], of every part of the k one after another in float32; h is
// (glimpses, k) or (batch, glimpses, k).
int64_t pair_score_parts(const Pairs& pairs);
void pair_scores(const Pairs& pairs, const View& h, const View& sums, Stream stream);

// Adds up the parts, which it changes, and the bias (glimpses,). logits: these, -inf for what does not count; maps:
// their softmax over all pairs. Either may be missing; without maps what does not count is 0.
struct PairMaps {
  View sums, bias, maps, logits;
};
void pair_maps(const Pairs& pairs, const PairMaps& p, Stream stream);

// From the gradients of maps and of logits, either of which may be missing, that of the logits before the softmax, and
// for each entry of the batch and glimpse the sum of grad_logits in float32.
struct PairSlopes {
  View maps, grad_maps, grad_logits, slopes, of_bias;
};
void pair_slopes(const Pairs& pairs, const PairSlopes& p, Stream stream);

// With t[b, g, i, k] = sum_j weights[b, g, i, j] q[b, j, k]: grad[b, i, k] = sum_g h[g, k] t, for v, and
// joint[n, b, g, k] = sum_i v[b, i, k] t over the rows of piece n, in float32 or, where there is one piece, as
// elements. Otherwise with v and q exchanged, and without joint.
struct PairProducts {
  bool of_v;
  View weights, h, grad, joint;
};
int64_t pair_joint_pieces(const Pairs& pairs);
void pair_products(const Pairs& pairs, const PairProducts& p, Stream stream);

}  // namespace velm::cuda
