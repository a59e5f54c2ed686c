// Compiled as the kernels are, for whole packets and for tails.
#include "vec_loops.h"

#include "../../csrc/cpu/vec.h"

namespace mk::test::MK_ISA {
namespace {

template <class From, class To, class F>
void map(const From* x, To* y, int64_t n, const F& f) {
  for_each_packet<From>(0, n, [&](int64_t i, auto width) { store(y + i, f(load(x + i, width)), width); });
}
constexpr auto same = [](auto v) { return v; };
constexpr auto exp_of = [](auto v) { return math::exp(v); };
constexpr auto erfcx_of = [](auto v) { return math::erfcx(v); };

}  // namespace

void load_all(const half* x, float* y, int64_t n) { map(x, y, n, same); }
void load_all(const bfloat16* x, float* y, int64_t n) { map(x, y, n, same); }
void store_all(const float* x, half* y, int64_t n) { map(x, y, n, same); }
void store_all(const float* x, bfloat16* y, int64_t n) { map(x, y, n, same); }
void exp_all(const float* x, float* y, int64_t n) { map(x, y, n, exp_of); }
void exp_all(const double* x, double* y, int64_t n) { map(x, y, n, exp_of); }
void erfcx_all(const float* x, float* y, int64_t n) { map(x, y, n, erfcx_of); }
void erfcx_all(const double* x, double* y, int64_t n) { map(x, y, n, erfcx_of); }

}  // namespace mk::test::MK_ISA
