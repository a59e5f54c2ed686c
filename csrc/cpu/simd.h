// What the CPU kernels are written in: plain loops under `MK_SIMD`, vectorised by the compiler for one instruction set per build.
//
// Everything here has internal linkage and nothing from the C++ library is used: the linker keeps one copy of an inline function,
// and the baseline build must not end up with one that was compiled for AVX-512. exp and erfcx are polynomials because a call into
// libm would stop the vectoriser; conversions are integer arithmetic for the same reason.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../dtype.h"
#include "../parallel_for.h"

#define MK_SIMD _Pragma("omp simd")
#define MK_SIMD_SUM(...) MK_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define MK_SIMD_MAX(...) MK_PRAGMA(omp simd reduction(max : __VA_ARGS__))
#define MK_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define MK_FN inline __attribute__((always_inline))

namespace mk {
namespace {

template <class To, class From>
MK_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  return __builtin_bit_cast(To, from);
}

template <class T>
MK_FN T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
MK_FN T max(T a, T b) {
  return a > b ? a : b;
}

template <class T>
MK_FN void clear(T* first, int64_t n) {
  __builtin_memset(first, 0, size_t(n) * sizeof(T));
}

template <class A>
constexpr A kInfinity = A(__builtin_huge_val());
template <class A>
constexpr A kNaN = A(__builtin_nan(""));

MK_FN float load(float x) { return x; }
MK_FN double load(double x) { return x; }
MK_FN float load(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
MK_FN float load(half x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // Rebias the exponent; infinities and NaNs need it twice, subnormals are normalised by one subtraction.
  float normal = bit_cast<float>(magnitude + (magnitude >= 0x0f800000u ? 0x70000000u : 0x38000000u));
  float subnormal = bit_cast<float>(magnitude + 0x38800000u) - bit_cast<float>(0x38800000u);
  float value = magnitude < 0x00800000u ? subnormal : normal;
  return bit_cast<float>(bit_cast<uint32_t>(value) | uint32_t(x.bits & 0x8000) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
MK_FN T store(acc_t<T> x) {
  return x;
}
template <>
MK_FN bfloat16 store<bfloat16>(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
MK_FN half store<half>(float x) {
  uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts a subnormal half's bits, rounded by the addition itself, at the bottom of the mantissa.
  uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x47800000u ? (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u) : value;
  return {uint16_t(value | (bits >> 16 & 0x8000u))};
}

namespace math {

// e^x to 1 ulp or so: x = n ln2 + r, e^r = 1 + r + r^2 p(r) with p the minimax polynomial on |r| <= ln2/2 (relative error 3e-9).
// For x <= 88; results below the smallest normal number are 0.
MK_FN float exp(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  float shifted = x * kLog2e + kShift;
  float n = shifted - kShift;
  float r = x - n * kLn2High - n * kLn2Low;
  float p = 0.00138145986f;
  p = p * r + 0.00836871688f;
  p = p * r + 0.0416683880f;
  p = p * r + 0.166665206f;
  p = p * r + 0.499999934f;
  p = p * r * r + r + 1.f;
  float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < -87.3365448f ? 0.f : p * power;
}
MK_FN double exp(double x) { return __builtin_exp(x); }

// e^(x^2) erfc(x) for x >= 0: a minimax polynomial in 1 / (1 + 0.35 x), relative error 2e-8 up to x = 10; beyond that
// e^(-x^2) is 0 in float.
MK_FN float erfcx(float x) {
  float t = 1.f / (1.f + 0.35f * x);
  float p = 0.0650749215f;
  p = p * t - 0.392204257f;
  p = p * t + 0.820446426f;
  p = p * t - 0.713561407f;
  p = p * t + 0.649497983f;
  p = p * t - 0.0621893391f;
  p = p * t + 0.248029448f;
  p = p * t + 0.186363656f;
  p = p * t + 0.198592276f;
  return p * t - 4.97254800e-5f;
}
MK_FN double erfcx(double x) {
  return x > 26. ? 0.56418958354775629 / x : __builtin_exp(x * x) * __builtin_erfc(x);  // beyond 26 erfc is subnormal
}

MK_FN float log(float x) { return __builtin_logf(x); }
MK_FN double log(double x) { return __builtin_log(x); }
MK_FN float rsqrt(float x) { return 1.f / __builtin_sqrtf(x); }
MK_FN double rsqrt(double x) { return 1. / __builtin_sqrt(x); }

}  // namespace math

// Rows whose work is too small to share are run by one thread.
constexpr int64_t kGrainElements = 16384;

// Runs f(first, last) over [0, items) on the caller's threads; one item is about `elements` elements of work.
template <class F>
void parallel(ParallelFor pf, int64_t items, int64_t elements, const F& f) {
  if (items == 0) return;
  int64_t grain = max<int64_t>(1, kGrainElements / max<int64_t>(1, elements));
  pf(0, items, grain, [](int64_t first, int64_t last, void* body) { (*static_cast<const F*>(body))(first, last); },
     const_cast<F*>(&f));
}

// The sum of f(j) over [0, n), tile by tile: in one running sum a large term would swallow thousands of small ones.
template <class A, class F>
MK_FN A sum_of(int64_t n, const F& f) {
  constexpr int64_t kTile = 512;
  A total = 0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    int64_t end = min(n, begin + kTile);
    A sum = 0;
    MK_SIMD_SUM(sum) for (int64_t j = begin; j < end; ++j) sum += f(j);
    total += sum;
  }
  return total;
}

// Copies a parameter vector into the accumulation type; a null one becomes `missing` everywhere.
template <class A>
void widen(const void* from, DType dtype, int64_t n, A missing, A* to) {
  if (!from) {
    for (int64_t j = 0; j < n; ++j) to[j] = missing;
    return;
  }
  visit(dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    const P* source = static_cast<const P*>(from);
    for (int64_t j = 0; j < n; ++j) to[j] = A(load(source[j]));
  });
}

// Column sums over many rows in two stages: each of row_blocks() blocks of rows adds up a partial row of its own, then the
// partials are added in order. The split depends on the shape alone, so results don't depend on the number of threads.
MK_FN int64_t row_blocks(int64_t rows, int64_t cols) {
  int64_t wanted = (rows * cols + 65535) / 65536;
  return max<int64_t>(1, min<int64_t>(min<int64_t>(wanted, 64), rows));
}
MK_FN int64_t block_begin(int64_t block, int64_t blocks, int64_t rows) {
  return rows / blocks * block + min(block, rows % blocks);
}

template <class A>
void sum_partials(ParallelFor pf, const A* partials, int64_t stride, int64_t blocks, int64_t cols, void* out, DType dtype) {
  if (!out) return;
  parallel(pf, cols, blocks, [&](int64_t first, int64_t last) {
    visit(dtype, [&](auto type) {
      using P = typename decltype(type)::type;
      P* to = static_cast<P*>(out);
      constexpr int64_t kTile = 256;
      for (int64_t begin = first; begin < last; begin += kTile) {
        int64_t n = min(kTile, last - begin);
        A sum[kTile] = {};
        for (int64_t b = 0; b < blocks; ++b) {
          const A* partial = partials + b * stride + begin;
          MK_SIMD for (int64_t j = 0; j < n; ++j) sum[j] += partial[j];
        }
        for (int64_t j = 0; j < n; ++j) to[begin + j] = store<P>(acc_t<P>(sum[j]));
      }
    });
  });
}

}  // namespace
}  // namespace mk

#include "../scalar.h"
