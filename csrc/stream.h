// Where a GPU's kernels are queued: the counterpart of parallel_for.h.
#pragma once

namespace mk {

struct Stream {
  void* handle;  // a cudaStream_t; null is the default stream
  int device;    // the one that the stream and all tensors are on
};

// What went wrong with a launch, for people; null where all is well. Kernels run later, and report nothing.
using Error = const char*;

}  // namespace mk
