// Conversions of 16-bit numbers, and the accuracy of exp and erfcx over their domains.
#include <stdio.h>

#include "../../csrc/cpu/isa.h"
#include "vec_loops.h"
#include "testing.h"

using namespace test;

// MK_FOR_EACH_ISA comes from CMakeLists.txt.
#define MK_DECLARE(name)       \
  namespace mk::test::name {   \
  extern const VecLoops loops; \
  }
MK_FOR_EACH_ISA(MK_DECLARE)

namespace {

// The table of the instruction set chosen.
const mk::test::VecLoops& loops() {
#define MK_PICK(name) \
  if (!strcmp(mk::cpu::isa(), #name)) return mk::test::name::loops;
  MK_FOR_EACH_ISA(MK_PICK)
  abort();
}

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

template <class T>
void check_conversions(Format f, void (*load_all)(const T*, float*, int64_t), void (*store_all)(const float*, T*, int64_t)) {
  // The processor's own conversion to bfloat16 takes subnormal numbers for 0.
  bool flushes = f.lowest == -126 && !strcmp(mk::cpu::isa(), "avx512bf16");
  auto flushed = [&](double x, uint16_t bits) {
    return flushes && fabs(x) < ldexp(1, f.lowest) && bits == (signbit(x) ? 0x8000 : 0);
  };
  std::vector<T> patterns(65536), back(65536);
  for (int i = 0; i < 65536; ++i) patterns[i].bits = uint16_t(i);
  std::vector<float> wide(65536);
  load_all(patterns.data(), wide.data(), 65536);
  store_all(wide.data(), back.data(), 65536);
  for (int i = 0; i < 65536; ++i) {
    double exact = decode(uint16_t(i), f);
    if (isnan(exact) ? !isnan(wide[i]) : wide[i] != exact || signbit(wide[i]) != signbit(exact))
      fail("%s pattern %04x loads as %g, expected %g", f.name, i, wide[i], exact);
    if (isnan(exact) ? !isnan(decode(back[i].bits, f)) : back[i].bits != i && !flushed(exact, back[i].bits))
      fail("%s %04x comes back as %04x", f.name, i, back[i].bits);
  }

  std::vector<float> x;  // every tie between neighbours with the floats beside it, then a walk over all floats
  for (int i = 0; i < 65535; ++i) {
    double low = decode(uint16_t(i), f), high = decode(uint16_t(i + 1), f);
    if (isnan(low) || isnan(high) || isinf(low)) continue;
    double step = isinf(high) ? low - decode(uint16_t(i - 1), f) : high - low;
    float tie = float(low + step / 2);
    for (float value : {tie, nextafterf(tie, INFINITY), nextafterf(tie, -INFINITY)}) x.push_back(value);
  }
  for (uint64_t bits = 0; bits <= UINT32_MAX; bits += 4093) x.push_back(float_of(uint32_t(bits)));
  for (uint32_t bits : {0u, 1u, 0x7f7fffffu, 0x7f800000u, 0x7f800001u, 0x7fc00000u, 0x7fffffffu}) {
    x.push_back(float_of(bits));
    x.push_back(float_of(bits | 0x80000000u));
  }
  std::vector<T> y(x.size());
  store_all(x.data(), y.data(), int64_t(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    uint16_t expected = encode(x[i], f);
    if (isnan(x[i]) ? !isnan(decode(y[i].bits, f)) : y[i].bits != expected && !flushed(x[i], y[i].bits))
      fail("%a (%08x) is stored as %s %04x, expected %04x", x[i], bits_of(x[i]), f.name, y[i].bits, expected);
  }
}

// Calls f with blocks of every step-th float of [low, high], low and high of one sign.
template <class F>
void over(float low, float high, uint32_t step, F f) {
  uint32_t first = std::min(bits_of(low), bits_of(high)), last = std::max(bits_of(low), bits_of(high));
  std::vector<float> x, y(4096 + 5);
  for (uint64_t bits = first;; bits = std::min<uint64_t>(bits + step, last)) {
    x.push_back(float_of(uint32_t(bits)));
    if (x.size() == y.size() || bits == last) {
      f(x, y);
      x.clear();
    }
    if (bits == last) break;
  }
}

}  // namespace

TEST(half_conversions) { check_conversions(format(DType::f16), loops().load_half, loops().store_half); }
TEST(bfloat16_conversions) { check_conversions(format(DType::bf16), loops().load_bfloat16, loops().store_bfloat16); }

TEST(exp2_is_within_2_ulp) {
  double worst = 0;
  auto check = [&](const std::vector<float>& x, std::vector<float>& y) {
    loops().exp2(x.data(), y.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      double exact = exp2(double(x[i])), ulp = ldexp(1, ilogb(exact) - 23), error = fabs(y[i] - exact) / ulp;
      worst = std::max(worst, error);
      if (!(error <= 2)) fail("exp2(%.9g) is %.9g, expected %.9g: %.2f ulp", x[i], y[i], exact, error);
    }
  };
  over(0.f, 126.9999f, 499, check);
  over(-0.f, -125.9999f, 499, check);
  printf("exp2: %.2f ulp at most\n", worst);
}

TEST(exp2_at_the_edges) {
  std::vector<float> x = {-INFINITY, -3e38f, -1000.f, -151.f, -126.5f, 0.f, -0.f, NAN}, y(x.size());
  loops().exp2(x.data(), y.data(), int64_t(x.size()));
  CHECK(y[0] == 0 && y[1] == 0 && y[2] == 0);
  CHECK(y[3] >= 0 && y[3] <= 0x1p-126f && y[4] >= 0 && y[4] <= 0x1p-126f);
  CHECK(y[5] == 1 && y[6] == 1);
  CHECK(isnan(y[7]));
}

TEST(erfcx_is_within_6_eps) {
  double worst = 0;
  over(0.f, 10.f, 997, [&](const std::vector<float>& x, std::vector<float>& y) {
    loops().erfcx(x.data(), y.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      double exact = double(expl(Real(x[i]) * x[i]) * erfcl(x[i])), error = fabs(y[i] - exact) / exact;
      worst = std::max(worst, error);
      if (!(error <= 6 * eps(DType::f32)))
        fail("erfcx(%.9g) is %.9g, expected %.9g: relative error %.3g", x[i], y[i], exact, error);
    }
  });
  printf("erfcx: relative error %.3g at most\n", worst);
}

// exp(v^2) carries the rounding of its argument; from about 26 on erfc is subnormal, and 1/(v sqrt(pi)) is the limit.
TEST(double_functions) {
  for (double v = 0; v < 200; v += 0.37) {
    double minus = -v, power, scaled;
    loops().exp2_double(&minus, &power, 1);
    loops().erfcx_double(&v, &scaled, 1);
    double exact = v < 100 ? double(expl(Real(v) * v) * erfcl(v)) : 1 / (v * sqrt(M_PI));
    describe("%g", v);
    CHECK(fabs(power - exp2(-v)) <= 1e-15 * (1 + v) * exp2(-v));
    CHECK(fabs(scaled - exact) <= (v > 26 ? 1 / (v * v) : 1e-15 * (1 + v * v)) * exact);
  }
}
