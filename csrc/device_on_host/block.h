// A running block: its threads, where they wait for each other, its shared memory. Not for kernels.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "device_on_host/runtime.h"

namespace device_on_host {

constexpr unsigned kLanes = 32, kMaxThreads = 1024, kBarriers = 16;

// Thrown to unwind a thread of a block that has failed elsewhere.
struct Abandoned {};

struct Launch {
  std::string kernel;
  dim3 grid, block;
  std::size_t dynamic_bytes = 0;
  Call call = nullptr;
  const void* arguments = nullptr;
  Options options;

  uint64_t blocks() const { return uint64_t{grid.x} * grid.y * grid.z; }
  unsigned threads() const { return block.x * block.y * block.z; }
};

struct Warp {
  Thread* threads[kLanes] = {};
  // Lanes that the block has, and those that wait for others in a collective.
  uint32_t existing = 0, arrived = 0;
  // For ThreadSanitizer: who left __syncwarp is ordered after who entered it. Two, since a fast lane may enter the next
  // one before a slow lane has left this one; by the lowest lane, since disjoint masks do not order each other.
  char order[2][kLanes];
  unsigned phase[kLanes] = {};
};

struct Barrier {
  unsigned arrived = 0, expected = 0, with_predicate = 0;
  std::vector<Thread*> waiting;
  unsigned phase = 0;
  char order[2];
};

// Shared memory of one block, between red zones.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t capacity);
  ~SharedMemory();
  void begin(std::size_t dynamic_bytes);
  void* dynamic() const { return data(); }
  std::size_t dynamic_bytes() const { return dynamic_bytes_; }
  std::size_t used() const { return used_; }
  void* find_static(const void* key, std::size_t bytes);
  bool contains(const void* p, std::size_t bytes) const;
  uint64_t offset(const void* p) const { return static_cast<uint64_t>(static_cast<const char*>(p) - data()); }
  // Empty, or what was written between and around the arrays.
  std::string damage() const;

 private:
  struct Area {
    const void* key;
    std::size_t begin, bytes;
  };
  char* data() const;
  void* add(const void* key, std::size_t bytes);

  std::size_t capacity_, dynamic_bytes_ = 0, used_ = 0, end_ = 0;
  char* memory_ = nullptr;
  std::vector<Area> areas_;
};

// How the threads of a block are suspended and woken: as fibers of one host thread, or as host threads.
struct Block {
  Block(const Launch& launch, SharedMemory& shared, Thread* threads);
  virtual ~Block() = default;
  Block(const Block&) = delete;

  void begin(uint64_t linear_index);
  // Runs all threads to their end; throws Fault.
  virtual void execute() = 0;

  // Suspends the thread that calls until it is woken. Called with the lock, returns without; throws Abandoned.
  virtual void park() = 0;
  virtual void wake(Thread& thread) = 0;
  virtual void lock() {}
  virtual void unlock() {}

  // Body of every thread; no exception leaves it.
  void run_thread(Thread& thread);
  void record_failure(std::string what);
  // Why no thread can go on.
  std::string describe_standstill() const;
  [[noreturn]] void stop_here(const std::string& what);

  const Launch& launch;
  SharedMemory& shared;
  Thread* threads;
  unsigned size;
  uint3 index{};
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  bool failed = false;
  std::string failure;
};

std::string name_of(const Launch& launch, const uint3* block, const Thread* thread);
const char* name_of(Collective kind);

// The instruction of a warp whose lanes `mask` have all arrived; returns what is wrong with it, or nothing.
std::string perform(Collective kind, Warp& warp, uint32_t mask);
// Adds up and forgets the accesses of the warp's lanes to shared memory since they last met.
void settle_shared_accesses(Warp& warp, Counters& counters);

// As fibers or as host threads, for all blocks of a launch.
void run_fibers(const Launch& launch, Counters& total);
void run_real_threads(const Launch& launch, Counters& total);

}  // namespace device_on_host
