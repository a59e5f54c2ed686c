// Vectors for one instruction set per build: 16, 32 or 64 bytes of float or double, as the compiler's own vector types.
//
// A row is walked in packets of one vector; `for_each_packet` runs one body for whole packets and for the tail, which differ only in
// the `Whole` or `Part` that the body hands to load, store and keep. 16-bit elements are widened as they are loaded and rounded as
// they are stored, so bodies compute in float whatever the tensor holds.
//
// Everything here has internal linkage and nothing from the C++ library is used: the linker keeps one copy of an inline function,
// and a processor without AVX-512 must not end up with one that was compiled for it.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../dtype.h"

#define MK_FN inline __attribute__((always_inline))

namespace mk {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  static constexpr int kLanes = kVectorBytes / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
  static constexpr int kLanes = kVectorBytes / 8;
};

template <class A>
using vec_t = typename Simd<A>::V;
template <class T>
constexpr int kLanes = Simd<acc_t<T>>::kLanes;

template <class A>
constexpr A kInfinity = A(__builtin_huge_val());
template <class A>
constexpr A kNaN = A(__builtin_nan(""));

template <class T>
MK_FN T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
MK_FN T max(T a, T b) {
  return a > b ? a : b;
}
template <class C, class V>
MK_FN V select(C condition, V yes, V no) {
  return condition ? yes : no;
}

template <class A>
MK_FN vec_t<A> broadcast(A a) {
  return a - vec_t<A>{};
}
template <class A>
MK_FN typename Simd<A>::I lane_numbers() {
  typename Simd<A>::I lanes{};
  for (int i = 0; i < Simd<A>::kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Which lanes of a packet lie in the row: all, or the first n.
struct Whole {};
struct Part {
  int n;
};

template <class T, class F>
MK_FN void for_each_packet(int64_t begin, int64_t end, const F& body) {
  int64_t j = begin;
  for (; j + kLanes<T> <= end; j += kLanes<T>) body(j, Whole{});
  if (j < end) body(j, Part{int(end - j)});
}

// Lanes beyond the row's end are replaced by `neutral`.
template <class V>
MK_FN V keep(V v, V, Whole) {
  return v;
}
template <class A>
MK_FN vec_t<A> keep_first(vec_t<A> v, vec_t<A> neutral, int n) {
  typename Simd<A>::I count = n - typename Simd<A>::I{};
  return lane_numbers<A>() < count ? v : neutral;
}
MK_FN vec_t<float> keep(vec_t<float> v, vec_t<float> neutral, Part p) { return keep_first<float>(v, neutral, p.n); }
MK_FN vec_t<double> keep(vec_t<double> v, vec_t<double> neutral, Part p) { return keep_first<double>(v, neutral, p.n); }

template <class V, class T>
MK_FN V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

MK_FN vec_t<float> widen(const float* p) { return load_raw<vec_t<float>>(p); }
MK_FN vec_t<double> widen(const double* p) { return load_raw<vec_t<double>>(p); }
MK_FN vec_t<float> widen(const bfloat16* p) {
  using S = Simd<float>;
  return (S::V)(__builtin_convertvector(load_raw<S::Short>(p), S::U) << 16);
}
MK_FN vec_t<float> widen(const half* p) {
#if defined(__AVX512F__)
  return (vec_t<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vec_t<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  using S = Simd<float>;
  S::U bits = __builtin_convertvector(load_raw<S::Short>(p), S::U), magnitude = (bits & 0x7fffu) << 13;
  // Rebias the exponent; infinities and NaNs need it twice, subnormals are normalised by one subtraction.
  S::U normal = magnitude + (magnitude >= 0x0f800000u ? 0x70000000u - S::U{} : 0x38000000u - S::U{});
  S::V subnormal = (S::V)(magnitude + 0x38800000u) - (S::V)(0x38800000u - S::U{});
  S::U value = magnitude < 0x00800000u ? (S::U)subnormal : normal;
  return (S::V)(value | (bits & 0x8000u) << 16);
#endif
}

MK_FN void narrow(float* p, vec_t<float> v) { __builtin_memcpy(p, &v, sizeof v); }
MK_FN void narrow(double* p, vec_t<double> v) { __builtin_memcpy(p, &v, sizeof v); }
// Rounds to nearest, ties to even; NaN stays NaN.
MK_FN void narrow(bfloat16* p, vec_t<float> v) {
  using S = Simd<float>;
  S::U bits = (S::U)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = v == v ? rounded : 0x7fc0u - S::U{};
  S::Short packed = __builtin_convertvector(rounded, S::Short);
  __builtin_memcpy(p, &packed, sizeof packed);
}
MK_FN void narrow(half* p, vec_t<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  using S = Simd<float>;
  S::U bits = (S::U)v, magnitude = bits & 0x7fffffffu;
  S::U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts a subnormal half's bits, rounded by the addition itself, at the bottom of the mantissa.
  S::U subnormal = (S::U)((S::V)magnitude + 0.5f) - 0x3f000000u;
  S::U value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x47800000u ? (magnitude > 0x7f800000u ? 0x7e00u - S::U{} : 0x7c00u - S::U{}) : value;
  S::Short packed = __builtin_convertvector(value | (bits >> 16 & 0x8000u), S::Short);
  __builtin_memcpy(p, &packed, sizeof packed);
#endif
}

template <class T>
MK_FN vec_t<acc_t<T>> load(const T* p, Whole) {
  return widen(p);
}
template <class T>
MK_FN vec_t<acc_t<T>> load(const T* p, Part part) {
  T copy[kLanes<T>] = {};
  for (int i = 0; i < part.n; ++i) copy[i] = p[i];
  return widen(copy);
}
template <class T>
MK_FN void store(T* p, vec_t<acc_t<T>> v, Whole) {
  narrow(p, v);
}
template <class T>
MK_FN void store(T* p, vec_t<acc_t<T>> v, Part part) {
  T copy[kLanes<T>];
  narrow(copy, v);
  for (int i = 0; i < part.n; ++i) p[i] = copy[i];
}

// One element, by way of a vector: single values are rare.
template <class T>
MK_FN acc_t<T> load_one(const T* p) {
  return load(p, Part{1})[0];
}
template <class T>
MK_FN void store_one(T* p, acc_t<T> a) {
  store(p, broadcast(a), Part{1});
}

// -1 in the lanes whose byte is not 0.
template <class A>
MK_FN typename Simd<A>::I load_mask(const uint8_t* p, Whole) {
  return __builtin_convertvector(load_raw<typename Simd<A>::Bytes>(p), typename Simd<A>::I) != 0;
}
template <class A>
MK_FN typename Simd<A>::I load_mask(const uint8_t* p, Part part) {
  uint8_t copy[Simd<A>::kLanes] = {};
  for (int i = 0; i < part.n; ++i) copy[i] = p[i];
  return load_mask<A>(copy, Whole{});
}

template <class A>
MK_FN A sum_lanes(vec_t<A> v) {
  A lanes[Simd<A>::kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int step = Simd<A>::kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
template <class A>
MK_FN A max_lanes(vec_t<A> v) {
  A top = v[0];
  for (int i = 1; i < Simd<A>::kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

namespace math {

// e^x to 1 ulp or so: x = n ln2 + r, e^r = 1 + r + r^2 p(r) with p the minimax polynomial on |r| <= ln2/2 (relative error 3e-9).
// For x <= 88; results below the smallest normal number are 0.
MK_FN vec_t<float> exp(vec_t<float> x) {
  using S = Simd<float>;
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  S::V shifted = x * kLog2e + kShift;
  S::V n = shifted - kShift;
  S::V r = x - n * kLn2High - n * kLn2Low;
  S::V p = 0.00138145986f * r + 0.00836871688f;
  p = p * r + 0.0416683880f;
  p = p * r + 0.166665206f;
  p = p * r + 0.499999934f;
  p = p * (r * r) + r + 1.f;
  S::V power = (S::V)(((S::U)shifted << 23) + 0x3f800000u);
  return x < -87.3365448f ? S::V{} : p * power;
}
MK_FN vec_t<double> exp(vec_t<double> x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// e^(x^2) erfc(x) for x >= 0: a minimax polynomial in 1 / (1 + 0.35 x), relative error 2e-8 up to x = 10; beyond that
// e^(-x^2) is 0 in float.
MK_FN vec_t<float> erfcx(vec_t<float> x) {
  vec_t<float> t = 1.f / (1.f + 0.35f * x);
  vec_t<float> p = 0.0650749215f * t - 0.392204257f;
  p = p * t + 0.820446426f;
  p = p * t - 0.713561407f;
  p = p * t + 0.649497983f;
  p = p * t - 0.0621893391f;
  p = p * t + 0.248029448f;
  p = p * t + 0.186363656f;
  p = p * t + 0.198592276f;
  return p * t - 4.97254800e-5f;
}
MK_FN vec_t<double> erfcx(vec_t<double> x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i)  // beyond 26 erfc is subnormal
    x[i] = x[i] > 26. ? 0.56418958354775629 / x[i] : __builtin_exp(x[i] * x[i]) * __builtin_erfc(x[i]);
  return x;
}

MK_FN float log(float x) { return __builtin_logf(x); }
MK_FN double log(double x) { return __builtin_log(x); }
MK_FN float rsqrt(float x) { return 1.f / __builtin_sqrtf(x); }
MK_FN double rsqrt(double x) { return 1. / __builtin_sqrt(x); }
template <class A>
MK_FN A exp_one(A x) {
  return exp(broadcast(x))[0];
}

}  // namespace math

}  // namespace
}  // namespace mk

#include "../scalar.h"
