// A switch saves what a function call preserves: six registers, the stack pointer and the two floating-point control words. That
// takes some 5 ns on x86-64. swapcontext, for other processors, also saves the signal mask, by a system call each way.
#include "fiber.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MK_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define MK_ASAN 1
#endif
#if MK_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace mk::simt::host {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // of address space; pages come when they are touched

Fiber* left = nullptr;  // the fiber that the switch under way leaves

void switch_stack(Fiber& from, Fiber& to);

// AddressSanitizer has to know which stack is in use. `keep` is where it leaves its own state of the stack that is left.
void announce(void** keep, Fiber& from, Fiber& to) {
  left = &from;
#if MK_ASAN
  __sanitizer_start_switch_fiber(keep, to.stack, to.bytes);
#else
  (void)keep, (void)to;
#endif
}
void arrived(void* kept) {
#if MK_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(kept, &bottom, &bytes);
  if (!left->stack || !left->bytes) {  // where the program started: known from here on
    left->stack = static_cast<char*>(const_cast<void*>(bottom));
    left->bytes = bytes;
  }
#else
  (void)kept;
#endif
}

}  // namespace

void allocate(Fiber& fiber) {
  size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) abort();
  fiber.stack = static_cast<char*>(memory) + page;
  fiber.bytes = kStackBytes;
}

void enter_fiber() { arrived(nullptr); }

void switch_fiber(Fiber& from, Fiber& to) {
  announce(&from.sanitizer, from, to);
  switch_stack(from, to);
  arrived(from.sanitizer);
}

void leave_fiber(Fiber& from, Fiber& to) {
  announce(nullptr, from, to);
  switch_stack(from, to);
}

#if MK_HAS_UCONTEXT

void prepare(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

namespace {
void switch_stack(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
}  // namespace

#else

// void mk_simt_switch(void** save, void* load)
asm(R"(
.text
.p2align 4
.hidden mk_simt_switch
.globl mk_simt_switch
.type mk_simt_switch, @function
mk_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mk_simt_switch, .-mk_simt_switch
)");
extern "C" void mk_simt_switch(void** save, void* load);

void prepare(Fiber& fiber, void (*entry)()) {
  // From the top: nothing to return to, `entry`, six registers, the control words. A function begins 8 bytes below a multiple
  // of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.bytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  uint32_t* control = reinterpret_cast<uint32_t*>(--top);
  asm volatile("stmxcsr %0" : "=m"(control[0]));
  asm volatile("fnstcw %0" : "=m"(control[1]));
  fiber.pointer = top;
}

namespace {
void switch_stack(Fiber& from, Fiber& to) { mk_simt_switch(&from.pointer, to.pointer); }
}  // namespace

#endif

}  // namespace mk::simt::host
