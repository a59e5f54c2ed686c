// Chooses among the builds of the CPU kernels at run time.
#include "isa.h"

#include <cstring>

#include "../bias_gelu.h"
#include "../cross_entropy.h"
#include "../layer_norm.h"
#include "../scaled_masked_softmax.h"

#if defined(__x86_64__)
#include <cpuid.h>
#define MK_FOR_EACH_ISA(f) f(baseline) f(avx2) f(avx512) f(avx512bf16)
#else
#define MK_FOR_EACH_ISA(f) f(baseline)
#endif

namespace mk::cpu {
namespace {

enum Isa {
#define MK_ENUMERATE(name) name##_isa,
  MK_FOR_EACH_ISA(MK_ENUMERATE)
#undef MK_ENUMERATE
      kIsas
};

const char* const kNames[] = {
#define MK_NAME(name) #name,
    MK_FOR_EACH_ISA(MK_NAME)
#undef MK_NAME
};

bool present(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // __builtin_cpu_supports does not know it in GCC before 13
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && f16c;
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case avx2_isa: return has_avx2;
    case avx512_isa: return has_avx512;
    case avx512bf16_isa: return has_avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == baseline_isa;
}

int widest() {
  int best = kIsas - 1;
  while (!present(best)) --best;
  return best;
}

int chosen = widest();

}  // namespace

const char* isa() { return kNames[chosen]; }

bool set_isa(const char* name) {
  if (std::strcmp(name, "best") == 0) {
    chosen = widest();
    return true;
  }
  for (int i = 0; i < kIsas; ++i) {
    if (std::strcmp(name, kNames[i]) == 0 && present(i)) {
      chosen = i;
      return true;
    }
  }
  return false;
}

// Each kernel: declared for every build, and defined here as a call of the chosen build's.
#define MK_ROUTE_VOID(function, Args) MK_ROUTE(void, function, (const Args& args, ParallelFor pf), (args, pf))
#define MK_ROUTE_SIZE(function) MK_ROUTE(int64_t, function, (int64_t rows, int64_t cols), (rows, cols))
#define MK_DECLARE(isa, returns, function, parameters) \
  namespace isa {                                      \
  returns function parameters;                         \
  }
#if defined(__x86_64__)
#define MK_ROUTE(returns, function, parameters, arguments)        \
  MK_DECLARE(baseline, returns, function, parameters)             \
  MK_DECLARE(avx2, returns, function, parameters)                 \
  MK_DECLARE(avx512, returns, function, parameters)               \
  MK_DECLARE(avx512bf16, returns, function, parameters)           \
  returns function parameters {                                   \
    switch (chosen) {                                             \
      case avx512bf16_isa: return avx512bf16::function arguments; \
      case avx512_isa: return avx512::function arguments;         \
      case avx2_isa: return avx2::function arguments;             \
      default: return baseline::function arguments;               \
    }                                                             \
  }
#else
#define MK_ROUTE(returns, function, parameters, arguments) \
  MK_DECLARE(baseline, returns, function, parameters)      \
  returns function parameters { return baseline::function arguments; }
#endif

MK_ROUTE_VOID(scaled_masked_softmax_forward, SoftmaxForward)
MK_ROUTE_VOID(scaled_masked_softmax_backward, SoftmaxBackward)
MK_ROUTE_VOID(bias_gelu_forward, BiasGeluForward)
MK_ROUTE_VOID(bias_gelu_backward, BiasGeluBackward)
MK_ROUTE_SIZE(bias_gelu_forward_workspace)
MK_ROUTE_SIZE(bias_gelu_backward_workspace)
MK_ROUTE_VOID(layer_norm_forward, LayerNormForward)
MK_ROUTE_VOID(layer_norm_backward, LayerNormBackward)
MK_ROUTE_SIZE(layer_norm_forward_workspace)
MK_ROUTE_SIZE(layer_norm_backward_workspace)
MK_ROUTE_VOID(cross_entropy_forward, CrossEntropyForward)
MK_ROUTE_VOID(cross_entropy_backward, CrossEntropyBackward)

}  // namespace mk::cpu
