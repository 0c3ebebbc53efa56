// Tensors of random numbers for the tests of kernels, and how near to a double a result has to be.
#pragma once

#include <cmath>

#include "device/numbers.h"
#include "tests/device_on_host/testing.h"

namespace testing {

template <class T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& x : values) x = velm::device::from_float<T>(random_number());
  return values;
}

inline bool close(double a, double b) {
  return std::abs(a - b) <= 1e-2 * (1 + std::abs(b));
}

}  // namespace testing
