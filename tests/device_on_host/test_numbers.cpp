// half and bfloat16 as the device rounds them, and the random numbers.

#include <cmath>
#include <limits>

#include "device/numbers.h"
#include "device/philox.h"
#include "tests/device_on_host/testing.h"

using namespace velm::device;
using namespace testing;

namespace {

// The value of 16 bits by the definition of the format.
double value_of(unsigned bits, int mantissa_bits) {
  const int exponent_bits = 15 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

// The nearest of the numbers of a format, by search; of two, the one with the even last bit.
unsigned nearest(long double x, int mantissa_bits) {
  const unsigned infinity = (0x7fffu >> mantissa_bits) << mantissa_bits, sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  unsigned low = 0, high = infinity;
  while (high - low > 1) {
    const unsigned middle = (low + high) / 2;
    (value_of(middle, mantissa_bits) <= x ? low : high) = middle;
  }
  // What comes after the largest number counts as if the format went on.
  const long double below = value_of(low, mantissa_bits),
                    above = high == infinity ? 2 * below - value_of(low - 1, mantissa_bits)
                                             : static_cast<long double>(value_of(high, mantissa_bits));
  const long double down = x - below, up = above - x;
  return sign | (down < up || (down == up && low % 2 == 0) ? low : high);
}

template <class F>
void for_floats(const F& f) {
  for (int i = 0; i < 200000; ++i) f(std::bit_cast<float>(random_bits() << 1 ^ random_bits()));
  for (int exponent = -151; exponent < 128; ++exponent)
    for (int mantissa = 0; mantissa < 4096; mantissa += 1 + mantissa / 64)
      for (const float sign : {-1.0f, 1.0f}) f(sign * std::ldexp(static_cast<float>(4096 + mantissa), exponent - 12));
}

template <class T, int Mantissa, class Make>
void check_arithmetic(const Make& make) {
  // Products of a double's halves are exact in long double, and so are these sums as long as exponents stay close.
  for (int i = 0; i < 100000; ++i) {
    const auto draw = [&] {
      return make(static_cast<uint16_t>((random_bits() & 0x87ff) | (12 + random_bits() % 6) << 10));
    };
    const T a = draw(), b = draw(), c = draw();
    const long double x = to_float(a), y = to_float(b), z = to_float(c);
    const auto bits = [](T t) { return unsigned{t.bits}; };
    CHECK(bits(__hadd(a, b)) == nearest(x + y, Mantissa) || x + y == 0);
    CHECK(bits(__hsub(a, b)) == nearest(x - y, Mantissa) || x - y == 0);
    CHECK(bits(__hmul(a, b)) == nearest(x * y, Mantissa));
    CHECK(bits(__hfma(a, b, c)) == nearest(x * y + z, Mantissa) || x * y + z == 0);
  }
}

__global__ void draw(Global<uint32_t> out, uint64_t seed, ReadOnly<uint32_t> counters) {
  uint32_t c[4];
  for (int i = 0; i < 4; ++i) c[i] = counters[threadIdx.x * 4 + i];
  philox(c, seed);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i];
}

}  // namespace

TEST(every_half_and_bfloat16_has_its_value) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const double half = value_of(bits, 10), bf16 = value_of(bits, 7);
    const double got_half = to_float(__ushort_as_half(static_cast<unsigned short>(bits)));
    const double got_bf16 = to_float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
    CHECK(std::isnan(half) ? std::isnan(got_half) : got_half == half && std::signbit(got_half) == std::signbit(half));
    CHECK(std::isnan(bf16) ? std::isnan(got_bf16) : got_bf16 == bf16 && std::signbit(got_bf16) == std::signbit(bf16));
    if (!std::isnan(half)) CHECK(__float2half_rn(static_cast<float>(half)).bits == bits);
    if (!std::isnan(bf16)) CHECK(__float2bfloat16_rn(static_cast<float>(bf16)).bits == bits);
  }
}

TEST(conversions_round_to_nearest_even) {
  for_floats([](float x) {
    const unsigned half = __float2half_rn(x).bits, bf16 = __float2bfloat16_rn(x).bits;
    if (std::isnan(x)) {
      CHECK(half == 0x7fff && bf16 == 0x7fff);
    } else {
      CHECK(half == nearest(x, 10));
      CHECK(bf16 == nearest(x, 7));
    }
  });
  CHECK(__float2half_rn(65520.0f).bits == 0x7c00 && __float2half_rn(65519.0f).bits == 0x7bff);
}

TEST(arithmetic_rounds_once) {
  check_arithmetic<__half, 10>([](uint16_t bits) { return __ushort_as_half(bits); });
  check_arithmetic<__nv_bfloat16, 7>(
      [](uint16_t bits) { return __ushort_as_bfloat16(static_cast<uint16_t>((bits & 0x87ff) | 0x3800)); });
  // 1 + 2^-11 rounds down to even, but not with a little more, even if that is too little for a float.
  const __half one = __half(1.0f), tiny = __half(0x1p-12f), two = __half(2.0f), least = __half(0x1p-24f);
  CHECK(float(__hfma(tiny, two, one)) == 1.0f);
  CHECK(float(__hfma(__half(0x1.004p-11f), one, one)) == 1.0f + 0x1p-10f);
  CHECK(device_on_host::half_of(device_on_host::add_to_odd(1.0 + 0x1p-11, 0x1p-70)).bits == 0x3c01);
  CHECK(float(least) == 0x1p-24f);
}

TEST(tf32_rounds_ties_away) {
  CHECK(device_on_host::float_to_tf32(1.0f + 0x1p-11f) == __float_as_uint(1.0f + 0x1p-10f));
  CHECK(device_on_host::float_to_tf32(-1.0f - 0x1p-11f) == __float_as_uint(-1.0f - 0x1p-10f));
  CHECK(device_on_host::float_to_tf32(1.0f + 0x1p-12f) == __float_as_uint(1.0f));
}

// Reads a seed and counters, writes what philox makes of them: compared with velm_kernels/attention/philox.py.
TEST(philox) {
  unsigned long long seed = 0;
  std::vector<uint32_t> counters, out;
  if (const char* text = std::getenv("PHILOX_SEED")) seed = std::strtoull(text, nullptr, 10);
  for (uint32_t i = 0; i < 32; ++i) counters.insert(counters.end(), {i * 0x9E3779B9u, i, ~i, 0x80000000u + i});
  out.resize(128);
  launch<draw>(1, 32, 0, nullptr, global(out), uint64_t{seed}, velm::device::global<const uint32_t>(view(counters)));
  for (const uint32_t word : out) std::printf("%u\n", word);
}
