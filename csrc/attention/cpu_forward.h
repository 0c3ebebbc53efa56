#pragma once

#include "attention/cpu_problem.h"

namespace velm::attention {

// Writes out rows and logsumexp (times nothing: natural units) for every query.
void forward(const Problem& p, const Rows& out, float* logsumexp);

// key_mass[row of mass_index] = sum over queries of the attention weights before dropout.
void sum_key_mass(const Problem& p, const float* logsumexp, float* key_mass);

}  // namespace velm::attention
