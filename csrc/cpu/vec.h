// Vectors for one instruction set per build: 16, 32 or 64 bytes of float or double, as the compiler's own vector types.
//
// A row is walked in packets of one vector; `for_each_packet` runs one body for whole packets and for the tail, which differ only
// in the `Whole` or `Part` that the body hands to load, store and keep. 16-bit elements are widened as they are loaded and rounded
// as they are stored, so bodies compute in float whatever the tensor holds.
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

#include "../elementary.h"

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

// A packet as it lies in memory: T's bits, kLanes<T> of them.
template <class T>
struct Raw {
  using V = typename Simd<float>::Short;
};
template <>
struct Raw<float> {
  using V = vec_t<float>;
};
template <>
struct Raw<double> {
  using V = vec_t<double>;
};
template <class T>
using raw_t = typename Raw<T>::V;

template <class V>
MK_FN V load_raw(const void* p, Whole) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
MK_FN void store_raw(void* p, V v, Whole) {
  __builtin_memcpy(p, &v, sizeof v);
}
// The first n elements; the rest of the packet reads as 0 and is not touched in memory.
template <class V>
MK_FN V load_raw(const void* p, Part part) {
  constexpr int kSize = sizeof(V{}[0]);
#if defined(__AVX512F__)
  unsigned mask = (1u << part.n) - 1;
  if constexpr (kSize == 8) return (V)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  if constexpr (kSize == 4) return (V)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  if constexpr (kSize == 2) return (V)_mm256_maskz_loadu_epi16(__mmask16(mask), p);
#endif
  V v{};
  __builtin_memcpy(&v, p, size_t(part.n * kSize));
  return v;
}
template <class V>
MK_FN void store_raw(void* p, V v, Part part) {
  constexpr int kSize = sizeof(V{}[0]);
#if defined(__AVX512F__)
  unsigned mask = (1u << part.n) - 1;
  if constexpr (kSize == 8) return _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v);
  if constexpr (kSize == 4) return _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v);
  if constexpr (kSize == 2) return _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)v);
#endif
  __builtin_memcpy(p, &v, size_t(part.n * kSize));
}

template <class T>
MK_FN vec_t<acc_t<T>> widen(raw_t<T> raw) {
  return raw;
}
template <>
MK_FN vec_t<float> widen<bfloat16>(raw_t<bfloat16> raw) {
#if defined(__AVX512F__)
  // One permutation puts each element into the upper half of a lane; widening and shifting would take two instructions.
  Simd<float>::I from = lane_numbers<float>() << 16;
  return (vec_t<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)from, _mm512_castsi256_si512((__m256i)raw));
#else
  using S = Simd<float>;
  return (S::V)(__builtin_convertvector(raw, S::U) << 16);
#endif
}
template <>
MK_FN vec_t<float> widen<half>(raw_t<half> raw) {
#if defined(__AVX512F__)
  return (vec_t<float>)_mm512_cvtph_ps((__m256i)raw);
#elif defined(__AVX2__)
  return (vec_t<float>)_mm256_cvtph_ps((__m128i)raw);
#else
  using S = Simd<float>;
  S::U bits = __builtin_convertvector(raw, S::U), magnitude = (bits & 0x7fffu) << 13;
  // Rebias the exponent; infinities and NaNs need it twice, subnormals are normalised by one subtraction.
  S::U normal = magnitude + (magnitude >= 0x0f800000u ? 0x70000000u - S::U{} : 0x38000000u - S::U{});
  S::V subnormal = (S::V)(magnitude + 0x38800000u) - (S::V)(0x38800000u - S::U{});
  S::U value = magnitude < 0x00800000u ? (S::U)subnormal : normal;
  return (S::V)(value | (bits & 0x8000u) << 16);
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN. AVX-512's own bfloat16 rounding gives 0 for subnormal results.
template <class T>
MK_FN raw_t<T> narrow(vec_t<acc_t<T>> v) {
  return v;
}
template <>
MK_FN raw_t<bfloat16> narrow<bfloat16>(vec_t<float> v) {
#if defined(__AVX512BF16__)
  return (raw_t<bfloat16>)_mm512_cvtneps_pbh((__m512)v);
#else
  using S = Simd<float>;
  S::U bits = (S::U)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : 0x7fc0u - S::U{}, S::Short);
#endif
}
template <>
MK_FN raw_t<half> narrow<half>(vec_t<float> v) {
#if defined(__AVX512F__)
  return (raw_t<half>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (raw_t<half>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  using S = Simd<float>;
  S::U bits = (S::U)v, magnitude = bits & 0x7fffffffu;
  S::U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts a subnormal half's bits, rounded by the addition itself, at the bottom of the mantissa.
  S::U subnormal = (S::U)((S::V)magnitude + 0.5f) - 0x3f000000u;
  S::U value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x47800000u ? (magnitude > 0x7f800000u ? 0x7e00u - S::U{} : 0x7c00u - S::U{}) : value;
  return __builtin_convertvector(value | (bits >> 16 & 0x8000u), S::Short);
#endif
}

template <class T, class Width>
MK_FN vec_t<acc_t<T>> load(const T* p, Width width) {
  return widen<T>(load_raw<raw_t<T>>(p, width));
}
template <class T, class Width>
MK_FN void store(T* p, vec_t<acc_t<T>> v, Width width) {
  store_raw(p, narrow<T>(v), width);
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
  return __builtin_convertvector(load_raw<typename Simd<A>::Bytes>(p, Whole{}), typename Simd<A>::I) != 0;
}
template <class A>
MK_FN typename Simd<A>::I load_mask(const uint8_t* p, Part part) {
  uint8_t copy[Simd<A>::kLanes] = {};
  __builtin_memcpy(copy, p, size_t(part.n));
  return load_mask<A>(copy, Whole{});
}

// Adds halves, then quarters, and so on.
template <class A>
MK_FN A sum_lanes(vec_t<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
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

constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits

// 2^x to 1 ulp or so: 2^floor(x) p(x - floor(x)), p the minimax polynomial on [0, 1] (relative error 2e-9). Exponentials to base 2
// cost least, so callers fold the factor log2(e) into what they multiply by anyway. For x < 128; results below the smallest normal
// number may be 0.
MK_FN vec_t<float> exp2(vec_t<float> x) {
  using S = Simd<float>;
#if defined(__AVX512F__)
  S::V f = (S::V)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  S::V shifted = x - 0.5f + kShift;
  S::V f = x - (shifted - kShift);
#endif
  S::V p = 2.17022557e-4f * f + 1.24396877e-3f;
  p = p * f + 9.67884102e-3f;
  p = p * f + 5.54833420e-2f;
  p = p * f + 0.240229836f;
  p = p * f + 0.693146984f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  return (S::V)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return x < -126.f ? S::V{} : p * (S::V)(((S::U)shifted << 23) + 0x3f800000u);
#endif
}
MK_FN vec_t<double> exp2(vec_t<double> x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}
template <class A>
MK_FN A exp2_one(A x) {
  return exp2(broadcast(x))[0];
}

// e^(x^2) erfc(x) for x >= 0.
MK_FN vec_t<float> erfcx(vec_t<float> x) { return erfcx_polynomial(1.f / (1.f + 0.35f * x)); }
MK_FN vec_t<double> erfcx(vec_t<double> x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i)  // beyond 26 erfc is subnormal
    x[i] = x[i] > 26. ? 0.56418958354775629 / x[i] : __builtin_exp(x[i] * x[i]) * __builtin_erfc(x[i]);
  return x;
}

// The quotient of numbers whose size lets a GPU take the quick way: |b| < 2^126.
template <class V>
MK_FN V divide(V a, V b) {
  return a / b;
}
MK_FN float log(float x) { return __builtin_logf(x); }
MK_FN double log(double x) { return __builtin_log(x); }
MK_FN float rsqrt(float x) { return 1.f / __builtin_sqrtf(x); }
MK_FN double rsqrt(double x) { return 1. / __builtin_sqrt(x); }

}  // namespace math

}  // namespace
}  // namespace mk

#include "../scalar.h"
