// Matrix instructions of a warp. A fragment is the part of a matrix that one lane holds, laid out as in the PTX ISA,
// "Matrix Fragments for mma": with group = lane / 4 and member = lane % 4, lane holds of D (16 x 8) the rows group and
// group + 8, columns 2 * member and 2 * member + 1.
#pragma once

#include "device/language.h"

namespace velm::device {

// d += a b for a (16 x 16, by rows) and b (16 x 8, by columns) of T, sums in float.
template <class T>
DEVICE_INLINE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// The same for a (16 x 8) and b (8 x 8).
template <class T>
DEVICE_INLINE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);
// For a (16 x 8) and b (8 x 8) of tf32: floats of which the lower 13 bits are not used; to_tf32 rounds.
DEVICE_INLINE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
DEVICE_INLINE uint32_t to_tf32(float x);

// Loads Count matrices of 8 rows of 8 elements of 16 bits from shared memory; lane i of 8 j <= i < 8 j + 8 gives the
// address of row i - 8 j of matrix j, aligned to 16 bytes. registers[j] gets the elements 2 * (lane % 4) and the next
// of row lane / 4 of matrix j, as A and D are laid out; transposed, of column lane / 4, as B is.
template <int Count, class T>
DEVICE_INLINE void ldmatrix(uint32_t (&registers)[Count], const Shared<T>& row);
template <int Count, class T>
DEVICE_INLINE void ldmatrix_transposed(uint32_t (&registers)[Count], const Shared<T>& row);

#if defined(__CUDACC__)

template <>
DEVICE_INLINE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DEVICE_INLINE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DEVICE_INLINE void mma_m16n8k8<__half>(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
template <>
DEVICE_INLINE void mma_m16n8k8<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
DEVICE_INLINE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE_INLINE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

template <int Count, class T>
DEVICE_INLINE void ldmatrix(uint32_t (&r)[Count], T* const& row) {
  static_assert(sizeof(T) == 2 && (Count == 1 || Count == 2 || Count == 4));
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
template <int Count, class T>
DEVICE_INLINE void ldmatrix_transposed(uint32_t (&r)[Count], T* const& row) {
  static_assert(sizeof(T) == 2 && (Count == 1 || Count == 2 || Count == 4));
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

#else

inline void mma_on_host(device_on_host::MatrixShape shape, float* d, const uint32_t* a, const uint32_t* b) {
  device_on_host::Matrix m{shape, d, a, b};
  device_on_host::collective(device_on_host::Collective::mma, ~0u, &m);
}

template <>
DEVICE_INLINE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_on_host(device_on_host::MatrixShape::m16n8k16_f16, d, a, b);
}
template <>
DEVICE_INLINE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_on_host(device_on_host::MatrixShape::m16n8k16_bf16, d, a, b);
}
template <>
DEVICE_INLINE void mma_m16n8k8<__half>(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  mma_on_host(device_on_host::MatrixShape::m16n8k8_f16, d, a, b);
}
template <>
DEVICE_INLINE void mma_m16n8k8<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  mma_on_host(device_on_host::MatrixShape::m16n8k8_bf16, d, a, b);
}
DEVICE_INLINE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_on_host(device_on_host::MatrixShape::m16n8k8_tf32, d, a, b);
}
DEVICE_INLINE uint32_t to_tf32(float x) {
  return device_on_host::float_to_tf32(x);
}

template <int Count, class T>
inline void ldmatrix_on_host(uint32_t (&registers)[Count], const Shared<T>& row, bool transposed) {
  static_assert(sizeof(T) == 2 && (Count == 1 || Count == 2 || Count == 4));
  using namespace device_on_host;
  // The addresses of the other lanes are not used.
  const bool is_read = self->lane < 8 * Count;
  if (is_read) check_matrix_row(row.raw(), row.extent());
  LoadMatrix load{is_read ? row.raw() : nullptr, registers, Count, transposed};
  collective(Collective::ldmatrix, ~0u, &load);
}
template <int Count, class T>
DEVICE_INLINE void ldmatrix(uint32_t (&registers)[Count], const Shared<T>& row) {
  ldmatrix_on_host<Count, T>(registers, row, false);
}
template <int Count, class T>
DEVICE_INLINE void ldmatrix_transposed(uint32_t (&registers)[Count], const Shared<T>& row) {
  ldmatrix_on_host<Count, T>(registers, row, true);
}

#endif

}  // namespace velm::device
