// Stacks of their own for the threads of a block, and the switch between them.
#pragma once

#include <cstddef>

namespace device_on_host {

// Where a suspended computation goes on. `stack` and `bytes` are the stack it runs on, which AddressSanitizer is told.
struct Context {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  std::size_t bytes = 0;
};

class Stack {
 public:
  explicit Stack(std::size_t bytes);
  ~Stack();
  Stack(Stack&& other) noexcept;
  Stack(const Stack&) = delete;

  // A context that calls `entry` on this stack; `entry` must never return. `colour` moves the first frame, so that the
  // same variable of neighbouring threads does not fall into the same set of the cache.
  Context start(void (*entry)(), unsigned colour);

 private:
  void* memory_ = nullptr;
  std::size_t bytes_ = 0, guard_ = 0;
};

// The context of the host thread that calls.
Context this_context();
// Suspends `from`, which is running, and goes on with `to`.
void switch_context(Context& from, Context& to);
// The first thing a new context does.
void entered_context();

}  // namespace device_on_host
