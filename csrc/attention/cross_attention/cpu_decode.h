// The forward pass where the rows that share a key head are too few to fill the lanes of a panel: as when a text is
// generated token by token.
#pragma once

#include <cstdint>

#include "attention/cross_attention/cpu_problem.h"

namespace velm::attention {

// At eight rows panels were the faster ones where that was measured, with AVX-512.
inline constexpr int kDecodeRows = 8;

// Whether decode computes batch entry b.
inline bool decodes(const Problem& p, int64_t b) {
  return !p.on_grid && p.group * p.query_count(b) <= kDecodeRows;
}

// Writes out rows and logsumexp of all batch entries for which `decodes` holds.
void decode(const Problem& p, const Rows& out, float* logsumexp);

}  // namespace velm::attention
