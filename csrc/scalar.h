// Formulas shared by every backend. V is what a kernel computes on (a vector on the CPU, a float on a GPU), A its element type.
// math::exp2, math::erfcx, math::divide, select and MK_FN come from the backend's header, which includes this one.
#pragma once

namespace mk {
namespace {

template <class A>
constexpr A kLog2e = A(1.44269504088896340736);

template <class V>
MK_FN V magnitude(V v) {
  return select(v < V{}, -v, v);
}
MK_FN float magnitude(float v) { return __builtin_fabsf(v); }  // costs nothing on a GPU

// NaN stays NaN.
template <class V>
MK_FN V at_least(V v, V low) {
  return select(v < low, low, v);
}
template <class V>
MK_FN V at_most(V v, V high) {
  return select(v > high, high, v);
}

// gelu(v) ~ v * sigmoid(2u), u = sqrt(2/pi) (v + 0.044715 v^3): the tanh approximation of Hendrycks and Gimpel (arXiv 1606.08415)
// with 0.5 (1 + tanh u) written as a sigmoid, which keeps its relative accuracy in the left tail. Beyond kFlat the sigmoid is 0 or
// 1 to working precision and exp(2u) would overflow.
template <class A>
struct GeluTanh {
  static constexpr A kAlpha = A(0.79788456080286535588);
  static constexpr A kCubic = A(0.044715);
  static constexpr A kFlat = sizeof(A) == sizeof(float) ? A(9.4) : A(20.5);

  template <class V>
  static MK_FN V clamp(V v) {
    return at_most(at_least(v, -kFlat - V{}), kFlat - V{});
  }
  template <class V>
  static MK_FN V exp_minus_2u(V v) {
    return math::exp2(v * (A(-2) * kAlpha * kLog2e<A> + A(-2) * kAlpha * kCubic * kLog2e<A> * (v * v)));
  }
  template <class V>
  static MK_FN V value(V v) {
    V low = at_least(v, -kFlat - V{});
    return math::divide(low, A(1) + exp_minus_2u(at_most(low, kFlat - V{})));
  }
  template <class V>
  static MK_FN V derivative(V v) {
    v = clamp(v);
    V e = exp_minus_2u(v), s = math::divide(A(1) - V{}, A(1) + e);  // 1 - s = e * s without cancellation
    return s + s * s * e * v * (A(2) * kAlpha + A(6) * kAlpha * kCubic * (v * v));
  }
};

// gelu(v) = v * Phi(v), with Phi(-|v|) = exp(-v^2/2) erfcx(|v|/sqrt 2) / 2 so that the left tail does not cancel. Beyond kFlat it
// is 0 to working precision, and |v| may stay there.
template <class A>
struct GeluErf {
  static constexpr A kInvSqrt2 = A(0.70710678118654752440);
  static constexpr A kInvSqrt2Pi = A(0.39894228040143267794);
  static constexpr A kFlat = sizeof(A) == sizeof(float) ? A(15) : A(39);

  template <class V>
  static MK_FN V size(V v) {
    return at_most(magnitude(v), kFlat - V{});
  }
  template <class V>
  static MK_FN V half_gauss(V size) {  // exp(-size^2/2) / 2
    return math::exp2(A(-0.5) * kLog2e<A> * (size * size) - A(1));
  }
  template <class V>
  static MK_FN V value(V v) {
    V a = size(v);
    return at_least(v, V{}) - a * (half_gauss(a) * math::erfcx(a * kInvSqrt2));
  }
  template <class V>
  static MK_FN V derivative(V v) {
    V a = size(v), tail = half_gauss(a) * (math::erfcx(a * kInvSqrt2) - A(2) * kInvSqrt2Pi * a);
    return select(v < V{}, tail, A(1) - tail);
  }
};

}  // namespace
}  // namespace mk
