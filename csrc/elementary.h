// Constants, comparisons and polynomials that every backend's header includes, after it has defined MK_FN.
#pragma once

namespace mk {
namespace {

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
// C is bool, or a vector of comparisons.
template <class C, class V>
MK_FN V select(C condition, V yes, V no) {
  return condition ? yes : no;
}

// erfcx(x) = e^(x^2) erfc(x) in float, x >= 0, given t = 1 / (1 + 0.35 x): a minimax polynomial, relative error 2e-8 up to x = 10;
// beyond that e^(-x^2) is 0 in float.
template <class V>
MK_FN V erfcx_polynomial(V t) {
  V p = 0.0650749215f * t - 0.392204257f;
  p = p * t + 0.820446426f;
  p = p * t - 0.713561407f;
  p = p * t + 0.649497983f;
  p = p * t - 0.0621893391f;
  p = p * t + 0.248029448f;
  p = p * t + 0.186363656f;
  p = p * t + 0.198592276f;
  return p * t - 4.97254800e-5f;
}

}  // namespace
}  // namespace mk
