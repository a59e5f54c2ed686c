// Compiled as the kernels are, for whole packets and for tails.
#include "vec_loops.h"

#include "../../csrc/cpu/vec.h"

namespace mk::test::MK_ISA {
namespace {

template <class From, class To, class F>
void map(const From* x, To* y, int64_t n, const F& f) {
  for_each_packet<From>(0, n, [&](int64_t i, auto width) { store(y + i, f(load(x + i, width)), width); });
}
template <class From, class To>
void convert(const From* x, To* y, int64_t n) {
  map(x, y, n, [](auto v) { return v; });
}
template <class A>
void exp2_of(const A* x, A* y, int64_t n) {
  map(x, y, n, [](auto v) { return math::exp2(v); });
}
template <class A>
void erfcx_of(const A* x, A* y, int64_t n) {
  map(x, y, n, [](auto v) { return math::erfcx(v); });
}

}  // namespace

extern const VecLoops loops;
const VecLoops loops = {convert, convert, convert, convert, exp2_of, erfcx_of, exp2_of, erfcx_of};

}  // namespace mk::test::MK_ISA
