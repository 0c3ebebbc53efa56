#include "device_on_host/block.h"

#include <cstdio>

#include "device_on_host/memory.h"

extern "C" {
// Present in a program that is linked with ThreadSanitizer, and only there.
__attribute__((weak)) void __tsan_acquire(void* p);
__attribute__((weak)) void __tsan_release(void* p);
__attribute__((weak)) void __tsan_read16(void* p);
}

namespace device_on_host {

__thread Thread* self __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

void acquire(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}
void release(void* p) {
  if (__tsan_release) __tsan_release(p);
}

std::string hexadecimal(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string triple(const uint3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string whereabouts(const Thread& thread) {
  const std::string who = "thread " + triple(thread.thread_index);
  if (thread.done) return who + " has returned";
  if (thread.barrier >= 0) return who + " waits at barrier " + std::to_string(thread.barrier);
  if (thread.waits_in != Collective::none)
    return who + " waits in " + name_of(thread.waits_in) + " with mask " + hexadecimal(thread.mask);
  return who + " is running";
}

}  // namespace

std::string name_of(const Launch& launch, const uint3* block, const Thread* thread) {
  std::string name = launch.kernel;
  if (block) name += ", block " + triple(*block);
  if (thread) name += ", thread " + triple(thread->thread_index);
  return name;
}

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::syncwarp:
      return "__syncwarp";
    case Collective::shuffle:
      return "a __shfl_sync";
    case Collective::vote:
      return "a vote";
    case Collective::match:
      return "a __match_sync";
    case Collective::reduce:
      return "a __reduce_sync";
    case Collective::mma:
      return "mma.sync";
    case Collective::ldmatrix:
      return "ldmatrix.sync";
    default:
      return "nothing";
  }
}

uint3 block_index() {
  return self->block->index;
}
const dim3& block_size() {
  return self->block->launch.block;
}
const dim3& grid_size() {
  return self->block->launch.grid;
}

void fail(const std::string& what) {
  throw Fault(name_of(self->block->launch, &self->block->index, self) + ": " + what);
}

Block::Block(const Launch& launch, SharedMemory& shared, Thread* threads)
    : launch(launch), shared(shared), threads(threads), size(launch.threads()), warps((size + kLanes - 1) / kLanes) {
  for (unsigned i = 0; i < size; ++i) {
    Thread& t = threads[i];
    t.index = i;
    t.lane = i % kLanes;
    t.thread_index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
    t.block = this;
    t.watches_banks = launch.options.bank_conflicts;
    t.warp = &warps[i / kLanes];
    t.warp->threads[t.lane] = &t;
    t.warp->existing |= 1u << t.lane;
  }
}

void Block::begin(uint64_t linear) {
  const dim3& grid = launch.grid;
  index = {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
           static_cast<unsigned>(linear / (uint64_t{grid.x} * grid.y))};
  failed = false;
  failure.clear();
  for (Warp& warp : warps) warp.arrived = 0;
  for (Barrier& barrier : barriers) {
    barrier.arrived = barrier.expected = barrier.with_predicate = 0;
    barrier.waiting.clear();
  }
  for (unsigned i = 0; i < size; ++i) {
    Thread& t = threads[i];
    t.done = false;
    t.barrier = -1;
    t.waits_in = Collective::none;
    t.copies.clear();
    t.copy_group = 0;
    t.accesses.clear();
  }
}

void Block::record_failure(std::string what) {
  if (failed) return;
  failed = true;
  failure = std::move(what);
}

void Block::run_thread(Thread& thread) {
  try {
    launch.call(launch.arguments);
  } catch (const Abandoned&) {
  } catch (const std::exception& error) {
    lock();
    record_failure(error.what());
    unlock();
  }
  thread.done = true;
}

void Block::stop_here(const std::string& what) {
  unlock();
  fail(what);
}

std::string Block::describe_standstill() const {
  const auto at = [&](const Thread& thread) { return name_of(launch, &index, &thread) + ": "; };
  for (const Warp& warp : warps) {
    if (!warp.arrived) continue;
    const Thread& first = *warp.threads[__builtin_ctz(warp.arrived)];
    std::string text = at(first) + name_of(first.waits_in) + " with mask " + hexadecimal(first.mask) +
                       " is never reached by lanes " + hexadecimal(first.mask & ~warp.arrived) + " (";
    if (!(first.mask & ~warp.arrived)) return at(first) + "lanes wait for each other in different warp collectives";
    return text + whereabouts(*warp.threads[__builtin_ctz(first.mask & ~warp.arrived)]) + ")";
  }
  for (unsigned id = 0; id < kBarriers; ++id) {
    const Barrier& barrier = barriers[id];
    if (barrier.waiting.empty()) continue;
    const Thread& first = *barrier.waiting.front();
    std::string text = at(first) + "barrier " + std::to_string(id) + (id ? "" : " (__syncthreads)") +
                       " is reached by " + std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
                       " threads";
    for (unsigned i = 0; i < size; ++i)
      if (threads[i].barrier != static_cast<int>(id)) return text + " (" + whereabouts(threads[i]) + ")";
    return text;
  }
  return name_of(launch, &index, nullptr) + ": no thread can go on";
}

int barrier_wait(int id, int count, bool predicate, bool waits) {
  Thread& thread = *self;
  Block& block = *thread.block;
  if (id < 0 || id >= static_cast<int>(kBarriers)) fail("there is no barrier " + std::to_string(id) + ", only 0 to 15");
  const unsigned expected = count < 0 ? block.size : static_cast<unsigned>(count);
  if (count >= 0 && (expected % kLanes != 0 || expected == 0 || expected > block.size))
    fail("barrier " + std::to_string(id) + " for " + std::to_string(count) +
         " threads: the number must be a multiple of 32 and no more than the block has");
  block.lock();
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived && barrier.expected != expected)
    block.stop_here("barrier " + std::to_string(id) + " is for " + std::to_string(barrier.expected) +
                    " threads elsewhere and for " + std::to_string(expected) + " here");
  barrier.expected = expected;
  ++barrier.arrived;
  barrier.with_predicate += predicate;
  const unsigned phase = barrier.phase & 1;
  release(&barrier.order[phase]);
  if (barrier.arrived == expected) {
    const int result = static_cast<int>(barrier.with_predicate);
    for (Thread* other : barrier.waiting) {
      other->barrier = -1;
      other->barrier_result = result;
      block.wake(*other);
    }
    barrier.arrived = barrier.with_predicate = 0;
    barrier.waiting.clear();
    ++barrier.phase;
    thread.barrier_result = result;
    if (expected == block.size) {
      ++thread.counters->block_barriers;
      if (block.launch.options.bank_conflicts)
        for (Warp& warp : block.warps) settle_shared_accesses(warp, *thread.counters);
    }
    block.unlock();
  } else if (waits) {
    thread.barrier = id;
    barrier.waiting.push_back(&thread);
    block.park();
  } else {
    block.unlock();
    return 0;
  }
  acquire(&barrier.order[phase]);
  return thread.barrier_result;
}

void collective(Collective kind, uint32_t mask, void* payload) {
  Thread& thread = *self;
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  const uint32_t me = 1u << thread.lane;
  if (!(mask & me))
    fail(std::string(name_of(kind)) + " with mask " + hexadecimal(mask) + " does not name its own lane");
  if (mask & ~warp.existing)
    fail(std::string(name_of(kind)) + " with mask " + hexadecimal(mask) +
         " names lanes that the block does not have: " + hexadecimal(mask & ~warp.existing));
  block.lock();
  thread.waits_in = kind;
  thread.mask = mask;
  thread.payload = payload;
  warp.arrived |= me;
  const unsigned lowest = static_cast<unsigned>(__builtin_ctz(mask));
  char* order = kind == Collective::syncwarp ? &warp.order[warp.phase[lowest] & 1][lowest] : nullptr;
  if (order) release(order);
  if ((warp.arrived & mask) == mask) {
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const Thread& other = *warp.threads[lane];
      if (other.waits_in != kind || other.mask != mask)
        block.stop_here(std::string(name_of(kind)) + " with mask " + hexadecimal(mask) + ", but " + whereabouts(other));
    }
    const std::string wrong = perform(kind, warp, mask);
    if (!wrong.empty()) block.stop_here(wrong);
    if (block.launch.options.bank_conflicts && mask == warp.existing) settle_shared_accesses(warp, *thread.counters);
    if (order) ++warp.phase[lowest];
    warp.arrived &= ~mask;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& other = *warp.threads[lane];
      other.waits_in = Collective::none;
      if (&other != &thread) block.wake(other);
    }
    block.unlock();
  } else {
    block.park();
  }
  if (order) acquire(order);
}

void* dynamic_shared_memory(std::size_t bytes) {
  SharedMemory& shared = self->block->shared;
  if (shared.dynamic_bytes() < bytes)
    fail("wants " + std::to_string(bytes) + " bytes of dynamic shared memory, and the launch gave " +
         std::to_string(shared.dynamic_bytes()));
  return shared.dynamic();
}

void* static_shared_memory(const void* key, std::size_t bytes) {
  Block& block = *self->block;
  block.lock();
  void* found = block.shared.find_static(key, bytes);
  const std::size_t used = block.shared.used(), limit = block.launch.options.shared_limit;
  if (used > limit)
    block.stop_here("wants " + std::to_string(used) + " bytes of shared memory, and a block can have " +
                    std::to_string(limit));
  block.unlock();
  return found;
}

bool in_shared_memory(const void* p, std::size_t bytes) {
  return self->block->shared.contains(p, bytes);
}

void note_shared_access(const void* at, unsigned bytes) {
  self->accesses.push_back({__builtin_return_address(0), self->block->shared.offset(at), bytes});
}

void bad_index(long long index, long long size) {
  fail("index " + std::to_string(index) + " into a dimension of " + std::to_string(size) + " of a shared array");
}

void bad_access(Space space, const void* at, std::size_t bytes, std::size_t alignment, const Extent& extent,
                bool writes) {
  const char* p = static_cast<const char*>(at);
  std::string what = std::string(space == Space::global ? "global " : "shared ") + (writes ? "write of " : "read of ") +
                     std::to_string(bytes) + " bytes ";
  if (!extent.begin) fail(what + "through a null pointer");
  what += "at byte " + std::to_string(p - extent.begin) + " of an array of " + std::to_string(extent.bytes) + " bytes";
  if (!extent.holds(at, bytes)) fail(what + ": out of bounds");
  fail(what + ": misaligned, it must be a multiple of " + std::to_string(alignment));
}

void async_add(const PendingCopy& copy) {
  self->copies.push_back(copy);
  self->copies.back().group = self->copy_group;
}

void async_commit() {
  ++self->copy_group;
}

const PendingCopy* async_due(unsigned groups_left, std::size_t& count) {
  const std::vector<PendingCopy>& copies = self->copies;
  const unsigned committed = self->copy_group;
  count = 0;
  while (count < copies.size() && copies[count].group + groups_left < committed) ++count;
  return copies.data();
}

void async_drop(std::size_t count) {
  self->copies.erase(self->copies.begin(), self->copies.begin() + static_cast<std::ptrdiff_t>(count));
}

void note_read_16(const void* p) {
  if (__tsan_read16) __tsan_read16(const_cast<void*>(p));
}

}  // namespace device_on_host
