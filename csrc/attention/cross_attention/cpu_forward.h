#pragma once

#include <functional>
#include <vector>

#include "attention/cross_attention/cpu_problem.h"

namespace velm::attention {

// Writes out rows and logsumexp (times nothing: natural units) for every query, and unless it is null
// key_mass[row of mass_index] = sum over queries of the attention weights before dropout.
void forward(const Problem& p, const Rows& out, float* logsumexp, float* key_mass);

// The key mass of the batch entries that are wanted, from scores computed once more.
void sum_key_mass(const Problem& p, const float* logsumexp, float* key_mass,
                  const std::function<bool(int64_t)>& wanted);

// For each row of logsumexp one over the sum of what exp(score - logsumexp) gives: that is 1, but for rows whose
// logsumexp is so large that it has lost the logarithm of the sum, as those are that a finite bias hides altogether.
// Empty where there are none.
std::vector<float> inverse_sums(const Problem& p, const float* logsumexp, const std::function<bool(int64_t)>& wanted);

}  // namespace velm::attention
