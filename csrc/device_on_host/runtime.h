// What a launch on the host is made of, as the language, the memory types and the tests see it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace device_on_host __attribute__((visibility("default"))) {

  // What a kernel did that a device would not define; names kernel, block and thread.
  class Fault : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
  };

  struct Counters {
    uint64_t global_bytes_read = 0, global_bytes_written = 0;
    // Instructions of a whole warp.
    uint64_t matrix_instructions = 0, ldmatrix_instructions = 0;
    uint64_t block_barriers = 0;
    // With Options::bank_conflicts: accesses to shared memory by a warp, the passes over the banks that they took, and
    // how many of these would not have been needed had no two lanes met in a bank.
    uint64_t shared_accesses = 0, shared_passes = 0, bank_conflicts = 0;

    void operator+=(const Counters& other);
  };

  struct LaunchRecord {
    std::string kernel;
    dim3 grid, block;
    std::size_t shared_bytes = 0;
    Counters counters;
  };

  struct Options {
    // Blocks run on this many threads of the host.
    int host_threads = 1;
    // The last lane, warp and block runs first: what a kernel computes must not depend on the order.
    bool reverse = false;
    bool bank_conflicts = false;
    // Every thread of a block is a thread of the host, so that ThreadSanitizer sees who is ordered with whom.
    bool real_threads = false;
    // What a block may have at most: the least of sm_80 (163 KiB), sm_90 and sm_100 (227 KiB) and sm_120.
    std::size_t shared_limit = 99 * 1024;
    std::size_t stack_bytes = 256 * 1024;
  };

  // Begin as the environment says: DEVICE_ON_HOST_THREADS, DEVICE_ON_HOST_REVERSE, DEVICE_ON_HOST_BANK_CONFLICTS.
  Options& options();

  // The launches since the last call, oldest first (the latest 4096 at most).
  std::vector<LaunchRecord> take_launches();

  struct Block;
  struct Warp;

  struct PendingCopy {
    void* to;
    unsigned bytes, group;
    alignas(16) unsigned char data[16];
  };

  struct SharedAccess {
    const void* site;
    uint64_t offset;
    unsigned bytes;
  };

  enum class Collective : uint8_t { none, syncwarp, shuffle, vote, match, reduce, mma, ldmatrix };

  // One thread of a block. The kernel's view comes first.
  struct Thread {
    uint3 thread_index{};
    unsigned index = 0, lane = 0;
    Block* block = nullptr;
    Warp* warp = nullptr;
    Counters* counters = nullptr;
    bool watches_banks = false;

    // where it waits
    Collective waits_in = Collective::none;
    uint32_t mask = 0;
    void* payload = nullptr;
    int barrier = -1, barrier_result = 0;
    bool done = false;

    std::vector<PendingCopy> copies;
    unsigned copy_group = 0;
    std::vector<SharedAccess> accesses;
    Counters own_counters;
  };

  // A plain load from the thread's own block of memory: the default model of shared libraries would call a function for
  // every access of a kernel to anything.
  extern __thread Thread* self __attribute__((tls_model("initial-exec")));

  uint3 block_index();
  const dim3& block_size();
  const dim3& grid_size();

  // Ends the launch with an error that begins with kernel, block and thread.
  [[noreturn, gnu::cold]] void fail(const std::string& what);

  using Call = void (*)(const void* arguments);
  void run(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Call call, const void* arguments,
           bool real_threads);

  // f() for every thread of the grid; the kernel's name as the compiler writes it in a template's signature.
  template <class F>
  void launch(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, const F& f) {
#if defined(__SANITIZE_THREAD__)
    constexpr bool real_threads = true;
#else
    constexpr bool real_threads = false;
#endif
    run(kernel, grid, block, shared_bytes, [](const void* p) { (*static_cast<const F*>(p))(); }, &f, real_threads);
  }

  // Shared memory of the running block. Static memory is found by an address that is the same for all its threads.
  void* dynamic_shared_memory(std::size_t bytes);
  void* static_shared_memory(const void* key, std::size_t bytes);
  bool in_shared_memory(const void* p, std::size_t bytes);

  int barrier_wait(int id, int threads, bool predicate, bool waits);
  void collective(Collective kind, uint32_t mask, void* payload);
  // Not inlined, so that the address it returns to tells one access of a kernel from another.
  [[gnu::noinline]] void note_shared_access(const void* at, unsigned bytes);

  // cp.async of this thread: the copies that a wait for all but `groups_left` groups makes visible, oldest first. The
  // caller writes them to shared memory and drops them.
  void async_add(const PendingCopy& copy);
  void async_commit();
  const PendingCopy* async_due(unsigned groups_left, std::size_t& count);
  void async_drop(std::size_t count);

  // For ThreadSanitizer: this thread reads what an instruction of its warp reads in its name.
  void note_read_16(const void* p);

}  // namespace device_on_host
