// Shared and global memory: poison, red zones, bounds, alignment, asynchronous copies, traffic and banks.

#include <cmath>
#include <cstring>

#include "device/async.h"
#include "device/numbers.h"
#include "tests/device_on_host/testing.h"

using namespace velm::device;
using namespace testing;

namespace {

struct Tiles {
  SharedArray<float, 4, 32> tile;
  SharedArray<__half, 8> halves;
};

// poison

__global__ void read_poison(Global<float> out) {
  auto& fixed = static_shared<Tiles>();
  auto& asked = dynamic_shared<Tiles>();
  if (threadIdx.x == 0) {
    out[0] = fixed.tile[1][2];
    out[1] = to_float(fixed.halves[3]);
    out[2] = asked.tile[3][31];
    out[3] = static_cast<float>(fixed.tile[0][0]);
    // The next block must not find it.
    fixed.tile[1][2] = 1.0f;
    asked.tile[3][31] = 1.0f;
  }
}

__global__ void two_storages(Global<float> out) {
  auto& a = static_shared<Tiles>();
  struct Other {
    SharedArray<float, 4> values;
  };
  auto& b = static_shared<Other>();
  a.tile[0][threadIdx.x] = 1.0f;
  b.values[threadIdx.x] = 2.0f;
  __syncthreads();
  out[threadIdx.x] = a.tile[0][3 - threadIdx.x] + b.values[3 - threadIdx.x];
}

// what is wrong with an access

__global__ void index_beyond_a_row(int row, int column) {
  static_shared<Tiles>().tile[row][column] = 0.0f;
}
__global__ void pointer_beyond_an_array(int offset) {
  Shared<float> p = &static_shared<Tiles>().tile[0][0];
  p[offset] = 0.0f;
}
__global__ void misaligned_shared(int offset) {
  Shared<float> p = &static_shared<Tiles>().tile[0][0];
  store(p + offset, Vector<float, 4>{});
}
__global__ void global_write(Global<float> out, int64_t index) {
  if (threadIdx.x == 3) out[index] = 1.0f;
}
__global__ void global_read(ReadOnly<float> in, Global<float> out, int64_t index) {
  out[0] = in[index];
}
template <int N>
__global__ void global_vector(Global<float> out, int64_t index) {
  store(out + index, load<N>(out + index));
}
__global__ void too_little_dynamic() {
  dynamic_shared<Tiles>().tile[0][0] = 1.0f;
}
__global__ void write_around_shared(int offset) {
  // A raw pointer, which nobody checks when it is used.
  auto* p = reinterpret_cast<unsigned char*>(&dynamic_shared<Tiles>());
  p[offset] = 7;
}
struct Most {
  SharedArray<float, 12 * 1024> values;
};
__global__ void most_static() {
  static_shared<Most>().values[threadIdx.x] = 1.0f;
}

// references

__global__ void assign_and_change(Global<float> a, Global<float> b) {
  a[0] = b[1];
  a[1] += b[0];
  a[2] -= 1.0f;
  a[3] *= 3.0f;
  Global<float> p = a + 4;
  *p = 9.0f;
  ++p;
  *p = static_cast<float>(p - a);
  if (!Global<float>(nullptr) && a != nullptr) a[6] = 1.0f;
}

// asynchronous copies: what is in shared memory before the wait, after it, and after the next

struct Stages {
  SharedArray<float, 3, 4> stage;
};

__global__ void copy_in_groups(ReadOnly<float> in, Global<float> out) {
  auto& shared = static_shared<Stages>();
  const auto look = [&](int row) {
    for (int i = 0; i < 12; ++i) out[row * 12 + i] = shared.stage[i / 4][i % 4];
  };
  cp_async<16>(&shared.stage[0][0], in);
  cp_async_commit();
  cp_async<8>(&shared.stage[1][0], in + 4);
  cp_async<4>(&shared.stage[1][2], in + 6);
  cp_async_commit();
  cp_async<16>(&shared.stage[2][0], in + 8, 8);
  cp_async_commit();
  look(0);
  cp_async_wait<2>();
  look(1);
  cp_async_wait<1>();
  look(2);
  cp_async_wait<0>();
  look(3);
}
__global__ void copy_uncommitted(ReadOnly<float> in, Global<float> out) {
  auto& shared = static_shared<Stages>();
  cp_async<16>(&shared.stage[0][0], in);
  cp_async_wait<0>();
  out[0] = shared.stage[0][0];
  cp_async_commit();
  cp_async_wait<0>();
  out[1] = shared.stage[0][0];
}
__global__ void copy_from(ReadOnly<float> in, int64_t offset, int to) {
  cp_async<16>(&static_shared<Stages>().stage[0][to], in + offset);
}
// Half a row is there; nothing is read of the source where nothing is copied.
__global__ void copy_the_rest_as_zeros(ReadOnly<float> in, Global<float> out) {
  auto& shared = static_shared<Stages>();
  cp_async<16>(&shared.stage[0][0], in, 8);
  cp_async<16>(&shared.stage[1][0], in + 400, 0);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 8; ++i) out[i] = shared.stage[i / 4][i % 4];
}

// traffic and banks

__global__ void copy_vectors(ReadOnly<float> in, Global<float> out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i + 4 <= n) store(out + i, load<4>(in + i));
}

template <int Stride>
struct Column {
  SharedArray<float, 32, Stride> tile;
};
template <int Stride>
__global__ void transpose(Global<float> out) {
  auto& shared = static_shared<Column<Stride>>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) shared.tile[i][lane] = static_cast<float>(lane);
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += shared.tile[lane][i];
  if (lane < 0) out[0] = sum;
}
template <int Stride>
__global__ void read_vectors() {
  auto& shared = static_shared<Column<Stride>>();
  const int lane = static_cast<int>(threadIdx.x);
  store(&shared.tile[lane % 8][lane / 8 * 4], Vector<float, 4>{});
}

bool poisoned(float x) {
  return std::isnan(x);
}

}  // namespace

TEST(shared_memory_is_poisoned_in_every_block) {
  for (int i = 0; i < 2; ++i) {
    std::vector<float> out(4);
    launch<read_poison>(3, 32, sizeof(Tiles), nullptr, global(out));
    for (const float x : out) CHECK(poisoned(x));
  }
}

TEST(storages_are_told_apart) {
  std::vector<float> out(4);
  launch<two_storages>(2, 4, 0, nullptr, global(out));
  for (const float x : out) CHECK(x == 3);
}

TEST(fault_shared_bounds) {
  CHECK_FAULT([] { launch<index_beyond_a_row>(1, 1, 0, nullptr, 1, 32); },
              "index_beyond_a_row, block (0,0,0), thread (0,0,0): index 32 into a dimension of 32 of a shared array");
  CHECK_FAULT([] { launch<index_beyond_a_row>(1, 1, 0, nullptr, 4, 0); }, "index 4 into a dimension of 4");
  CHECK_FAULT([] { launch<index_beyond_a_row>(1, 1, 0, nullptr, 0, -1); }, "index -1 into a dimension of 32");
  CHECK_FAULT([] { launch<pointer_beyond_an_array>(1, 1, 0, nullptr, 128); },
              "shared write of 4 bytes at byte 512 of an array of 512 bytes: out of bounds");
  CHECK_FAULT([] { launch<pointer_beyond_an_array>(1, 1, 0, nullptr, -1); }, "at byte -4 of an array of 512");
  launch<pointer_beyond_an_array>(1, 1, 0, nullptr, 127);
}

TEST(fault_shared_alignment) {
  launch<misaligned_shared>(1, 1, 0, nullptr, 4);
  CHECK_FAULT([] { launch<misaligned_shared>(1, 1, 0, nullptr, 2); },
              "shared write of 16 bytes at byte 8 of an array of 512 bytes: misaligned");
}

TEST(fault_shared_sizes) {
  CHECK_FAULT([] { launch<too_little_dynamic>(1, 1, sizeof(Tiles) - 1, nullptr); },
              "wants 528 bytes of dynamic shared memory, and the launch gave 527");
  launch<most_static>(1, 32, 51 * 1024, nullptr);
  CHECK_FAULT([] { launch<most_static>(1, 32, 52 * 1024, nullptr); }, "wants 102400 bytes of shared memory");
}

// AddressSanitizer ends the program instead, which test_device_on_host.py checks.
TEST(fault_red_zones) {
  for (const int offset : {-1, static_cast<int>(sizeof(Tiles)), static_cast<int>(sizeof(Tiles)) + 60, -100})
    CHECK_FAULT([&] { launch<write_around_shared>(1, 1, sizeof(Tiles), nullptr, offset); },
                "write_around_shared, block (0,0,0): a raw pointer wrote outside of shared memory, at byte " +
                    std::to_string(offset));
  launch<write_around_shared>(1, 1, sizeof(Tiles), nullptr, 5);
}

TEST(fault_global_accesses) {
  std::vector<float> out(12), in(8);
  const auto g = global(out);
  CHECK_FAULT(
      [&] { launch<global_write>(dim3(1, 2), 32, 0, nullptr, g, int64_t{12}); },
      "global_write, block (0,0,0), thread (3,0,0): global write of 4 bytes at byte 48 of an array of 48 bytes: "
      "out of bounds");
  CHECK_FAULT([&] { launch<global_write>(1, 32, 0, nullptr, g, int64_t{1} << 40); }, "out of bounds");
  CHECK_FAULT([&] { launch<global_write>(1, 32, 0, nullptr, g, int64_t{-1}); }, "at byte -4");
  CHECK_FAULT([&] { launch<global_write>(1, 32, 0, nullptr, Global<float>(), int64_t{0}); }, "through a null pointer");
  CHECK_FAULT(
      [&] { launch<global_read>(1, 1, 0, nullptr, velm::device::global<const float>(view(in)), g, int64_t{8}); },
      "global read of 4 bytes at byte 32");
  launch<global_vector<4>>(1, 1, 0, nullptr, g, int64_t{8});
  CHECK_FAULT([&] { launch<global_vector<4>>(1, 1, 0, nullptr, g, int64_t{10}); }, "out of bounds");
  CHECK_FAULT([&] { launch<global_vector<4>>(1, 1, 0, nullptr, g, int64_t{2}); },
              "global_vector<4>, block (0,0,0), thread (0,0,0): global read of 16 bytes at byte 8 of an array of 48 "
              "bytes: misaligned");
  CHECK_FAULT([&] { launch<global_vector<2>>(1, 1, 0, nullptr, g, int64_t{1}); }, "misaligned");
}

TEST(references) {
  std::vector<float> a(8, 2.0f), b{3.0f, 4.0f};
  launch<assign_and_change>(1, 1, 0, nullptr, global(a), global(b));
  CHECK((a == std::vector<float>{4, 5, 1, 6, 9, 5, 1, 2}));
}

TEST(asynchronous_copies) {
  std::vector<float> in(12), out(48);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i + 1);
  launch<copy_in_groups>(1, 1, 0, nullptr, velm::device::global<const float>(view(in)), global(out));
  for (int row = 0; row < 4; ++row)
    for (int i = 0; i < 12; ++i) {
      const float got = out[static_cast<size_t>(row * 12 + i)];
      const bool arrived = i / 4 < row && i != 7;
      CHECK(arrived ? got == (i < 10 ? static_cast<float>(i + 1) : 0.0f) : poisoned(got));
    }
  launch<copy_uncommitted>(1, 1, 0, nullptr, velm::device::global<const float>(view(in)), global(out));
  CHECK(poisoned(out[0]) && out[1] == 1.0f);
  launch<copy_the_rest_as_zeros>(1, 1, 0, nullptr, velm::device::global<const float>({in.data(), 8}), global(out));
  CHECK(out[0] == 1 && out[1] == 2 && out[2] == 0 && out[4] == 0 && out[7] == 0);
}

TEST(fault_asynchronous_copies) {
  std::vector<float> in(12);
  const auto g = velm::device::global<const float>(view(in));
  CHECK_FAULT([&] { launch<copy_from>(1, 1, 0, nullptr, g, int64_t{10}, 0); }, "global read of 16 bytes at byte 40");
  CHECK_FAULT([&] { launch<copy_from>(1, 1, 0, nullptr, g, int64_t{1}, 0); }, "global read of 16 bytes at byte 4");
  CHECK_FAULT([&] { launch<copy_from>(1, 1, 0, nullptr, g, int64_t{4}, 2); }, "misaligned");
}

TEST(traffic) {
  std::vector<float> in(1000), out(1000);
  device_on_host::take_launches();
  launch<copy_vectors>(4, 64, 0, nullptr, velm::device::global<const float>(view(in)), global(out), 1000);
  const auto launches = device_on_host::take_launches();
  CHECK(launches.size() == 1 && launches[0].kernel.find("copy_vectors") != std::string::npos);
  CHECK(launches[0].grid.x == 4 && launches[0].block.x == 64);
  CHECK(launches[0].counters.global_bytes_read == 4000 && launches[0].counters.global_bytes_written == 4000);
  CHECK(device_on_host::take_launches().empty());
}

TEST(bank_conflicts) {
  options().bank_conflicts = true;
  const auto counted = [](const auto& f) {
    device_on_host::take_launches();
    f();
    return device_on_host::take_launches().at(0).counters;
  };
  std::vector<float> out(1);
  const auto g = global(out);
  // Four writes of rows, four reads of columns: 32 lanes in one bank, or in 32.
  auto c = counted([&] { launch<transpose<32>>(1, 32, 0, nullptr, g); });
  CHECK(c.shared_accesses == 8 && c.shared_passes == 4 + 4 * 32 && c.bank_conflicts == 4 * 31);
  c = counted([&] { launch<transpose<33>>(1, 32, 0, nullptr, g); });
  CHECK(c.shared_accesses == 8 && c.shared_passes == 8 && c.bank_conflicts == 0);
  // 16 bytes per lane, of which 8 lanes are served at once: in one pass where their rows are 4 banks apart.
  c = counted([&] { launch<read_vectors<36>>(1, 32, 0, nullptr); });
  CHECK(c.shared_accesses == 1 && c.shared_passes == 4 && c.bank_conflicts == 0);
  c = counted([&] { launch<read_vectors<32>>(1, 32, 0, nullptr); });
  CHECK(c.shared_accesses == 1 && c.shared_passes == 32 && c.bank_conflicts == 28);
}
