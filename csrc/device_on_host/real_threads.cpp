// The thorough way: every thread of a block is a thread of the host, and ThreadSanitizer watches what they share.
//
// The runtime is compiled without ThreadSanitizer, and waits by system calls that it does not know: what orders two
// threads of the host must not make up for a barrier that the kernel forgot. Where CUDA does order them, barrier_wait
// and collective say so.

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>

#include "device_on_host/block.h"

extern "C" {
__attribute__((weak)) void __tsan_acquire(void* p);
__attribute__((weak)) void __tsan_release(void* p);
}

namespace device_on_host {
namespace {

using Word = std::atomic<uint32_t>;

void wait_while(Word& word, uint32_t value) {
  while (word.load(std::memory_order_acquire) == value)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void change(Word& word, uint32_t value) {
  word.store(value, std::memory_order_release);
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
}

class RealBlock final : public Block {
 public:
  RealBlock(const Launch& launch, SharedMemory& shared, Thread* threads)
      : Block(launch, shared, threads), tokens_(std::make_unique<Word[]>(size)), running_(size) {
    // Memory that one thread allocated and another frees would look like a race.
    for (Barrier& barrier : barriers) barrier.waiting.reserve(size);
  }

  // The main thread's part; the others call run_one.
  void execute() override {
    wait_while(ended_, 0);
    if (!failed) return;
    if (__tsan_acquire) __tsan_acquire(this);
    throw Fault(failure);
  }

  void run_one(Thread& thread) {
    self = &thread;
    run_thread(thread);
    lock();
    --running_;
    ++returned_;
    if (failed)
      wake_all();
    else if (running_ == 0 && returned_ < size)
      stand_still();
    const bool last = returned_ == size;
    if (failed && __tsan_release) __tsan_release(this);
    unlock();
    self = nullptr;
    if (last) change(ended_, 1);
  }

  void park() override {
    Thread& thread = *self;
    Word& token = tokens_[thread.index];
    const uint32_t before = token.load(std::memory_order_relaxed);
    --running_;
    if (!failed && running_ == 0) stand_still();
    if (!failed) {
      unlock();
      wait_while(token, before);
      lock();
    }
    const bool abandoned = failed;
    unlock();
    if (abandoned) {
      ++running_;
      throw Abandoned{};
    }
  }

  void wake(Thread& thread) override {
    ++running_;
    Word& token = tokens_[thread.index];
    change(token, token.load(std::memory_order_relaxed) + 1);
  }

  void lock() override {
    while (locked_.exchange(true, std::memory_order_acquire)) sched_yield();
  }
  void unlock() override { locked_.store(false, std::memory_order_release); }

 private:
  void stand_still() {
    record_failure(describe_standstill());
    wake_all();
  }
  void wake_all() {
    for (unsigned i = 0; i < size; ++i) change(tokens_[i], tokens_[i].load(std::memory_order_relaxed) + 1);
  }

  std::unique_ptr<Word[]> tokens_;
  std::atomic<bool> locked_{false};
  std::atomic<unsigned> running_;
  unsigned returned_ = 0;
  Word ended_{0};
};

}  // namespace

void run_real_threads(const Launch& launch, Counters& total) {
  const uint64_t count = launch.blocks();
  std::vector<Thread> threads(launch.threads());
  // Every block has its own memory from the beginning, since reusing it would order the blocks.
  std::vector<std::unique_ptr<SharedMemory>> shared;
  std::vector<std::unique_ptr<RealBlock>> blocks;
  for (uint64_t i = 0; i < count; ++i) {
    shared.push_back(std::make_unique<SharedMemory>(launch.dynamic_bytes));
    shared.back()->begin(launch.dynamic_bytes);
    blocks.push_back(std::make_unique<RealBlock>(launch, *shared.back(), threads.data()));
  }
  for (Thread& thread : threads) thread.counters = &thread.own_counters;

  // Blocks run one after the other.
  Word turn{0};
  bool stop = false;
  std::vector<std::thread> hosts;
  for (Thread& thread : threads)
    hosts.emplace_back([&, &thread = thread] {
      for (uint32_t i = 0; i < count; ++i) {
        wait_while(turn, i);
        if (stop) return;
        blocks[i]->run_one(thread);
      }
    });
  std::exception_ptr error;
  for (uint32_t i = 0; i < count && !error; ++i) {
    RealBlock& block = *blocks[i];
    // The threads were last prepared for another block.
    for (unsigned t = 0; t < block.size; ++t) {
      threads[t].block = &block;
      threads[t].warp = &block.warps[t / kLanes];
    }
    block.begin(i);
    change(turn, i + 1);
    try {
      block.execute();
    } catch (const Fault&) {
      error = std::current_exception();
      stop = true;
      change(turn, static_cast<uint32_t>(count) + 1);
    }
    const std::string damage = shared[i]->damage();
    if (!damage.empty() && !error) {
      error = std::make_exception_ptr(Fault(name_of(launch, &block.index, nullptr) + ": " + damage));
      stop = true;
      change(turn, static_cast<uint32_t>(count) + 1);
    }
    if (launch.options.bank_conflicts && !error)
      for (Warp& warp : block.warps) settle_shared_accesses(warp, threads[0].own_counters);
  }
  for (std::thread& host : hosts) host.join();
  for (const Thread& thread : threads) total += thread.own_counters;
  if (error) std::rethrow_exception(error);
}

}  // namespace device_on_host
