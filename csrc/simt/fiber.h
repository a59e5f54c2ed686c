// Stacks to run functions on, and the switch between them.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if !defined(__x86_64__) || defined(MK_UCONTEXT)
#include <ucontext.h>
#define MK_HAS_UCONTEXT 1
#endif

namespace mk::simt::host {

struct Fiber {
  char* stack = nullptr;  // null: the stack that the program started on
  size_t bytes = 0;
  void* sanitizer = nullptr;
#if MK_HAS_UCONTEXT
  ucontext_t context;
#else
  void* pointer = nullptr;  // the stack pointer while it does not run
#endif
};

// Gives the fiber a stack, with an inaccessible page below it.
void allocate(Fiber&);
// The next switch to the fiber begins `entry`, which must never return.
void prepare(Fiber&, void (*entry)());
// Runs `to` until something switches back to `from`.
void switch_fiber(Fiber& from, Fiber& to);
// The same from a fiber that nobody will switch to before it is prepared again.
void leave_fiber(Fiber& from, Fiber& to);
// The first thing that a fiber's entry does.
void enter_fiber();

}  // namespace mk::simt::host
