// The fast way: a block is one host thread, its threads are fibers that are switched where they wait for each other.

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "device_on_host/block.h"
#include "device_on_host/fiber.h"

namespace device_on_host {
namespace {

void fiber_main();

class FiberBlock final : public Block {
 public:
  FiberBlock(const Launch& launch, SharedMemory& shared, Thread* threads, std::vector<Stack>& stacks)
      : Block(launch, shared, threads), main_(this_context()), contexts_(size) {
    while (stacks.size() < size) stacks.emplace_back(launch.options.stack_bytes);
    for (unsigned i = 0; i < size; ++i) contexts_[i] = stacks[i].start(fiber_main, i);
  }

  void execute() override {
    for (unsigned w = 0; w < warps.size(); ++w) ready_[w] = warps[w].existing;
    ready_warps_ = warps.size() == 32 ? ~0u : (1u << warps.size()) - 1;
    self = take_ready(launch.options.reverse ? static_cast<unsigned>(warps.size()) - 1 : 0);
    switch_context(main_, contexts_[self->index]);
    self = nullptr;
    if (failed) throw Fault(failure);
    for (unsigned i = 0; i < size; ++i)
      if (!threads[i].done) throw Fault(describe_standstill());
  }

  void park() override { leave(*self); }

  void wake(Thread& thread) override {
    ready_[thread.index / kLanes] |= 1u << thread.lane;
    ready_warps_ |= 1u << thread.index / kLanes;
  }

  // Straight to the next thread that can run; to execute() if there is none or the block has failed.
  void leave(Thread& thread) {
    Thread* next = failed ? nullptr : take_ready(thread.index / kLanes);
    self = next;
    switch_context(contexts_[thread.index], next ? contexts_[next->index] : main_);
  }

 private:
  // Of the same warp as long as it has any: its lanes meet soonest, and what they use is still in the cache.
  Thread* take_ready(unsigned warp) {
    const bool last = launch.options.reverse;
    const auto pick = [last](uint32_t set) {
      return static_cast<unsigned>(last ? 31 - __builtin_clz(set) : __builtin_ctz(set));
    };
    if (!ready_[warp]) {
      if (!ready_warps_) return nullptr;
      warp = pick(ready_warps_);
    }
    const unsigned lane = pick(ready_[warp]);
    ready_[warp] &= ~(1u << lane);
    if (!ready_[warp]) ready_warps_ &= ~(1u << warp);
    return &threads[warp * kLanes + lane];
  }

  Context main_;
  std::vector<Context> contexts_;
  uint32_t ready_[kMaxThreads / kLanes] = {}, ready_warps_ = 0;
};

// A fiber runs its thread of one block after the other.
void fiber_main() {
  entered_context();
  for (;;) {
    Thread& thread = *self;
    auto& block = static_cast<FiberBlock&>(*thread.block);
    block.run_thread(thread);
    block.leave(thread);
  }
}

// What a host thread keeps from launch to launch: mapping stacks costs more than a small launch.
struct Worker {
  std::vector<Stack> stacks;
  std::vector<Thread> threads;
  std::unique_ptr<SharedMemory> shared;
  std::size_t shared_limit = 0, stack_bytes = 0;

  void fit(const Launch& launch) {
    if (threads.size() < launch.threads()) threads = std::vector<Thread>(launch.threads());
    if (!shared || shared_limit < launch.options.shared_limit) {
      shared_limit = launch.options.shared_limit;
      shared = std::make_unique<SharedMemory>(shared_limit);
    }
    if (stack_bytes != launch.options.stack_bytes) stacks.clear();
    stack_bytes = launch.options.stack_bytes;
  }
};

}  // namespace

void run_fibers(const Launch& launch, Counters& total) {
  const uint64_t blocks = launch.blocks();
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    thread_local Worker worker;
    Counters counters;
    try {
      worker.fit(launch);
      FiberBlock block(launch, *worker.shared, worker.threads.data(), worker.stacks);
      for (unsigned i = 0; i < block.size; ++i) worker.threads[i].counters = &counters;
      for (uint64_t i; !failed && (i = next++) < blocks;) {
        worker.shared->begin(launch.dynamic_bytes);
        block.begin(launch.options.reverse ? blocks - 1 - i : i);
        block.execute();
        if (launch.options.bank_conflicts)
          for (Warp& warp : block.warps) settle_shared_accesses(warp, counters);
        const std::string damage = worker.shared->damage();
        if (!damage.empty()) {
          worker.shared.reset();
          throw Fault(name_of(launch, &block.index, nullptr) + ": " + damage);
        }
      }
    } catch (...) {
      failed = true;
      const std::lock_guard<std::mutex> guard(mutex);
      if (!error) error = std::current_exception();
    }
    const std::lock_guard<std::mutex> guard(mutex);
    total += counters;
  };
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < std::min<uint64_t>(static_cast<uint64_t>(launch.options.host_threads), blocks); ++i)
    helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace device_on_host
