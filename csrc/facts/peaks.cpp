#include "facts/peaks.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "facts/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace velm::facts {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Keeps what a measured copy wrote alive.
void consume(const char* written) {
  __asm__ volatile("" : : "g"(written) : "memory");
}

// Every kernel runs `n` steps and returns the operations done. A step updates each accumulator once; there are enough
// of them to cover the latency of the instruction on all its ports, and few enough to stay in registers together with
// the two operands. x = x * 0.999 + 0.001 tends to 1, so that values stay normal for any n.
using Kernel = double (*)(long n);

#if defined(__aarch64__)
#define VELM_VECTOR_REGISTER "w"
#elif defined(__x86_64__)
#define VELM_VECTOR_REGISTER "x"
#else
#define VELM_VECTOR_REGISTER "m"
#endif

typedef float Vec128 __attribute__((vector_size(16)));

// Without a target attribute: whatever the build is for, which is SSE2 on x86 (a product and a sum, no fused form) and
// the 128-bit vectors of other architectures.
double fp32_128(long n) {
  constexpr int accumulators = 12;
  Vec128 a[accumulators];
  for (auto& x : a) x = Vec128{0.1f, 0.2f, 0.3f, 0.4f};
  const Vec128 b = Vec128{} + 0.999f, c = Vec128{} + 0.001f;
  for (long i = 0; i < n; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < accumulators; ++j) a[j] = a[j] * b + c;
  }
#pragma GCC unroll 12
  for (int j = 1; j < accumulators; ++j) a[0] += a[j];
  // A vector register as an operand: taking the address of the array would keep it in memory.
  __asm__ volatile("" : : VELM_VECTOR_REGISTER(a[0]));
  return 2.0 * n * accumulators * 4;
}

#if defined(__x86_64__)

__attribute__((target("avx2,fma"))) double fp32_256(long n) {
  constexpr int accumulators = 14;
  __m256 a[accumulators];
  for (auto& x : a) x = _mm256_set1_ps(0.1f);
  const __m256 b = _mm256_set1_ps(0.999f), c = _mm256_set1_ps(0.001f);
  for (long i = 0; i < n; ++i) {
#pragma GCC unroll 14
    for (int j = 0; j < accumulators; ++j) a[j] = _mm256_fmadd_ps(a[j], b, c);
  }
#pragma GCC unroll 14
  for (int j = 1; j < accumulators; ++j) a[0] += a[j];
  // A vector register as an operand: taking the address of the array would keep it in memory.
  __asm__ volatile("" : : "x"(a[0]));
  return 2.0 * n * accumulators * 8;
}

__attribute__((target("avx512f"))) double fp32_512(long n) {
  constexpr int accumulators = 24;
  __m512 a[accumulators];
  for (auto& x : a) x = _mm512_set1_ps(0.1f);
  const __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.001f);
  for (long i = 0; i < n; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < accumulators; ++j) a[j] = _mm512_fmadd_ps(a[j], b, c);
  }
#pragma GCC unroll 24
  for (int j = 1; j < accumulators; ++j) a[0] += a[j];
  // A vector register as an operand: taking the address of the array would keep it in memory.
  __asm__ volatile("" : : "v"(a[0]));
  return 2.0 * n * accumulators * 16;
}

__attribute__((target("avx512f,avx512bf16"))) double bf16_512(long n) {
  constexpr int accumulators = 24;
  __m512 a[accumulators];
  for (auto& x : a) x = _mm512_set1_ps(0.1f);
  // 2^-30 in every lane (0x3080): the sums grow by 2^-59 per step and stay as they are.
  const __m512bh b = (__m512bh)_mm512_set1_epi16(0x3080);
  for (long i = 0; i < n; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < accumulators; ++j) a[j] = _mm512_dpbf16_ps(a[j], b, b);
  }
#pragma GCC unroll 24
  for (int j = 1; j < accumulators; ++j) a[0] += a[j];
  // A vector register as an operand: taking the address of the array would keep it in memory.
  __asm__ volatile("" : : "v"(a[0]));
  return 2.0 * n * accumulators * 32;
}

#endif

// Runs work(thread) on `threads` threads again and again for `seconds` and returns the sum of what it returned, divided
// by the time until the last thread was done.
double rate(int threads, double seconds, const std::function<double(int)>& work) {
  std::vector<double> done(threads, 0.0);
  std::barrier ready(threads + 1);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      work(t);  // wakes the vector units of the processor and touches memory
      ready.arrive_and_wait();
      const auto start = Clock::now();
      double sum = 0;
      do {
        sum += work(t);
      } while (since(start) < seconds);
      done[t] = sum;
    });
  }
  ready.arrive_and_wait();
  const auto start = Clock::now();
  for (auto& worker : workers) worker.join();
  const double elapsed = since(start);
  double total = 0;
  for (double d : done) total += d;
  return total / elapsed;
}

double best_rate(int threads, double seconds, const std::function<double(int)>& work) {
  constexpr int rounds = 5;
  double best = 0;
  for (int round = 0; round < rounds; ++round) best = std::max(best, rate(threads, seconds / rounds, work));
  return best;
}

double kernel_rate(Kernel kernel, int threads, double seconds) {
  return best_rate(threads, seconds, [kernel](int) { return kernel(20000); });
}

}  // namespace

double peak_fp32(int threads, double seconds) {
  Kernel kernel = fp32_128;
#if defined(__x86_64__)
  if (cpu().has("avx512f"))
    kernel = fp32_512;
  else if (cpu().has("avx2") && cpu().has("fma"))
    kernel = fp32_256;
#endif
  return kernel_rate(kernel, threads, seconds);
}

std::optional<double> peak_bf16(int threads, double seconds) {
#if defined(__x86_64__)
  if (cpu().has("avx512bf16")) return kernel_rate(bf16_512, threads, seconds);
#endif
  (void)threads, (void)seconds;
  return std::nullopt;
}

double copy_bandwidth(int threads, std::size_t bytes, double seconds) {
  const std::size_t part = std::max<std::size_t>(bytes / threads, 1);
  struct Buffers {
    std::unique_ptr<char[]> source, target;
  };
  // Written first by the thread that copies them, so that their pages are near it.
  std::vector<Buffers> buffers(threads);
  return best_rate(threads, seconds, [&](int t) {
    Buffers& own = buffers[t];
    if (!own.source) {
      own.source.reset(new char[part]);
      own.target.reset(new char[part]);
      std::memset(own.source.get(), 1, part);
      std::memset(own.target.get(), 2, part);
    }
    std::memcpy(own.target.get(), own.source.get(), part);
    consume(own.target.get());
    return 2.0 * part;
  });
}

}  // namespace velm::facts
