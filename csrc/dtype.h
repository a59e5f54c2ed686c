// Element types: their names at run time, their storage at compile time, and the one switch between the two.
#pragma once
#include <stdint.h>

namespace mk {

enum class DType : int8_t { f32, f16, bf16, f64 };

// Storage only; each backend brings its own conversions.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// What a kernel computes in, and the type of statistics, losses and partial sums.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the storage type of dtype.
template <class F>
void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(Type<float>{});
    case DType::f16: return f(Type<half>{});
    case DType::bf16: return f(Type<bfloat16>{});
    case DType::f64: return f(Type<double>{});
  }
}

}  // namespace mk
