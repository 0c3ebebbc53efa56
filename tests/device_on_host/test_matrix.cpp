// mma.sync and ldmatrix: every lane's fragment against the layouts of the PTX ISA, element by element, and how tensor
// cores add.

#include <cmath>
#include <limits>

#include "device/matrix.h"
#include "device/numbers.h"
#include "device_on_host/tensor_core.h"
#include "tests/device_on_host/testing.h"

using namespace velm::device;
using namespace testing;

namespace {

struct Index {
  int row, column;
};

// PTX ISA 9.7.14.5, "Matrix Fragments for mma.m16n8k16 with floating point type", for .f16 and .bf16.
Index a_of_k16(int lane, int i) {
  const int group_id = lane >> 2, thread_in_group = lane % 4;
  const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group_id : group_id + 8;
  const int column = i < 4 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
  return {row, column};
}
Index b_of_k16(int lane, int i) {
  const int thread_in_group = lane % 4;
  return {i < 2 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8, lane >> 2};
}
// "Matrix Fragments for mma.m16n8k8", for .f16 and .bf16, then for .tf32.
Index a_of_k8(int lane, int i) {
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
}
Index b_of_k8(int lane, int i) {
  return {lane % 4 * 2 + i, lane >> 2};
}
Index a_of_tf32(int lane, int i) {
  const int row = i == 0 || i == 2 ? lane >> 2 : (lane >> 2) + 8;
  return {row, i == 0 || i == 1 ? lane % 4 : lane % 4 + 4};
}
Index b_of_tf32(int lane, int i) {
  return {i == 0 ? lane % 4 : lane % 4 + 4, lane >> 2};
}
Index d_of_all(int lane, int i) {
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
}

// Registers of all lanes, 16 words each: a, b, d.
template <class T, int K>
__global__ void multiply(Global<uint32_t> registers) {
  Global<uint32_t> mine = registers + 16 * threadIdx.x;
  float d[4];
  uint32_t a[K == 16 ? 4 : 2], b[K / 8];
  for (int i = 0; i < static_cast<int>(sizeof(a) / 4); ++i) a[i] = mine[i];
  for (int i = 0; i < static_cast<int>(sizeof(b) / 4); ++i) b[i] = mine[4 + i];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(mine[8 + i]);
  if constexpr (K == 16)
    mma_m16n8k16<T>(d, a, b);
  else
    mma_m16n8k8<T>(d, a, b);
  for (int i = 0; i < 4; ++i) mine[8 + i] = __float_as_uint(d[i]);
}
__global__ void multiply_tf32(Global<uint32_t> registers) {
  Global<uint32_t> mine = registers + 16 * threadIdx.x;
  float d[4];
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = mine[i];
  for (int i = 0; i < 2; ++i) b[i] = mine[4 + i];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(mine[8 + i]);
  mma_m16n8k8_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) mine[8 + i] = __float_as_uint(d[i]);
}

struct Problem {
  float a[16][16], b[16][8], d[16][8];
  Problem() {
    for (auto& row : a)
      for (float& x : row) x = random_number();
    for (auto& row : b)
      for (float& x : row) x = random_number();
    for (auto& row : d)
      for (float& x : row) x = random_number();
  }
};

template <class T>
void put(uint32_t* registers, int i, float x) {
  if constexpr (sizeof(T) == 4)
    registers[i] = __float_as_uint(x);
  else
    registers[i / 2] |= uint32_t{from_float<T>(x).bits} << (i % 2 * 16);
}

template <class T, auto kernel, int K>
void check_mma(Index (*a_of)(int, int), Index (*b_of)(int, int)) {
  const Problem problem;
  std::vector<uint32_t> registers(16 * 32);
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* mine = &registers[static_cast<size_t>(lane) * 16];
    for (int i = 0; i < K / 2; ++i) put<T>(mine, i, problem.a[a_of(lane, i).row][a_of(lane, i).column]);
    for (int i = 0; i < K / 4; ++i) put<T>(mine + 4, i, problem.b[b_of(lane, i).row][b_of(lane, i).column]);
    for (int i = 0; i < 4; ++i) put<float>(mine + 8, i, problem.d[d_of_all(lane, i).row][d_of_all(lane, i).column]);
  }
  device_on_host::take_launches();
  launch<kernel>(1, 32, 0, nullptr, global(registers));
  CHECK(device_on_host::take_launches().at(0).counters.matrix_instructions == 1);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Index at = d_of_all(lane, i);
      float expected = problem.d[at.row][at.column];
      constexpr int kBlock = sizeof(T) == 4 ? 4 : 8;
      for (int first = 0; first < K; first += kBlock) {
        float b[kBlock];
        for (int k = 0; k < kBlock; ++k) b[k] = problem.b[first + k][at.column];
        expected = device_on_host::add_block(expected, &problem.a[at.row][first], b, kBlock);
      }
      CHECK(__uint_as_float(registers[static_cast<size_t>(lane * 16 + 8 + i)]) == expected);
    }
}

// One block of products with 1, as the definition has it and as instructions compute it.
float sum_of(float c, std::vector<float> terms) {
  const auto count = static_cast<int>(terms.size());
  const std::vector<float> ones(terms.size(), 1.0f);
  const float expected = device_on_host::add_block(c, terms.data(), ones.data(), count);
  constexpr int kWidth = device_on_host::columns::kWidth;
  const std::vector<float> many(terms.size() * kWidth, 1.0f);
  float fast[kWidth];
  for (float& x : fast) x = c;
  device_on_host::columns::add_block(fast, terms.data(), many.data(), kWidth, count);
  for (const float x : fast) CHECK(x == expected || (x != x && expected != expected));
  return expected;
}

__global__ void part_of_an_mma() {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x != 7) mma_m16n8k16<__half>(d, a, b);
}
__global__ void two_types() {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16)
    mma_m16n8k16<__half>(d, a, b);
  else
    mma_m16n8k16<__nv_bfloat16>(d, a, b);
}

template <int Stride>
struct Matrices {
  SharedArray<__half, 32, Stride> rows;
};

template <int Count, int Stride, bool Transposed>
__global__ void load_matrices(Global<uint32_t> out) {
  auto& shared = static_shared<Matrices<Stride>>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared.rows[lane][i] = __ushort_as_half(static_cast<unsigned short>(lane * 8 + i));
  __syncthreads();
  uint32_t registers[Count];
  // What the lanes beyond the matrices give is not looked at.
  Shared<__half> row = &shared.rows[lane][0];
  if (lane >= 8 * Count) row += 100000;
  if constexpr (Transposed)
    ldmatrix_transposed<Count>(registers, row);
  else
    ldmatrix<Count>(registers, row);
  for (int j = 0; j < Count; ++j) out[j * 32 + lane] = registers[j];
}

template <int Count, int Stride, bool Transposed>
void check_ldmatrix() {
  std::vector<uint32_t> out(Count * 32);
  launch<load_matrices<Count, Stride, Transposed>>(1, 32, 0, nullptr, global(out));
  for (int j = 0; j < Count; ++j)
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half) {
        const int major = lane / 4, minor = 2 * (lane % 4) + half;
        const int row = Transposed ? minor : major, column = Transposed ? major : minor;
        const uint32_t got = out[static_cast<size_t>(j * 32 + lane)] >> (16 * half) & 0xffff;
        CHECK(got == static_cast<uint32_t>((j * 8 + row) * 8 + column));
      }
}

__global__ void load_from(int lane, int offset) {
  auto& shared = static_shared<Matrices<8>>();
  uint32_t registers[4];
  Shared<__half> row = &shared.rows[threadIdx.x][0];
  if (static_cast<int>(threadIdx.x) == lane) row += offset;
  ldmatrix<4>(registers, row);
}

}  // namespace

TEST(mma_layouts) {
  check_mma<__half, multiply<__half, 16>, 16>(a_of_k16, b_of_k16);
  check_mma<__nv_bfloat16, multiply<__nv_bfloat16, 16>, 16>(a_of_k16, b_of_k16);
  check_mma<__half, multiply<__half, 8>, 8>(a_of_k8, b_of_k8);
  check_mma<__nv_bfloat16, multiply<__nv_bfloat16, 8>, 8>(a_of_k8, b_of_k8);
  check_mma<float, multiply_tf32, 8>(a_of_tf32, b_of_tf32);
}

// Fasi et al., "Numerical behavior of NVIDIA tensor cores", sections 3.2 to 3.4, with the bits of an A100.
TEST(tensor_cores_cut_off) {
  const float unit = 0x1p-23f;
  // Towards zero, never to nearest.
  CHECK(sum_of(1.0f, {0.75f * unit}) == 1.0f && sum_of(-1.0f, {-0.75f * unit}) == -1.0f);
  CHECK(sum_of(1.0f, {1.75f * unit}) == 1.0f + unit && sum_of(-1.0f, {-1.75f * unit}) == -1.0f - unit);
  // One bit more is there while a block is added: halves of the last unit count, quarters are lost.
  CHECK(sum_of(1.0f, {unit / 2, unit / 2}) == 1.0f + unit);
  CHECK(sum_of(1.0f, {unit / 4, unit / 4, unit / 4, unit / 4}) == 1.0f);
  CHECK(sum_of(1.0f, {-unit / 4}) == 1.0f && sum_of(1.0f, {-unit / 2}) == 1.0f - unit / 2);
  // The largest decides, whether it is the accumulator or a product, and whatever the order.
  CHECK(sum_of(unit / 4, {1.0f, unit / 4, unit / 4, unit / 4}) == 1.0f);
  CHECK(sum_of(0.0f, {unit / 4, unit / 2, 1.0f, unit / 2}) == 1.0f + unit);
  // Not normalised in between: what the largest cancels with comes too late for what was cut off.
  CHECK(sum_of(0.0f, {1.0f, -1.0f, unit / 4}) == 0.0f && sum_of(0.0f, {1.0f, -1.0f, unit / 2}) == unit / 2);
  // Exponents are those of the factors: 1.5 * 1.5 is 2.25 with that of 1.
  const float a[] = {1.5f, unit, unit, unit, unit}, b[] = {1.5f, 0.5f, 0.5f, 0.5f, 0.5f};
  CHECK(device_on_host::add_block(0.0f, a, b, 5) == 2.25f + 2 * unit);
}

TEST(tensor_cores_keep_what_is_not_finite) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(sum_of(infinity, {1.0f}) == infinity && sum_of(1.0f, {-infinity, 2.0f}) == -infinity);
  CHECK(std::isnan(sum_of(infinity, {-infinity})) && std::isnan(sum_of(1.0f, {nan, 1.0f})));
  CHECK(std::isnan(sum_of(nan, {0.0f})) && sum_of(0x1.fffffep127f, {0x1.fffffep127f}) == infinity);
  CHECK(sum_of(0.0f, {0x1p-149f, 0x1p-149f}) == 0x1p-148f && sum_of(0x1p-140f, {0.0f}) == 0x1p-140f);
  CHECK(sum_of(0x1p-80f, {0x1.8p-81f, 0x1p-100f}) == 0x1.c0001p-80f);
}

// What instructions compute, some columns at once, by the definition.
TEST(tensor_cores_in_columns) {
  const auto draw = [](int range) {
    if (random_bits() % 16 == 0) return 0.0f;
    const int exponent = static_cast<int>(random_bits() % static_cast<unsigned>(2 * range + 1)) - range;
    return __uint_as_float(device_on_host::float_to_tf32(std::ldexp(random_number(), exponent)));
  };
  for (const int range : {1, 12, 40, 70})
    for (int i = 0; i < 20000; ++i) {
      const int count = i % 2 ? 8 : 4;
      constexpr int kWidth = device_on_host::columns::kWidth;
      float a[8], b[8][kWidth], c[kWidth];
      for (int k = 0; k < count; ++k) {
        a[k] = draw(range);
        for (float& x : b[k]) x = draw(range);
      }
      for (float& x : c) x = draw(range) * random_number();
      float expected[kWidth];
      for (int column = 0; column < kWidth; ++column) {
        float of_column[8];
        for (int k = 0; k < count; ++k) of_column[k] = b[k][column];
        expected[column] = device_on_host::add_block(c[column], a, of_column, count);
      }
      device_on_host::columns::add_block(c, a, b[0], kWidth, count);
      for (int column = 0; column < kWidth; ++column) CHECK(c[column] == expected[column]);
    }
}

// The order of blocks, and how many products are in one: behind a sum that no longer has units, 1 is lost.
TEST(tensor_cores_add_block_by_block) {
  const auto of_16_bits = [](std::vector<float> a, float factor) {
    std::vector<uint32_t> registers(16 * 32);
    for (int lane = 0; lane < 4; ++lane)
      for (int i = 0; i < 8; ++i)
        if (a_of_k16(lane, i).row == 0)
          put<__half>(&registers[static_cast<size_t>(lane) * 16], i, a[static_cast<size_t>(a_of_k16(lane, i).column)]);
    for (int lane = 0; lane < 4; ++lane)
      for (int i = 0; i < 4; ++i) {
        const float x = a[static_cast<size_t>(b_of_k16(lane, i).row)];
        put<__half>(&registers[static_cast<size_t>(lane) * 16 + 4], i, std::fabs(x) == factor ? factor : 1.0f);
      }
    launch<multiply<__half, 16>>(1, 32, 0, nullptr, global(registers));
    return __uint_as_float(registers[8]);
  };
  // 2^24 and seven ones, of which the last is cut off; then -2^24.
  std::vector<float> a(16);
  a[0] = 4096.0f;
  a[8] = -4096.0f;
  for (size_t i = 1; i < 8; ++i) a[i] = 1.0f;
  CHECK(of_16_bits(a, 4096.0f) == 6.0f);
  // All in one block: none is lost.
  a[8] = 0.0f;
  a[7] = -4096.0f;
  CHECK(of_16_bits(a, 4096.0f) == 6.0f);
  a[6] = 0.0f;
  CHECK(of_16_bits(a, 4096.0f) == 5.0f);
}

TEST(largest_of_a_number_and_nan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(max(nan, 1.0f) == 1.0f && max(1.0f, nan) == 1.0f && fmaxf(nan, 1.0f) == 1.0f && min(nan, 1.0f) == 1.0f);
}

TEST(tf32_ignores_the_lower_bits) {
  std::vector<uint32_t> registers(16 * 32);
  // Row 0 of A is (x, 0, ...), column 0 of B is (1, 0, ...).
  registers[0] = __float_as_uint(1.0f + 0x1p-11f);
  registers[4] = __float_as_uint(1.0f);
  launch<multiply_tf32>(1, 32, 0, nullptr, global(registers));
  CHECK(__uint_as_float(registers[8]) == 1.0f);
}

TEST(ldmatrix_layouts) {
  check_ldmatrix<1, 8, false>();
  check_ldmatrix<2, 8, false>();
  check_ldmatrix<4, 8, false>();
  check_ldmatrix<1, 40, true>();
  check_ldmatrix<2, 40, true>();
  check_ldmatrix<4, 40, true>();
}

TEST(ldmatrix_bank_conflicts) {
  options().bank_conflicts = true;
  std::vector<uint32_t> out(128);
  const auto conflicts = [&](const auto& f) {
    device_on_host::take_launches();
    f();
    const auto c = device_on_host::take_launches().at(0).counters;
    CHECK(c.ldmatrix_instructions == 1);
    return c.bank_conflicts;
  };
  // Each lane writes eight halves one after the other, 16 bytes apart from its neighbour's: 4 in a bank, 8 times.
  CHECK(conflicts([&] { launch<load_matrices<4, 8, false>>(1, 32, 0, nullptr, global(out)); }) == 8 * 3);
  // Rows 128 bytes apart begin in the same bank: 8 passes for each of 4 matrices, and 32 for each write.
  CHECK(conflicts([&] { launch<load_matrices<4, 64, false>>(1, 32, 0, nullptr, global(out)); }) == 4 * 7 + 8 * 31);
}

TEST(fault_matrix_instructions) {
  CHECK_FAULT([] { launch<part_of_an_mma>(1, 32, 0, nullptr); },
              "mma.sync with mask 0xffffffff is never reached by lanes 0x00000080");
  CHECK_FAULT([] { launch<part_of_an_mma>(1, 16, 0, nullptr); }, "names lanes that the block does not have");
  CHECK_FAULT([] { launch<two_types>(1, 32, 0, nullptr); }, "the lanes of one instruction differ in the shape or type");
  CHECK_FAULT([] { launch<load_from>(1, 32, 0, nullptr, 9, 4); },
              "load_from, block (0,0,0), thread (9,0,0): shared read of 16 bytes at byte 152 of an array of 512 bytes: "
              "misaligned");
  CHECK_FAULT([] { launch<load_from>(1, 32, 0, nullptr, 31, 8); }, "out of bounds");
}
