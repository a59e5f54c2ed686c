// One pass each way: the forward reads x and writes y (2T bytes per element), the backward reads dy and x, writes dx (3T) and adds
// dx up for the bias gradient while it is in a register.
#include "../bias_gelu.h"

#include "rows.h"

namespace mk::cpu::MK_ISA {
namespace {

template <class T, class Gelu>
void forward(const BiasGeluForward& a, ParallelFor pf) {
  using A = acc_t<T>;
  A* bias = static_cast<A*>(a.workspace);
  widen_parameter<A>(a.bias, a.bias_dtype, a.cols, A(0), bias);
  parallel(pf, a.rows, a.cols, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.cols;
      T* y = static_cast<T*>(a.y) + row * a.cols;
      for_each_packet<T>(
          0, a.cols, [&](int64_t j, auto width) { store(y + j, Gelu::value(load(x + j, width) + load(bias + j, width)), width); });
    }
  });
}

template <class T, class Gelu>
void backward(const BiasGeluBackward& a, ParallelFor pf) {
  using A = acc_t<T>;
  A* bias = static_cast<A*>(a.workspace);
  A* partials = bias + a.cols;
  widen_parameter<A>(a.bias, a.bias_dtype, a.cols, A(0), bias);
  int64_t blocks = row_blocks(a.rows, a.cols);
  parallel(pf, blocks, a.rows / blocks * a.cols, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      A* dbias = partials + b * a.cols;
      clear(dbias, a.cols);
      for (int64_t row = block_begin(b, blocks, a.rows); row < block_begin(b + 1, blocks, a.rows); ++row) {
        const T* dy = static_cast<const T*>(a.dy) + row * a.cols;
        const T* x = static_cast<const T*>(a.x) + row * a.cols;
        T* dx = static_cast<T*>(a.dx) + row * a.cols;
        for_each_packet<T>(0, a.cols, [&](int64_t j, auto width) {
          auto d = load(dy + j, width) * Gelu::derivative(load(x + j, width) + load(bias + j, width));
          store(dbias + j, load(dbias + j, width) + d, width);
          store(dx + j, d, width);
        });
      }
    }
  });
  sum_partials(pf, partials, a.cols, blocks, a.cols, a.dbias, a.bias_dtype);
}

}  // namespace

int64_t bias_gelu_forward_workspace(int64_t, int64_t cols) { return cols; }
int64_t bias_gelu_backward_workspace(int64_t rows, int64_t cols) { return cols + row_blocks(rows, cols) * cols; }

void bias_gelu_forward(const BiasGeluForward& a, ParallelFor pf) {
  visit(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    a.tanh ? forward<T, GeluTanh<acc_t<T>>>(a, pf) : forward<T, GeluErf<acc_t<T>>>(a, pf);
  });
}

void bias_gelu_backward(const BiasGeluBackward& a, ParallelFor pf) {
  visit(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    a.tanh ? backward<T, GeluTanh<acc_t<T>>>(a, pf) : backward<T, GeluErf<acc_t<T>>>(a, pf);
  });
}

}  // namespace mk::cpu::MK_ISA
