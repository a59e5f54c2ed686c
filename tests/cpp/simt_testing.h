// For tests of what the host build of the dialect finds and counts.
#pragma once
#include <stdio.h>
#include <sys/mman.h>

#include "../../csrc/simt/report.h"
#include "testing.h"

namespace test {

using mk::simt::host::Finding;
using mk::simt::host::Kind;
using mk::simt::host::Options;
using mk::simt::host::Traffic;

constexpr uint64_t kSeeds[] = {0, 1, 2, 12345};

// Sets the options of the launches to come, and forgets what was found and counted before.
inline void begin(const Options& options) {
  mk::simt::host::options() = options;
  mk::simt::host::take_findings();
  mk::simt::host::take_traffic();
}
inline void expect_ok(const char* error) {
  if (error) fail("the launch says: %s", error);
}
inline Traffic traffic_of(const std::vector<Traffic>& all, const char* tensor) {
  for (const Traffic& t : all)
    if (t.tensor == tensor) return t;
  fail("no traffic of %s", tensor);
  return {};
}
inline void expect_traffic(const std::vector<Traffic>& all, const char* tensor, int64_t read, int64_t written) {
  Traffic t = traffic_of(all, tensor);
  if (t.read != read || t.written != written)
    fail("%s: %ld bytes read and %ld written, expected %ld and %ld", tensor, long(t.read), long(t.written), long(read),
         long(written));
}

// Address space between as much again before and after that belongs to no tensor; only what is touched takes memory.
struct Mapping {
  explicit Mapping(int64_t n) : bytes(size_t(n)) {
    void* all = mmap(nullptr, 3 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) abort();
    data = static_cast<char*>(all) + bytes;
  }
  ~Mapping() { munmap(data - bytes, 3 * bytes); }
  size_t bytes;
  char* data;
};

}  // namespace test
