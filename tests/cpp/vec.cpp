// Conversions of 16-bit numbers, and the accuracy of exp and erfcx over their domains.
#include <stdio.h>

#include "../../csrc/cpu/isa.h"
#include "vec_loops.h"
#include "testing.h"

using namespace test;

namespace {

// y[i] = f(x[i]) on the instruction set chosen.
#if defined(__x86_64__)
#define ON_CHOSEN(function, ...)                                                          \
  (!strcmp(mk::cpu::isa(), "avx512") ? mk::test::avx512::function(__VA_ARGS__)            \
   : !strcmp(mk::cpu::isa(), "avx2") ? mk::test::avx2::function(__VA_ARGS__)              \
                                     : mk::test::baseline::function(__VA_ARGS__))
#else
#define ON_CHOSEN(function, ...) mk::test::baseline::function(__VA_ARGS__)
#endif

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
void check_conversions(Format f) {
  std::vector<T> patterns(65536), back(65536);
  for (int i = 0; i < 65536; ++i) patterns[i].bits = uint16_t(i);
  std::vector<float> wide(65536);
  ON_CHOSEN(load_all, patterns.data(), wide.data(), 65536);
  ON_CHOSEN(store_all, wide.data(), back.data(), 65536);
  for (int i = 0; i < 65536; ++i) {
    double exact = decode(uint16_t(i), f);
    if (isnan(exact) ? !isnan(wide[i]) : wide[i] != exact || signbit(wide[i]) != signbit(exact))
      fail("%s pattern %04x loads as %g, expected %g", f.name, i, wide[i], exact);
    if (isnan(exact) ? !isnan(decode(back[i].bits, f)) : back[i].bits != i) fail("%s %04x comes back as %04x", f.name, i, back[i].bits);
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
  ON_CHOSEN(store_all, x.data(), y.data(), int64_t(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    uint16_t expected = encode(x[i], f);
    if (isnan(x[i]) ? !isnan(decode(y[i].bits, f)) : y[i].bits != expected)
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

TEST(half_conversions) { check_conversions<mk::half>(format(DType::f16)); }
TEST(bfloat16_conversions) { check_conversions<mk::bfloat16>(format(DType::bf16)); }

TEST(exp_is_within_2_ulp) {
  double worst = 0;
  auto check = [&](const std::vector<float>& x, std::vector<float>& y) {
    ON_CHOSEN(exp_all, x.data(), y.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      double exact = exp(double(x[i])), ulp = ldexp(1, ilogb(exact) - 23), error = fabs(y[i] - exact) / ulp;
      worst = std::max(worst, error);
      if (!(error <= 2)) fail("exp(%.9g) is %.9g, expected %.9g: %.2f ulp", x[i], y[i], exact, error);
    }
  };
  over(0.f, 88.f, 499, check);
  over(-0.f, -87.3365f, 499, check);
  printf("exp: %.2f ulp at most\n", worst);
}

TEST(exp_at_the_edges) {
  std::vector<float> x = {-INFINITY, -3e38f, -1000.f, -104.f, -87.5f, 0.f, -0.f, NAN}, y(x.size());
  ON_CHOSEN(exp_all, x.data(), y.data(), int64_t(x.size()));
  for (int i = 0; i < 5; ++i) CHECK(y[i] >= 0 && y[i] <= 0x1p-126f);
  CHECK(y[0] == 0 && y[1] == 0 && y[2] == 0);
  CHECK(y[5] == 1 && y[6] == 1);
  CHECK(isnan(y[7]));
}

TEST(erfcx_is_within_6_eps) {
  double worst = 0;
  over(0.f, 10.f, 997, [&](const std::vector<float>& x, std::vector<float>& y) {
    ON_CHOSEN(erfcx_all, x.data(), y.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      double exact = double(expl(Real(x[i]) * x[i]) * erfcl(x[i])), error = fabs(y[i] - exact) / exact;
      worst = std::max(worst, error);
      if (!(error <= 6 * eps(DType::f32))) fail("erfcx(%.9g) is %.9g, expected %.9g: relative error %.3g", x[i], y[i], exact, error);
    }
  });
  printf("erfcx: relative error %.3g at most\n", worst);
}

TEST(double_functions) {
  for (double v = 0; v < 200; v += 0.37) {
    double minus = -v, e, c;
    ON_CHOSEN(exp_all, &minus, &e, 1);
    ON_CHOSEN(erfcx_all, &v, &c, 1);
    // exp(v^2) carries the rounding of its argument; from about 26 on erfc underflows, and 1/(x sqrt(pi)) is the limit.
    double exact = v < 100 ? double(expl(Real(v) * v) * erfcl(v)) : 1 / (v * sqrt(M_PI));
    describe("%g", v);
    CHECK(fabs(e - exp(-v)) <= 1e-15 * exp(-v));
    CHECK(fabs(c - exact) <= std::max(1e-15 * (1 + v * v), 1 / (v * v)) * exact || v == 0);
  }
}
