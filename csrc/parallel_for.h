// The caller's thread pool, handed to the CPU kernels so that they never start a second one.
#pragma once
#include <stdint.h>

namespace mk {

// Calls body(first, last, context) on disjoint ranges that cover [begin, end), each of at least `grain` items where possible.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace mk
