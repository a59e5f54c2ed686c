// Formulas shared by every backend. V is what a kernel computes on (a vector on the CPU, a float on a GPU), A its element type.
// math::exp2, math::erfcx, select and MK_FN come from the backend's header, which includes this one.
#pragma once

namespace mk {
namespace {

template <class A>
constexpr A kLog2e = A(1.44269504088896340736);

// gelu(v) ~ v * sigmoid(2u), u = sqrt(2/pi) (v + 0.044715 v^3): the tanh approximation of Hendrycks and Gimpel (arXiv 1606.08415)
// with 0.5 (1 + tanh u) written as a sigmoid, which keeps its relative accuracy in the left tail. Beyond kFlat the sigmoid is 0 or
// 1 to working precision and exp(2u) would overflow.
template <class A>
struct GeluTanh {
  static constexpr A kAlpha = A(0.79788456080286535588);
  static constexpr A kCubic = A(0.044715);
  static constexpr A kFlat = sizeof(A) == sizeof(float) ? A(9.4) : A(20.5);

  template <class V>
  static MK_FN V at_least(V v) {
    V low = -kFlat - V{};
    return select(v < low, low, v);
  }
  template <class V>
  static MK_FN V clamp(V v) {
    V high = kFlat - V{};
    return select(v > high, high, at_least(v));
  }
  template <class V>
  static MK_FN V exp_minus_2u(V v) {
    return math::exp2(v * (A(-2) * kAlpha * kLog2e<A> + A(-2) * kAlpha * kCubic * kLog2e<A> * (v * v)));
  }
  template <class V>
  static MK_FN V value(V v) {
    return at_least(v) / (A(1) + exp_minus_2u(clamp(v)));
  }
  template <class V>
  static MK_FN V derivative(V v) {
    v = clamp(v);
    V e = exp_minus_2u(v), s = A(1) / (A(1) + e);  // 1 - s = e * s without cancellation
    return s + s * s * e * v * (A(2) * kAlpha + A(6) * kAlpha * kCubic * (v * v));
  }
};

// gelu(v) = v * Phi(v), with Phi(-|v|) = exp(-v^2/2) erfcx(|v|/sqrt 2) / 2 so that the left tail does not cancel.
template <class A>
struct GeluErf {
  static constexpr A kInvSqrt2 = A(0.70710678118654752440);
  static constexpr A kInvSqrt2Pi = A(0.39894228040143267794);

  template <class V>
  static MK_FN V cdf(V v, V gauss) {
    V zero = V{}, tail = A(0.5) * gauss * math::erfcx(select(v < zero, -v, v) * kInvSqrt2);
    return select(v < zero, tail, A(1) - tail);
  }
  template <class V>
  static MK_FN V value(V v) {
    return v * cdf(v, math::exp2(A(-0.5) * kLog2e<A> * (v * v)));
  }
  template <class V>
  static MK_FN V derivative(V v) {
    V gauss = math::exp2(A(-0.5) * kLog2e<A> * (v * v));
    return cdf(v, gauss) + v * gauss * kInvSqrt2Pi;
  }
};

}  // namespace
}  // namespace mk
