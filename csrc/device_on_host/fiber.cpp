#include "device_on_host/fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" {
// Present in a program that is linked with AddressSanitizer, and only there.
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, std::size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, std::size_t* bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* p, std::size_t bytes);

#if defined(__x86_64__)
// Saves what the System V ABI says a callee must preserve, and nothing else: a switch is a call like any other for the
// compiler. The floating-point control words are part of that, but no kernel changes them. glibc's swapcontext also
// saves the signal mask, which is a system call each time: some 200 ns instead of 2.
void device_on_host_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl device_on_host_switch
.hidden device_on_host_switch
.type device_on_host_switch, @function
device_on_host_switch:
  .cfi_startproc
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .cfi_endproc
.size device_on_host_switch, .-device_on_host_switch
)");
#endif
}

namespace device_on_host {

Stack::Stack(std::size_t bytes) : guard_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
  bytes_ = (bytes + guard_ - 1) / guard_ * guard_ + guard_;
  memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory_ == MAP_FAILED) throw std::bad_alloc();
  // A kernel that overruns its stack ends here instead of in another thread's.
  mprotect(memory_, guard_, PROT_NONE);
}

Stack::~Stack() {
  if (memory_) munmap(memory_, bytes_);
}

Stack::Stack(Stack&& other) noexcept
    : memory_(std::exchange(other.memory_, nullptr)), bytes_(other.bytes_), guard_(other.guard_) {
}

#if defined(__x86_64__)
Context Stack::start(void (*entry)(), unsigned colour) {
  char* low = static_cast<char*>(memory_) + guard_;
  // What an abandoned thread left behind.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(low, bytes_ - guard_);
  char* top = static_cast<char*>(memory_) + bytes_ - 64 - colour % 16 * 256;
  // Popped by the switch: six registers, the address to return to, and the return address that `entry` never uses,
  // after which the stack is aligned as on any entry to a function.
  void** frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry);
  return Context{frame, nullptr, low, bytes_ - guard_};
}

static void jump(Context& from, Context& to) {
  device_on_host_switch(&from.stack_pointer, to.stack_pointer);
}
#else
// Elsewhere the portable way; a ucontext_t lives at the low end of its stack.
Context Stack::start(void (*entry)(), unsigned colour) {
  char* low = static_cast<char*>(memory_) + guard_;
  auto* context = new (low) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = low + sizeof(ucontext_t) + 64;
  context->uc_stack.ss_size = bytes_ - guard_ - sizeof(ucontext_t) - 128 - colour % 16 * 256;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return Context{context, nullptr, low, bytes_ - guard_};
}

static void jump(Context& from, Context& to) {
  // On the stack that is suspended, so that it lives as long as it is needed.
  ucontext_t here;
  from.stack_pointer = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to.stack_pointer));
}
#endif

Context this_context() {
  Context context;
  pthread_attr_t attributes;
  if (__sanitizer_start_switch_fiber && pthread_getattr_np(pthread_self(), &attributes) == 0) {
    void* stack = nullptr;
    pthread_attr_getstack(&attributes, &stack, &context.bytes);
    context.stack = stack;
    pthread_attr_destroy(&attributes);
  }
  return context;
}

void switch_context(Context& from, Context& to) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
  jump(from, to);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void entered_context() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}

}  // namespace device_on_host
