// Chooses among the builds of the CPU kernels at run time.
#include "isa.h"

#include <cstring>

#include "../bias_gelu.h"
#include "../cross_entropy.h"
#include "../layer_norm.h"
#include "../scaled_masked_softmax.h"

#if defined(__x86_64__)
#define MK_X86 1
#include <cpuid.h>
#else
#define MK_X86 0
#endif

namespace mk::cpu {
namespace {

struct Isa {
  const char* name;
  bool present;
};

#if MK_X86
bool f16c() {  // __builtin_cpu_supports does not know it in GCC before 13
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Isa* table() {
#if MK_X86
  __builtin_cpu_init();
  static const Isa isas[] = {
      {"baseline", true},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && f16c()},
      {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && f16c()}};
#else
  static const Isa isas[] = {{"baseline", true}, {"avx2", false}, {"avx512", false}};
#endif
  return isas;
}

int widest() {
  int best = 2;
  while (!table()[best].present) --best;
  return best;
}

int chosen = widest();

}  // namespace

const char* isa() { return table()[chosen].name; }

bool set_isa(const char* name) {
  if (std::strcmp(name, "best") == 0) {
    chosen = widest();
    return true;
  }
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, table()[i].name) == 0 && table()[i].present) {
      chosen = i;
      return true;
    }
  }
  return false;
}

#if MK_X86
#define MK_ROUTE(returns, function, parameters, arguments) \
  namespace baseline {                                      \
  returns function parameters;                              \
  }                                                         \
  namespace avx2 {                                          \
  returns function parameters;                              \
  }                                                         \
  namespace avx512 {                                        \
  returns function parameters;                              \
  }                                                         \
  returns function parameters {                             \
    switch (chosen) {                                       \
      case 2: return avx512::function arguments;            \
      case 1: return avx2::function arguments;              \
      default: return baseline::function arguments;         \
    }                                                       \
  }
#else
#define MK_ROUTE(returns, function, parameters, arguments) \
  namespace baseline {                                      \
  returns function parameters;                              \
  }                                                         \
  returns function parameters { return baseline::function arguments; }
#endif

MK_ROUTE(void, scaled_masked_softmax_forward, (const SoftmaxForward& args, ParallelFor pf), (args, pf))
MK_ROUTE(void, scaled_masked_softmax_backward, (const SoftmaxBackward& args, ParallelFor pf), (args, pf))
MK_ROUTE(void, bias_gelu_forward, (const BiasGeluForward& args, ParallelFor pf), (args, pf))
MK_ROUTE(void, bias_gelu_backward, (const BiasGeluBackward& args, ParallelFor pf), (args, pf))
MK_ROUTE(int64_t, bias_gelu_forward_workspace, (int64_t rows, int64_t cols), (rows, cols))
MK_ROUTE(int64_t, bias_gelu_backward_workspace, (int64_t rows, int64_t cols), (rows, cols))
MK_ROUTE(void, layer_norm_forward, (const LayerNormForward& args, ParallelFor pf), (args, pf))
MK_ROUTE(void, layer_norm_backward, (const LayerNormBackward& args, ParallelFor pf), (args, pf))
MK_ROUTE(int64_t, layer_norm_forward_workspace, (int64_t rows, int64_t cols), (rows, cols))
MK_ROUTE(int64_t, layer_norm_backward_workspace, (int64_t rows, int64_t cols), (rows, cols))
MK_ROUTE(void, cross_entropy_forward, (const CrossEntropyForward& args, ParallelFor pf), (args, pf))
MK_ROUTE(void, cross_entropy_backward, (const CrossEntropyBackward& args, ParallelFor pf), (args, pf))

}  // namespace mk::cpu
