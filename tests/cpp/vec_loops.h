// vec.h's functions over arrays: one table per instruction set, each in a namespace of its name.
#pragma once
#include <stdint.h>

#include "../../csrc/dtype.h"

namespace mk::test {

struct VecLoops {
  void (*load_half)(const half* x, float* y, int64_t n);
  void (*load_bfloat16)(const bfloat16* x, float* y, int64_t n);
  void (*store_half)(const float* x, half* y, int64_t n);
  void (*store_bfloat16)(const float* x, bfloat16* y, int64_t n);
  void (*exp2)(const float* x, float* y, int64_t n);
  void (*erfcx)(const float* x, float* y, int64_t n);
  void (*exp2_double)(const double* x, double* y, int64_t n);
  void (*erfcx_double)(const double* x, double* y, int64_t n);
};

}  // namespace mk::test
