// Shared by the sources of the host build: who accessed what when, and how findings get onto the list.
#pragma once
#include "host.h"

namespace mk::simt::host {

// A thread at a moment. Two accesses by different threads are ordered if a barrier lies between: in one warp a block or a warp
// barrier, in one block a block barrier, and nothing in a launch orders two blocks.
struct Access {
  uint32_t block = 0, thread1 = 0;  // thread + 1; 0: there was no access
  uint32_t block_barriers = 0, warp_barriers = 0;
  bool happened() const { return thread1 != 0; }
  int thread() const { return int(thread1) - 1; }
  bool same_thread(const Access& a) const { return block == a.block && thread1 == a.thread1; }
  bool same_warp(const Access& a) const { return block == a.block && (thread1 - 1) / 32 == (a.thread1 - 1) / 32; }
  bool unordered(const Access& a) const {
    if (!happened() || same_thread(a)) return false;
    if (block != a.block) return true;
    return block_barriers == a.block_barriers && (!same_warp(a) || warp_barriers == a.warp_barriers);
  }
};

// The accesses to one element that a later one can be in a race with: the last write, the last read, the last read by another warp
// than that, and whether another lane of the last reader's warp read since that warp's last barrier.
struct Cell {
  Access write, read, other;
  bool many_lanes = false;

  // Enters an access; where it is in a race, the one it races with.
  Access enter(const Access& now, bool writing) {
    Access clash;
    if (write.unordered(now)) clash = write;
    if (writing) {
      if (other.unordered(now)) clash = other;
      if (read.unordered(now) || (many_lanes && read.same_warp(now) && read.block_barriers == now.block_barriers &&
                                  read.warp_barriers == now.warp_barriers))
        clash = read;
      write = now;
    } else if (!read.happened() || !read.same_warp(now)) {
      other = read;
      read = now;
      many_lanes = false;
    } else {
      bool since_barrier = read.block_barriers == now.block_barriers && read.warp_barriers == now.warp_barriers;
      many_lanes = since_barrier && (many_lanes || !read.same_thread(now));
      read = now;
    }
    return clash;
  }
};

extern const char* kernel;  // the one that runs
Access now();               // the thread that runs

// What a finding is about, besides the thread.
struct Place {
  const char* tensor = "";
  int64_t element = -1;
};
// Findings of one kind at one line of one kernel about one tensor are one finding, whose `what` is the first's.
void report(Kind, int thread, Site, Place, const char* format, ...) __attribute__((format(printf, 5, 6)));
void count(const Traffic&);
const char* base_name(const char* path);

void begin_launch(std::initializer_list<Tensor>);
void begin_block();
void end_launch(bool complete);

}  // namespace mk::simt::host
