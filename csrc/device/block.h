// A block of kernels that multiply tiles: four warps, each with 16 rows of a tile.
#pragma once

#include "device/language.h"

namespace velm::device {

constexpr int kThreads = 128, kWarps = kThreads / 32;
// A warp has 16 rows of a tile, as many as a matrix instruction.
constexpr int kRows = 16 * kWarps;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

}  // namespace velm::device
