// Functions of one float; math::exp2, log and rsqrt come from the compiler's header.
#pragma once

namespace mk {

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
template <class V>
MK_FN V select(bool condition, V yes, V no) {
  return condition ? yes : no;
}

namespace math {

// e^(x^2) erfc(x) for x >= 0: a minimax polynomial in 1 / (1 + 0.35 x), relative error 2e-8 up to x = 10; beyond that
// e^(-x^2) is 0 in float.
MK_FN float erfcx(float x) {
  float t = reciprocal(1.f + 0.35f * x);
  float p = 0.0650749215f * t - 0.392204257f;
  p = p * t + 0.820446426f;
  p = p * t - 0.713561407f;
  p = p * t + 0.649497983f;
  p = p * t - 0.0621893391f;
  p = p * t + 0.248029448f;
  p = p * t + 0.186363656f;
  p = p * t + 0.198592276f;
  return p * t - 4.97254800e-5f;
}

}  // namespace math

}  // namespace mk

#include "../scalar.h"
