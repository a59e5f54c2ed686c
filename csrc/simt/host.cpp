// Runs a launch on the CPU: one block after the other, each thread on a fiber that runs until it has to wait for others. A warp's
// shuffle waits for the warp alone. Where nobody can run and somebody waits, the others took another way: that is a finding, and
// those who wait go on, so that a kernel with a bug ends too.
#include "state.h"

#include <stdio.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>

#include "fiber.h"

namespace mk::simt::host {

Position here;
const char* kernel = "";

namespace {

constexpr int kMaxThreads = 1024, kWarpBarrier = -1;

enum class State : uint8_t { ready, in_warp, in_block, returned };

struct Thread {
  Fiber fiber;
  State state = State::ready;
  Site site{"", 0};
  int argument = 0;  // of the shuffle it waits in: mask, or kWarpBarrier
};
// A lane may reach the next shuffle while others still fetch from this one, so values lie in two sets of slots, used in turn.
struct Warp {
  uint32_t waiting = 0, present[2] = {0, 0};
  unsigned generation = 0;
  uint32_t barriers = 0;
  char slot[2][32][32];
};
struct Block {
  int live = 0, waiting = 0;
  uint32_t barriers = 0;
};

std::unique_ptr<Thread[]> threads;
Warp warps[kMaxThreads / 32];
Block the_block;
Fiber starter;  // where run() was called
Body body;
void* body_context;

uint16_t queue[kMaxThreads];  // threads that can run
unsigned queue_first = 0, queue_size = 0;
uint64_t random_state = 0;

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1du >> 16;
}

// The numbers below n, in an order that differs from call to call unless the seed is 0.
struct Order {
  int64_t at = 0, step = 1, n;
  explicit Order(int64_t count) : n(count) {
    if (!random_state || n < 2) return;
    at = int64_t(random_number() % uint64_t(n));
    do step = 1 + int64_t(random_number() % uint64_t(n - 1));
    while (std::gcd(step, n) != 1);
  }
  int64_t next() {
    int64_t value = at;
    at += step;
    if (at >= n) at -= n;
    return value;
  }
};

void push(int thread) {
  threads[thread].state = State::ready;
  queue[(queue_first + queue_size++) % kMaxThreads] = uint16_t(thread);
}

const char* whereabouts(const Thread& t, char (&text)[160]) {
  if (t.state == State::returned) return "has returned";
  const char* place = t.state == State::in_block ? "a barrier" : t.argument == kWarpBarrier ? "a warp barrier" : "a shuffle";
  snprintf(text, sizeof text, "waits at %s at %s:%d", place, base_name(t.site.file), t.site.line);
  return text;
}

// `one` waits; `another` of its warp or block is not where it should be.
void report_divergence(Kind kind, int one, int another) {
  char here_text[160], there_text[160];
  report(kind, one, threads[one].site, {}, "%s, thread %d %s", whereabouts(threads[one], here_text), another,
         whereabouts(threads[another], there_text));
}

// Lets the waiting lanes of a warp go on; `running` among them needs no place in the queue.
void release_warp(int number, int running) {
  Warp& w = warps[number];
  const Thread* lanes = &threads[number * 32];
  int first = __builtin_ctz(w.waiting);
  for (uint32_t left = w.waiting; left; left &= left - 1) {
    const Thread& t = lanes[__builtin_ctz(left)];
    if (t.site.line == lanes[first].site.line && t.argument == lanes[first].argument &&
        !strcmp(t.site.file, lanes[first].site.file))
      continue;
    report_divergence(Kind::divergent_shuffle, number * 32 + first, number * 32 + __builtin_ctz(left));
    break;
  }
  if (lanes[first].argument == kWarpBarrier) ++w.barriers;
  w.present[w.generation++ & 1] = w.waiting;
  Order order(32);
  for (int i = 0; i < 32; ++i) {
    int lane = int(order.next()), thread = number * 32 + lane;
    if (w.waiting >> lane & 1 && thread != running) push(thread);
  }
  w.waiting = 0;
}

void release_block(int running) {
  int first = -1;
  bool agree = true;
  Order order(here.threads);
  for (int i = 0; i < here.threads; ++i) {
    int t = int(order.next());
    if (threads[t].state != State::in_block) continue;
    if (first < 0) first = t;
    if (agree && (threads[t].site.line != threads[first].site.line || strcmp(threads[t].site.file, threads[first].site.file))) {
      agree = false;
      report_divergence(Kind::divergent_barrier, first, t);
    }
    if (t != running) push(t);
  }
  the_block.waiting = 0;
  ++the_block.barriers;
}

// Nobody can run: whoever waits, waits in vain. Warps first, as their lanes may yet reach the barrier the others wait at.
void break_deadlock() {
  for (int number = 0; number < here.threads / 32; ++number) {
    uint32_t waiting = warps[number].waiting;
    if (!waiting) continue;
    report_divergence(Kind::divergent_shuffle, number * 32 + __builtin_ctz(waiting), number * 32 + __builtin_ctz(~waiting));
    return release_warp(number, -1);
  }
  int waits = -1, missing = -1;
  for (int t = here.threads; t-- > 0;) (threads[t].state == State::in_block ? waits : missing) = t;
  report_divergence(Kind::divergent_barrier, waits, missing);
  release_block(-1);
}

int next_thread() {
  if (!queue_size) break_deadlock();
  int thread = queue[queue_first];
  queue_first = (queue_first + 1) % kMaxThreads;
  --queue_size;
  return thread;
}

void wait() {
  int me = here.thread, next = next_thread();
  if (next == me) return;
  here.thread = next;
  switch_fiber(threads[me].fiber, threads[next].fiber);
}

void arrive_at_warp(int argument, Site site) {
  int me = here.thread;
  Warp& w = warps[me / 32];
  threads[me].site = site;
  threads[me].argument = argument;
  w.waiting |= 1u << me % 32;
  if (w.waiting == ~0u) return release_warp(me / 32, me);
  threads[me].state = State::in_warp;
  wait();
}

void run_thread() {
  enter_fiber();
  try {
    body(body_context);
  } catch (const std::exception& e) {
    report(Kind::bad_launch, here.thread, {"", 0}, {}, "throws %s", e.what());
  } catch (...) {
    report(Kind::bad_launch, here.thread, {"", 0}, {}, "throws an exception");
  }
  Thread& me = threads[here.thread];
  me.state = State::returned;
  if (--the_block.live == 0) leave_fiber(me.fiber, starter);
  here.thread = next_thread();
  leave_fiber(me.fiber, threads[here.thread].fiber);
}

void run_block(int64_t number) {
  here.block = number;
  begin_block();
  the_block = {here.threads, 0, 0};
  queue_first = queue_size = 0;
  Order order(here.threads);
  for (int i = 0; i < here.threads; ++i) {
    int t = int(order.next());
    if (!threads[t].fiber.stack) allocate(threads[t].fiber);
    prepare(threads[t].fiber, run_thread);
    push(t);
  }
  here.thread = next_thread();
  switch_fiber(starter, threads[here.thread].fiber);
}

}  // namespace

Access now() { return {uint32_t(here.block), uint32_t(here.thread) + 1, the_block.barriers, warps[here.thread / 32].barriers}; }

void sync_block(Site site) {
  int me = here.thread;
  threads[me].site = site;
  threads[me].state = State::in_block;
  if (++the_block.waiting == here.threads) {
    release_block(me);
    threads[me].state = State::ready;
    return;
  }
  wait();
}

void sync_warp(Site site) { arrive_at_warp(kWarpBarrier, site); }

void exchange(void* value, int bytes, int mask, Site site) {
  int lane = here.thread % 32, from = (lane ^ mask) & 31;
  Warp& w = warps[here.thread / 32];
  unsigned set = w.generation & 1;
  memcpy(w.slot[set][lane], value, size_t(bytes));
  arrive_at_warp(mask, site);
  if (w.present[set] >> from & 1)
    memcpy(value, w.slot[set][from], size_t(bytes));
  else
    memset(value, 0xff, size_t(bytes));
}

Error run(const char* name, std::initializer_list<Tensor> tensors, int64_t blocks, int threads_per_block, Body f, void* context) {
  if (blocks == 0) return nullptr;
  if (blocks < 0 || blocks > INT32_MAX) return "the grid needs more than 2^31 - 1 blocks";
  if (threads_per_block <= 0 || threads_per_block > kMaxThreads || threads_per_block % 32)
    return "a block has whole warps and at most 1024 threads";
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  if (!threads) threads = std::make_unique<Thread[]>(kMaxThreads);
  kernel = name;
  body = f;
  body_context = context;
  starter = {};
  random_state = options().seed * 0x9e3779b97f4a7c15u;
  for (int i = 0; i < 8; ++i) random_number();  // neighbouring seeds begin alike
  here = {0, blocks, 0, threads_per_block};
  begin_launch(tensors);
  int64_t first = std::max<int64_t>(0, options().first_block), last = std::min(blocks, options().last_block);
  Order order(std::max<int64_t>(0, last - first));
  for (int64_t i = first; i < last; ++i) run_block(first + order.next());
  end_launch(last - first == blocks);
  return nullptr;
}

}  // namespace mk::simt::host
