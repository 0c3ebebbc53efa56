// Products of matrices that are read through a Source, with a callback that receives the result block by block.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "linear/linear/cpu_elementwise.h"
#include "simd/layout.h"

namespace velm::linear {

using simd::divide_up;
using simd::round_up;

// Rows of one partial sum of a bias gradient.
inline constexpr int64_t kSumRows = 64;

// Uninitialised memory aligned to cache lines.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : memory_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(n + 16), std::align_val_t{64}))) {}
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
};

// A reference to a callable that outlives it.
template <class Signature>
class FunctionRef;
template <class... Args>
class FunctionRef<void(Args...)> {
 public:
  template <class F>
  FunctionRef(const F& f)  // NOLINT: implicit, like std::function
      : object_(&f), call_([](const void* object, Args... args) { (*static_cast<const F*>(object))(args...); }) {}
  void operator()(Args... args) const { call_(object_, args...); }

 private:
  const void* object_;
  void (*call_)(const void*, Args...);
};

// (c, stride, row, rows, column, columns): every block of the result arrives once, from any thread.
using Finish = FunctionRef<void(const float*, int64_t, int64_t, int64_t, int64_t, int64_t)>;

// Operands are rounded to bfloat16 and multiplied as pairs where the processor has an instruction for that; otherwise
// the multiplication is fp32.
enum class Precision { kFp32, kBf16 };

// a (rows, depth) times b (columns, depth)^T: the forward product.
void multiply_transposed(Precision precision, const Source& a, const Source& b, int64_t rows, int64_t columns,
                         int64_t depth, Finish finish);

// a (rows, depth) times b (depth, columns): the gradient of the input.
void multiply_plain(Precision precision, const Source& a, const Source& b, int64_t rows, int64_t columns, int64_t depth,
                    Finish finish);

// a (depth, rows)^T times b (depth, columns): the gradient of the weight. Done in slabs of the depth: finish gets every
// block once a slab, with the slab's number as its first argument. If sums is given, a's sums over the depth are added.
using FinishSlab = FunctionRef<void(int64_t, const float*, int64_t, int64_t, int64_t, int64_t, int64_t)>;
int64_t depth_slabs(int64_t depth);
void multiply_over_rows(Precision precision, const Source& a, const Source& b, int64_t rows, int64_t columns,
                        int64_t depth, double* sums, FinishSlab finish);

// a (rows, depth) times b (columns, depth)^T for few rows of a: nothing is packed, b is read once.
inline constexpr int64_t kFewRows = 32;
void multiply_few_rows(const Tensor& a, const Tensor& b, Finish finish);

}  // namespace velm::linear
