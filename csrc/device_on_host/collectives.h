// What the lanes of a warp hand over when they meet in an instruction; results are written back into each lane's own.
#pragma once

#include <cstdint>

namespace device_on_host __attribute__((visibility("default"))) {

  enum class ShuffleKind : uint8_t { index, up, down, butterfly };

  struct Shuffle {
    ShuffleKind kind;
    int operand, width;
    uint64_t value, result;
  };

  enum class VoteKind : uint8_t { ballot, all, any };

  struct Vote {
    VoteKind kind;
    bool predicate;
    uint32_t result;
  };

  struct Match {
    bool all;
    uint64_t value;
    uint32_t result;
  };

  enum class ReduceKind : uint8_t { add, minimum, maximum, minimum_signed, maximum_signed, bit_and, bit_or, bit_xor };

  struct Reduce {
    ReduceKind kind;
    uint32_t value, result;
  };

  enum class MatrixShape : uint8_t {
    m16n8k16_f16,
    m16n8k16_bf16,
    m16n8k8_f16,
    m16n8k8_bf16,
    m16n8k8_tf32,
    m16n8k4_tf32
  };

  struct Matrix {
    MatrixShape shape;
    float* d;
    const uint32_t *a, *b;
  };

  struct LoadMatrix {
    // Null in a lane whose address the instruction does not use.
    const void* row;
    uint32_t* result;
    uint8_t count;
    bool transposed;
  };

}  // namespace device_on_host
