// The language of CUDA kernels for a C++ compiler: qualifiers, indices, the intrinsics of threads, warps and blocks.
// Included by device/language.h in place of NVIDIA's headers.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device_on_host/collectives.h"
#include "device_on_host/memory.h"
#include "device_on_host/numbers.h"
#include "device_on_host/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// A variable of this kind would be one for each thread here.
#define __shared__ use_static_shared_or_dynamic_shared_instead

#define threadIdx (::device_on_host::self->thread_index)
#define blockIdx (::device_on_host::block_index())
#define blockDim (::device_on_host::block_size())
#define gridDim (::device_on_host::grid_size())
constexpr int warpSize = 32;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// barriers and fences

inline void __syncthreads() {
  device_on_host::barrier_wait(0, -1, false, true);
}
inline int __syncthreads_count(int predicate) {
  return device_on_host::barrier_wait(0, -1, predicate, true);
}
inline int __syncthreads_or(int predicate) {
  return device_on_host::barrier_wait(0, -1, predicate, true) > 0;
}
inline int __syncthreads_and(int predicate) {
  return device_on_host::barrier_wait(0, -1, !predicate, true) == 0;
}
inline void __syncwarp(unsigned mask = ~0u) {
  device_on_host::collective(device_on_host::Collective::syncwarp, mask, nullptr);
}
// Atomics order memory here, so a fence has nothing left to do; that one is missing is not found.
inline void __threadfence_block() {
  asm volatile("" ::: "memory");
}
inline void __threadfence() {
  asm volatile("" ::: "memory");
}
[[noreturn]] inline void __trap() {
  device_on_host::fail("__trap");
}

// shuffles, votes, matches, reductions

namespace device_on_host {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T shuffle(ShuffleKind kind, unsigned mask, T value, int operand, int width) {
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    fail("__shfl_sync of width " + std::to_string(width) + ": expected a power of two up to 32");
  Shuffle s{kind, operand, width, to_bits(value), 0};
  collective(Collective::shuffle, mask, &s);
  std::memcpy(&value, &s.result, sizeof(T));
  return value;
}

inline uint32_t vote(VoteKind kind, unsigned mask, bool predicate) {
  Vote v{kind, predicate, 0};
  collective(Collective::vote, mask, &v);
  return v.result;
}

template <class T>
T reduce(ReduceKind kind, unsigned mask, T value) {
  static_assert(sizeof(T) == 4);
  Reduce r{kind, static_cast<uint32_t>(value), 0};
  collective(Collective::reduce, mask, &r);
  return static_cast<T>(r.result);
}

}  // namespace device_on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return device_on_host::shuffle(device_on_host::ShuffleKind::index, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return device_on_host::shuffle(device_on_host::ShuffleKind::up, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return device_on_host::shuffle(device_on_host::ShuffleKind::down, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return device_on_host::shuffle(device_on_host::ShuffleKind::butterfly, mask, value, lane_mask, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return device_on_host::vote(device_on_host::VoteKind::ballot, mask, predicate);
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(device_on_host::vote(device_on_host::VoteKind::all, mask, predicate));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(device_on_host::vote(device_on_host::VoteKind::any, mask, predicate));
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  device_on_host::Match m{false, device_on_host::to_bits(value), 0};
  device_on_host::collective(device_on_host::Collective::match, mask, &m);
  return m.result;
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all) {
  device_on_host::Match m{true, device_on_host::to_bits(value), 0};
  device_on_host::collective(device_on_host::Collective::match, mask, &m);
  *all = m.result != 0;
  return m.result;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return device_on_host::reduce(device_on_host::ReduceKind::add, mask, value);
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return device_on_host::reduce(device_on_host::ReduceKind::add, mask, value);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return device_on_host::reduce(device_on_host::ReduceKind::minimum, mask, value);
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return device_on_host::reduce(device_on_host::ReduceKind::minimum_signed, mask, value);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return device_on_host::reduce(device_on_host::ReduceKind::maximum, mask, value);
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return device_on_host::reduce(device_on_host::ReduceKind::maximum_signed, mask, value);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return device_on_host::reduce(device_on_host::ReduceKind::bit_and, mask, value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return device_on_host::reduce(device_on_host::ReduceKind::bit_or, mask, value);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return device_on_host::reduce(device_on_host::ReduceKind::bit_xor, mask, value);
}

// atomics: of host threads too, since blocks may run on several

namespace device_on_host {

template <class T, Space S, class F>
T atomic_update(const Pointer<T, S>& p, const F& f) {
  check_access<S>(p.raw(), sizeof(T), sizeof(T), p.extent(), false);
  if constexpr (S == Space::global) self->counters->global_bytes_written += sizeof(T);
  T old, wanted;
  __atomic_load(p.raw(), &old, __ATOMIC_RELAXED);
  do wanted = f(old);
  while (!__atomic_compare_exchange(p.raw(), &old, &wanted, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return old;
}

}  // namespace device_on_host

template <class T, device_on_host::Space S>
T atomicAdd(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T old) { return static_cast<T>(old + value); });
}
template <class T, device_on_host::Space S>
T atomicSub(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T old) { return static_cast<T>(old - value); });
}
template <class T, device_on_host::Space S>
T atomicMax(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T old) { return old > value ? old : value; });
}
template <class T, device_on_host::Space S>
T atomicMin(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T old) { return old < value ? old : value; });
}
template <class T, device_on_host::Space S>
T atomicAnd(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T old) { return old & value; });
}
template <class T, device_on_host::Space S>
T atomicOr(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T old) { return old | value; });
}
template <class T, device_on_host::Space S>
T atomicXor(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T old) { return old ^ value; });
}
template <class T, device_on_host::Space S>
T atomicExch(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T) { return value; });
}
template <class T, device_on_host::Space S>
T atomicCAS(const device_on_host::Pointer<T, S>& p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return device_on_host::atomic_update(p, [=](T old) { return old == expected ? value : old; });
}
template <class T, device_on_host::Space S>
auto __ldg(const device_on_host::Pointer<T, S>& p) {
  return device_on_host::load_checked<std::remove_const_t<T>, S>(p.raw(), p.extent());
}

// arithmetic

inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline float __uint_as_float(uint32_t x) {
  return std::bit_cast<float>(x);
}
inline uint32_t __float_as_uint(float x) {
  return std::bit_cast<uint32_t>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline int __popc(uint32_t x) {
  return std::popcount(x);
}
inline int __clz(uint32_t x) {
  return std::countl_zero(x);
}
inline int __ffs(uint32_t x) {
  return x ? std::countr_zero(x) + 1 : 0;
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}

template <class T>
  requires std::is_arithmetic_v<T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
  requires std::is_arithmetic_v<T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
// Of a number and NaN these are the number, as fminf and fmaxf are.
inline float min(float a, float b) {
  return fminf(a, b);
}
inline float max(float a, float b) {
  return fmaxf(a, b);
}
