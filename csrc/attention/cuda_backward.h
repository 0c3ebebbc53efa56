// The backward pass of attention on a CUDA device, and what else is computed from the weights once more: the attention
// that each key received.
#pragma once

#include "attention/cuda_problem.h"

namespace velm::cuda {

struct AttentionBackward : Attention {
  View out, grad_out;
  // Floats of rows, as the forward pass leaves them; `delta` and `shift` are filled by attention_delta.
  View logsumexp, delta, shift;
  // (batch, heads, queries, 1), or null.
  View grad_logsumexp;
  // Null gradients are not wanted. Where that of queries or keys goes on through a norm it is in float32.
  View grad_query, grad_key, grad_value;
  // Contiguous, in the type of the bias; zeros before.
  View grad_bias;
};

// With p the weights and dp = grad_out . value the gradient of a score is p * (dp - delta), where delta = sum of p dp -
// grad_logsumexp of each row. 0 for a row that sees nothing.
//
// The sum is that of grad_out * out too (Dao et al., 2022), but of an output that was rounded: in a row whose weight is
// nearly all on one key dp - delta is much smaller than either, and of 16 bits nothing but the rounding is left. So it
// is made of the very products that it is subtracted from, where that costs little (attention_sums_rows): two products
// more for each tile of scores, beside the eight of the gradients.
//
// A weight is exp(score - logsumexp), and a float as large as 32 is rounded by up to 2e-6, which is then that of all
// weights of the row. `shift` is what is missing, in base 2, so that weights sum up to 1; 0 where the sums are not
// made.
void attention_delta(const AttentionBackward& problem, Stream stream);
// Whether it is: where all rows of a key head fit in a block, or all keys in a few tiles.
inline bool attention_sums_rows(const AttentionBackward& p) {
  return p.heads() / p.kv_heads() * p.longest_queries <= 64 || p.longest_keys <= 256;
}
// These need delta and shift.
// Also the gradient of the bias, which here must broadcast nowhere.
void attention_grad_query(const AttentionBackward& problem, Stream stream);
void attention_grad_key(const AttentionBackward& problem, Stream stream);
void attention_grad_value(const AttentionBackward& problem, Stream stream);
// Of any bias; with as many floats as attention_bias_partials says.
void attention_grad_bias(const AttentionBackward& problem, const View& partials, Stream stream);
int64_t attention_bias_partials(const AttentionBackward& problem);

// Floats (batch, heads, keys), or (heads, keys) of packed sequences; with what attention_forward leaves.
void attention_key_mass(const Attention& problem, const View& logsumexp, const View& shift, const View& key_mass,
                        Stream stream);

}  // namespace velm::cuda
