// vec.h's functions over arrays, one build per instruction set; vec.cpp tests the one that main.cpp chose.
#pragma once
#include <stdint.h>

#include "../../csrc/dtype.h"

#define MK_VEC_LOOPS(isa)                                   \
  namespace isa {                                            \
  void load_all(const half* x, float* y, int64_t n);         \
  void load_all(const bfloat16* x, float* y, int64_t n);     \
  void store_all(const float* x, half* y, int64_t n);        \
  void store_all(const float* x, bfloat16* y, int64_t n);    \
  void exp_all(const float* x, float* y, int64_t n);         \
  void exp_all(const double* x, double* y, int64_t n);       \
  void erfcx_all(const float* x, float* y, int64_t n);       \
  void erfcx_all(const double* x, double* y, int64_t n);     \
  }

namespace mk::test {
MK_VEC_LOOPS(baseline)
MK_VEC_LOOPS(avx2)
MK_VEC_LOOPS(avx512)
}  // namespace mk::test
