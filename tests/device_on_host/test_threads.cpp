// Grids, blocks, barriers, shuffles, votes, reductions, atomics; and what goes wrong with them.

#include "tests/device_on_host/testing.h"

using namespace velm::device;
using namespace testing;

namespace {

// grids and blocks

__global__ void write_indices(Global<int> out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = static_cast<int>(block * 10000 + thread);
}

// barriers

struct Reversal {
  SharedArray<int, 1024> values;
};

__global__ void reverse_block(Global<int> out, int rounds) {
  auto& shared = static_shared<Reversal>();
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  int value = i;
  for (int round = 0; round < rounds; ++round) {
    shared.values[i] = value;
    __syncthreads();
    value = shared.values[n - 1 - i] + 1;
    __syncthreads();
  }
  out[i] = value;
}

__global__ void count_predicates(Global<int> out) {
  const int i = static_cast<int>(threadIdx.x);
  out[i * 3] = __syncthreads_count(i % 3 == 0);
  out[i * 3 + 1] = __syncthreads_and(i < 40);
  out[i * 3 + 2] = __syncthreads_or(i == 39);
}

// The second warp hands over to the first without waiting for it.
__global__ void produce_and_consume(Global<int> out) {
  auto& shared = static_shared<Reversal>();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= 32) {
    shared.values[i - 32] = i * 7;
    named_barrier_arrive(3, 64);
  } else {
    named_barrier_sync(3, 64);
    out[i] = shared.values[31 - i];
  }
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 16) __syncthreads();
}

__global__ void barrier_and_shuffle(Global<int> out) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    out[0] = __shfl_sync(0xffff0000u, 1, 16) + __shfl_sync(~0u, 1, 0);
}

__global__ void disagreeing_barrier() {
  if (threadIdx.x < 32)
    named_barrier_sync(1, 64);
  else
    named_barrier_sync(1, 96);
}

__global__ void odd_barrier() {
  named_barrier_sync(1, 33);
}

// shuffles: one column of `out` for each

__global__ void shuffle_all(Global<int> out, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int k = 0; k < 40; ++k) {
    out[(k * 4 + 0) * 32 + lane] = __shfl_sync(~0u, 100 + lane, k, width);
    out[(k * 4 + 1) * 32 + lane] = __shfl_up_sync(~0u, 100 + lane, static_cast<unsigned>(k), width);
    out[(k * 4 + 2) * 32 + lane] = __shfl_down_sync(~0u, 100 + lane, static_cast<unsigned>(k), width);
    out[(k * 4 + 3) * 32 + lane] = __shfl_xor_sync(~0u, 100 + lane, k & 31, width);
  }
}

__global__ void shuffle_double(Global<double> out) {
  out[threadIdx.x] = __shfl_xor_sync(~0u, 0.5 + threadIdx.x, 1);
}

// Lanes meet in whatever order they come: the odd ones have something else to do first.
__global__ void diverge_and_meet(Global<int> out) {
  const int lane = static_cast<int>(threadIdx.x);
  int value = lane;
  if (lane % 2) value += __shfl_xor_sync(0xaaaaaaaau, value, 2);
  __syncwarp();
  out[lane] = __shfl_xor_sync(~0u, value, 1);
}

__global__ void part_of_a_shuffle(Global<int> out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
}
__global__ void foreign_mask(Global<int> out) {
  out[threadIdx.x] = __shfl_sync(0xffff, 1, 0);
}
__global__ void reads_an_absent_lane(Global<int> out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, 1, 20);
}
__global__ void two_collectives(Global<int> out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
  else
    out[threadIdx.x] = __any_sync(~0u, 1);
}
__global__ void two_masks(Global<int> out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __all_sync(~0u, 1);
  else
    out[threadIdx.x] = __all_sync(0xffff8000u, 1);
}
__global__ void part_of_a_syncwarp() {
  if (threadIdx.x % 32 < 31) __syncwarp();
}
__global__ void lanes_beyond_the_block(Global<int> out) {
  out[threadIdx.x] = __any_sync(~0u, 1);
}

// votes, matches, reductions

__global__ void vote_all(Global<unsigned> out) {
  const unsigned lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  out[lane] = __ballot_sync(half, lane % 3 == 0);
  out[32 + lane] = static_cast<unsigned>(__all_sync(half, lane < 16));
  out[64 + lane] = static_cast<unsigned>(__any_sync(half, lane == 20));
  out[96 + lane] = __match_any_sync(~0u, lane % 5);
  int all = 0;
  out[128 + lane] = __match_all_sync(half, lane < 16 ? 7u : lane, &all);
  out[160 + lane] = static_cast<unsigned>(all);
}

__global__ void reduce_all(Global<const unsigned> in, Global<unsigned> out) {
  const unsigned lane = threadIdx.x, x = in[lane];
  out[lane] = __reduce_add_sync(~0u, x);
  out[32 + lane] = __reduce_min_sync(~0u, x);
  out[64 + lane] = __reduce_max_sync(~0u, x);
  out[96 + lane] = static_cast<unsigned>(__reduce_min_sync(~0u, static_cast<int>(x)));
  out[128 + lane] = static_cast<unsigned>(__reduce_max_sync(~0u, static_cast<int>(x)));
  out[160 + lane] = __reduce_and_sync(~0u, x);
  out[192 + lane] = __reduce_or_sync(~0u, x);
  out[224 + lane] = __reduce_xor_sync(~0u, x);
}

// atomics

struct Counts {
  SharedArray<int, 4> bins;
};

__global__ void count_bins(Global<int> total, Global<float> sum) {
  auto& shared = static_shared<Counts>();
  if (threadIdx.x < 4) shared.bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&shared.bins[threadIdx.x % 4], static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(total + threadIdx.x, shared.bins[threadIdx.x]);
  atomicAdd(sum, 0.5f);
}

__global__ void every_atomic(Global<unsigned> out) {
  const unsigned i = threadIdx.x;
  atomicSub(out, 1u);
  atomicMax(out + 1, i);
  atomicMin(out + 2, i);
  atomicAnd(out + 3, ~(1u << i));
  atomicOr(out + 4, 1u << i);
  atomicXor(out + 5, 3u << i);
  if (atomicCAS(out + 6, 0u, i + 1) == 0u) atomicExch(out + 7, i + 1);
}

__global__ void do_nothing() {
}

}  // namespace

TEST(grid_and_block_indices) {
  const dim3 grid(3, 2, 2), block(5, 3, 2);
  std::vector<int> out(12 * 30, -1);
  launch<write_indices>(grid, block, 0, nullptr, global(out));
  for (int i = 0; i < 12 * 30; ++i) CHECK(out[static_cast<size_t>(i)] == i / 30 * 10000 + i % 30);
}

TEST(blocks_on_several_host_threads) {
  options().host_threads = 4;
  std::vector<int> out(500 * 32, -1);
  launch<write_indices>(500, 32, 0, nullptr, global(out));
  for (int i = 0; i < 500 * 32; ++i) CHECK(out[static_cast<size_t>(i)] == i / 32 * 10000 + i % 32);
  std::vector<int> total(4);
  std::vector<float> sum(1);
  launch<count_bins>(200, 64, 0, nullptr, global(total), global(sum));
  CHECK(sum[0] == 200 * 32 && total[1] == 200 * 16 * 31);
}

TEST(barrier) {
  for (const unsigned threads : {1u, 31u, 32u, 33u, 100u, 1024u}) {
#if defined(__SANITIZE_THREAD__)
    if (threads > 100) continue;
#endif
    std::vector<int> out(threads);
    launch<reverse_block>(1, threads, 0, nullptr, global(out), 5);
    for (unsigned i = 0; i < threads; ++i) CHECK(out[i] == static_cast<int>(threads - 1 - i) + 5);
  }
}

TEST(barrier_with_predicate) {
  std::vector<int> out(40 * 3);
  launch<count_predicates>(1, 40, 0, nullptr, global(out));
  for (int i = 0; i < 40; ++i) {
    const int* row = &out[static_cast<size_t>(i) * 3];
    CHECK(row[0] == 14 && row[1] == 1 && row[2] == 1);
  }
}

TEST(named_barrier) {
  std::vector<int> out(32);
  launch<produce_and_consume>(1, 64, 0, nullptr, global(out));
  for (int i = 0; i < 32; ++i) CHECK(out[static_cast<size_t>(i)] == (63 - i) * 7);
}

TEST(fault_barrier_reached_by_part_of_a_block) {
  CHECK_FAULT([] { launch<half_a_barrier>(2, 64, 0, nullptr); },
              "half_a_barrier, block (0,0,0), thread (0,0,0): barrier 0 (__syncthreads) is reached by 16 of 64 threads "
              "(thread (16,0,0) has returned)");
}

TEST(fault_barrier_and_shuffle_wait_for_each_other) {
  std::vector<int> out(1);
  const std::string found = fault_of([&] { launch<barrier_and_shuffle>(1, 32, 0, nullptr, global(out)); });
  CHECK(found.find("a __shfl_sync with mask 0xffffffff is never reached by lanes 0x0000ffff") != found.npos);
  CHECK(found.find("(thread (0,0,0) waits at barrier 0)") != found.npos);
}

TEST(fault_named_barriers) {
  CHECK_FAULT([] { launch<disagreeing_barrier>(1, 96, 0, nullptr); },
              "barrier 1 is for 64 threads elsewhere and for 96");
  CHECK_FAULT([] { launch<odd_barrier>(1, 64, 0, nullptr); }, "must be a multiple of 32");
}

TEST(shuffles) {
  for (const int width : {32, 16, 8, 4, 2, 1}) {
    std::vector<int> out(40 * 4 * 32);
    launch<shuffle_all>(1, 32, 0, nullptr, global(out), width);
    for (int k = 0; k < 40; ++k)
      for (int lane = 0; lane < 32; ++lane) {
        const int segment = lane / width, first = segment * width;
        const auto got = [&](int kind) { return out[static_cast<size_t>((k * 4 + kind) * 32 + lane)] - 100; };
        CHECK(got(0) == first + k % width);
        CHECK(got(1) == (lane - k >= first ? lane - k : lane));
        CHECK(got(2) == (lane + k < first + width ? lane + k : lane));
        CHECK(got(3) == ((lane ^ (k & 31)) < first + width ? lane ^ (k & 31) : lane));
      }
  }
  std::vector<double> out(32);
  launch<shuffle_double>(1, 32, 0, nullptr, global(out));
  for (int lane = 0; lane < 32; ++lane) CHECK(out[static_cast<size_t>(lane)] == 0.5 + (lane ^ 1));
}

TEST(lanes_that_come_later) {
  std::vector<int> out(32);
  launch<diverge_and_meet>(1, 32, 0, nullptr, global(out));
  for (int lane = 0; lane < 32; ++lane) {
    const int other = lane ^ 1;
    CHECK(out[static_cast<size_t>(lane)] == (other % 2 ? other + (other ^ 2) : other));
  }
}

TEST(fault_collectives) {
  std::vector<int> out(64);
  const auto g = global(out);
  CHECK_FAULT([&] { launch<part_of_a_shuffle>(1, 32, 0, nullptr, g); },
              "a __shfl_sync with mask 0xffffffff is never reached by lanes 0x00000020 (thread (5,0,0) has returned)");
  CHECK_FAULT([&] { launch<foreign_mask>(1, 32, 0, nullptr, g); }, "does not name its own lane");
  CHECK_FAULT([&] { launch<reads_an_absent_lane>(1, 32, 0, nullptr, g); }, "reads from lane 20, which takes no part");
  CHECK_FAULT([&] { launch<two_collectives>(1, 32, 0, nullptr, g); }, "a vote with mask 0xffffffff, but thread");
  CHECK_FAULT([&] { launch<two_masks>(1, 32, 0, nullptr, g); }, "waits in a vote with mask");
  CHECK_FAULT([&] { launch<part_of_a_syncwarp>(dim3(1, 1, 3), 64, 0, nullptr); },
              "part_of_a_syncwarp, block (0,0,0), thread (0,0,0): __syncwarp with mask 0xffffffff is never reached by "
              "lanes 0x80000000 (thread (31,0,0) has returned)");
  CHECK_FAULT([&] { launch<lanes_beyond_the_block>(1, 20, 0, nullptr, g); },
              "names lanes that the block does not have");
}

TEST(votes_and_matches) {
  std::vector<unsigned> out(192);
  launch<vote_all>(1, 32, 0, nullptr, global(out));
  unsigned thirds = 0;
  for (unsigned i = 0; i < 32; i += 3) thirds |= 1u << i;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const bool low = lane < 16;
    CHECK(out[lane] == (thirds & (low ? 0xffffu : 0xffff0000u)));
    CHECK(out[32 + lane] == (low ? 1u : 0u));
    CHECK(out[64 + lane] == (low ? 0u : 1u));
    unsigned same = 0;
    for (unsigned i = 0; i < 32; ++i) same |= unsigned{i % 5 == lane % 5} << i;
    CHECK(out[96 + lane] == same);
    CHECK(out[128 + lane] == (low ? 0xffffu : 0u) && out[160 + lane] == (low ? 1u : 0u));
  }
}

TEST(warp_reductions) {
  std::vector<unsigned> in(32), out(256);
  for (unsigned& x : in) x = random_bits() << 1;
  launch<reduce_all>(1, 32, 0, nullptr, velm::device::global<const unsigned>(view(in)), global(out));
  unsigned expected[8] = {0, ~0u, 0, 0x7fffffff, 0x80000000, ~0u, 0, 0};
  for (const unsigned x : in) {
    expected[0] += x;
    expected[1] = std::min(expected[1], x);
    expected[2] = std::max(expected[2], x);
    expected[3] = static_cast<unsigned>(std::min(static_cast<int>(expected[3]), static_cast<int>(x)));
    expected[4] = static_cast<unsigned>(std::max(static_cast<int>(expected[4]), static_cast<int>(x)));
    expected[5] &= x;
    expected[6] |= x;
    expected[7] ^= x;
  }
  for (unsigned i = 0; i < 256; ++i) CHECK(out[i] == expected[i / 32]);
}

TEST(atomics) {
  std::vector<int> total(4);
  std::vector<float> sum(1);
  launch<count_bins>(3, 64, 0, nullptr, global(total), global(sum));
  for (int bin = 0; bin < 4; ++bin) {
    int expected = 0;
    for (int i = bin; i < 64; i += 4) expected += 3 * i;
    CHECK(total[static_cast<size_t>(bin)] == expected);
  }
  CHECK(sum[0] == 96);
  std::vector<unsigned> out{100, 0, 99, ~0u, 0, 0, 0, 0};
  launch<every_atomic>(1, 32, 0, nullptr, global(out));
  CHECK(out[0] == 68 && out[1] == 31 && out[2] == 0 && out[3] == 0 && out[4] == ~0u);
  CHECK(out[5] == (0xffffffffu ^ 0xfffffffeu) && out[6] == out[7] && out[7] != 0);
}

TEST(the_order_of_threads_does_not_matter) {
  options().reverse = true;
  for (const char* name : {"grid_and_block_indices", "barrier", "named_barrier", "shuffles", "lanes_that_come_later",
                           "votes_and_matches", "atomics"})
    tests()[name]();
}

TEST(as_real_threads) {
  options().real_threads = true;
  for (const char* name : {"grid_and_block_indices", "barrier", "barrier_with_predicate", "named_barrier", "shuffles",
                           "lanes_that_come_later", "votes_and_matches", "warp_reductions", "atomics"})
    tests()[name]();
  std::vector<int> out(64);
  // Which of the threads comes first is left to the host.
  for (int i = 0; i < 3; ++i) {
    CHECK_FAULT([] { launch<half_a_barrier>(2, 64, 0, nullptr); }, "is reached by 16 of 64 threads (thread (");
    CHECK_FAULT([&] { launch<part_of_a_shuffle>(3, 32, 0, nullptr, global(out)); },
                "is never reached by lanes 0x00000020 (thread (5,0,0) has returned)");
    CHECK_FAULT([&] { launch<two_masks>(1, 32, 0, nullptr, global(out)); }, "a vote with mask");
  }
}

TEST(fault_launch_configurations) {
  CHECK_FAULT([] { launch<do_nothing>(1, 1025, 0, nullptr); }, "do_nothing: a block of (1025,1,1)");
  CHECK_FAULT([] { launch<do_nothing>(0, 32, 0, nullptr); }, "a grid of (0,1,1)");
  CHECK_FAULT([] { launch<do_nothing>(dim3(1, 65536), 32, 0, nullptr); }, "a grid of (1,65536,1)");
  CHECK_FAULT([] { launch<do_nothing>(1, 32, 100 * 1024, nullptr); }, "102400 bytes of shared memory");
}

TEST(runs_on_after_a_fault) {
  for (int i = 0; i < 3; ++i) {
    CHECK_FAULT([] { launch<half_a_barrier>(1, 64, 0, nullptr); }, "barrier 0");
    tests()["barrier"]();
  }
}
