// Formulas shared by every backend. `math::exp`, `math::erfcx` and MK_FN come from the backend's header, which includes this one.
#pragma once

namespace mk {
namespace {

// gelu(v) ~ v * sigmoid(2u), u = sqrt(2/pi) (v + 0.044715 v^3): the tanh approximation of Hendrycks and Gimpel (arXiv 1606.08415)
// with 0.5 (1 + tanh u) written as a sigmoid, which keeps its relative accuracy in the left tail. Beyond kFlat the sigmoid is 0 or
// 1 to working precision and exp(2u) would overflow.
template <class A>
struct GeluTanh {
  static constexpr A kAlpha = A(0.79788456080286535588);
  static constexpr A kCubic = A(0.044715);
  static constexpr A kFlat = sizeof(A) == sizeof(float) ? A(9.4) : A(20.5);

  static MK_FN A at_least(A v) { return v < -kFlat ? -kFlat : v; }
  static MK_FN A clamp(A v) { return v > kFlat ? kFlat : at_least(v); }
  static MK_FN A exp_minus_2u(A v) { return math::exp(A(-2) * kAlpha * v * (A(1) + kCubic * v * v)); }
  static MK_FN A value(A v) { return at_least(v) / (A(1) + exp_minus_2u(clamp(v))); }
  static MK_FN A derivative(A v) {
    v = clamp(v);
    A e = exp_minus_2u(v), s = A(1) / (A(1) + e);  // 1 - s = e * s without cancellation
    return s + s * s * e * A(2) * kAlpha * v * (A(1) + A(3) * kCubic * v * v);
  }
};

// gelu(v) = v * Phi(v), with Phi(-|v|) = exp(-v^2/2) erfcx(|v|/sqrt 2) / 2 so that the left tail does not cancel.
template <class A>
struct GeluErf {
  static constexpr A kInvSqrt2 = A(0.70710678118654752440);
  static constexpr A kInvSqrt2Pi = A(0.39894228040143267794);

  static MK_FN A cdf(A v, A gauss) {
    A tail = A(0.5) * gauss * math::erfcx((v < A(0) ? -v : v) * kInvSqrt2);
    return v < A(0) ? tail : A(1) - tail;
  }
  static MK_FN A value(A v) { return v * cdf(v, math::exp(A(-0.5) * v * v)); }
  static MK_FN A derivative(A v) {
    A gauss = math::exp(A(-0.5) * v * v);
    return cdf(v, gauss) + v * kInvSqrt2Pi * gauss;
  }
};

}  // namespace
}  // namespace mk
