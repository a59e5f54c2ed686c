// What the host build found and counted, and its settings: all that a test needs, without the dialect.
#pragma once
#include <stdint.h>

#include <string>
#include <vector>

namespace mk::simt::host {

// Of the launches that follow.
struct Options {
  uint64_t seed = 0;        // of the order in which threads and blocks run; 0: as they are numbered
  int multiprocessors = 4;  // what multiprocessors() says
  // Of every grid only these blocks run; whether outputs are complete is then not checked.
  int64_t first_block = 0, last_block = INT64_MAX;
  bool shadow = true;  // keep track of who wrote which element of a tensor; without it launches are faster
};
Options& options();

enum class Kind {
  divergent_barrier,     // a barrier that not every thread of the block reaches
  divergent_shuffle,     // a shuffle or warp barrier that not every lane of the warp reaches
  uninitialised_shared,  // a shared element read before the block wrote it
  shared_race,           // two threads at one shared element, one writing, no barrier between
  shared_bounds,         // outside a shared array
  out_of_bounds,         // outside every tensor of the launch
  misaligned,            // an address that is not a multiple of the access's size
  not_writable,          // a store into a tensor that the kernel only reads
  not_readable,          // a load from a tensor that the kernel only writes
  written_twice,         // an element of an output written a second time
  unwritten,             // an element of an output that nobody wrote
  global_race,           // as shared_race, in a tensor
  bad_launch,            // more shared memory than there is, an exception
};
const char* name(Kind);

struct Finding {
  Kind kind;
  std::string kernel, what;  // `what` is a sentence for people, with the line of the source
  int64_t block;
  int thread;          // -1, and the block too, where no thread is to blame
  std::string tensor;  // tensor or shared array, or empty
  int64_t element;     // in it, or -1
  int64_t times;       // how often; the rest describes the first time
};
struct Traffic {
  std::string kernel, tensor;
  int64_t read, written;     // bytes
  int64_t accesses, narrow;  // loads and stores; those of less than 16 bytes
};

// What has gathered since the last call, or since the start.
std::vector<Finding> take_findings();
std::vector<Traffic> take_traffic();
std::string describe(const Finding&);

}  // namespace mk::simt::host
