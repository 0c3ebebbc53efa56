#pragma once

#include <cstddef>
#include <optional>

namespace velm::facts {

// What this processor can do at most, measured: the limits that benchmarks compare with. Each runs `threads` threads
// for about `seconds` and returns the best of several rounds.

// fp32 multiply-adds from registers with the widest vectors of this processor, in floating-point operations per second.
double peak_fp32(int threads, double seconds);

// The same for products of bf16 pairs added to fp32 (vdpbf16ps), or nothing where the processor does not have them.
std::optional<double> peak_bf16(int threads, double seconds);

// Bytes read plus bytes written a second by a copy of `bytes` bytes.
double copy_bandwidth(int threads, std::size_t bytes, double seconds);

}  // namespace velm::facts
