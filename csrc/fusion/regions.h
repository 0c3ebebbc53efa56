// How elementwise kernels of CUDA over (batch, regions, dim) divide the regions of an entry among blocks.
#pragma once

#include <cstdint>

namespace velm::cuda {

// Regions that a block goes through. Sums over the regions of an entry are left by each block in parts, and added.
constexpr int64_t kRegions = 32;
inline int64_t region_blocks(int64_t regions) {
  return (regions + kRegions - 1) / kRegions;
}

}  // namespace velm::cuda
