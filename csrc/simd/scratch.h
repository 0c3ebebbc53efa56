// Temporary memory of a worker: aligned, uninitialised, freed at the end of its range of items.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace velm::simd {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (void* p : blocks_) std::free(p);
  }

  template <class T = float>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count < 1 ? 1 : count) * sizeof(T) + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    blocks_.push_back(p);
    return static_cast<T*>(p);
  }

 private:
  std::vector<void*> blocks_;
};

}  // namespace velm::simd
