// Softmax in two passes over a row: exponentials relative to a pivot and their sum, kept in a float buffer, then one scaled write.
// The pivot is a guess at the maximum, which is looked for on the way; a row where the guess was far off is done again. A row too
// long for the buffer computes exp twice instead. Moves 2T bytes per element forward and 3T backward; causal rows stop at the
// diagonal.
#include "../scaled_masked_softmax.h"

#include "rows.h"

namespace mk::cpu::MK_ISA {
namespace {

constexpr int64_t kBuffer = 8192;  // elements of a row kept on the stack between the passes

int64_t mask_offset(const RowMask& mask, int64_t row) {
  int64_t offset = 0;
  for (int d = mask.ndim - 1; d >= 0; --d) {
    offset += row % mask.size[d] * mask.stride[d];
    row /= mask.size[d];
  }
  return offset;
}

// Columns of `row` at or left of the diagonal.
int64_t live_columns(bool causal, int64_t row, int64_t queries, int64_t cols) {
  return causal ? max<int64_t>(0, min(cols, row % queries + cols - queries + 1)) : cols;
}

// One row's first n columns. `mask` is read where kMasked; `next` is the row to come.
template <class T, bool kMasked>
void forward_row(const T* x, const uint8_t* mask, T* y, int64_t n, acc_t<T> scale, const T* next) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  // v where the position takes part, else `otherwise`.
  auto live = [&](V v, V otherwise, int64_t j, auto width) {
    if constexpr (kMasked) v = select(load_mask<A>(mask + j, width), otherwise, v);
    return keep(v, otherwise, width);
  };
  A sign = scale < 0 ? A(-1) : A(1), factor = scale * kLog2e<A>;
  V tops = broadcast(-kInfinity<A>);
  auto raise = [&](int64_t j, auto width) {
    V z = live(load(x + j, width) * sign, tops, j, width);
    tops = select(z > tops, z, tops);
  };
  // Any pivot near the maximum will do, and the first packet's usually is one. scale * (x - pivot) cannot overflow to infinity for
  // finite x, as scale * x can.
  for_each_packet<T>(0, min<int64_t>(n, kLanes<T>), raise);
  A top = max_lanes<A>(tops);

  auto exponential = [&](int64_t j, auto width) {
    return live(math::exp2((load(x + j, width) - top * sign) * factor), V{}, j, width);
  };
  bool buffered = n <= kBuffer;
  alignas(kVectorBytes) A e[kBuffer + kLanes<T>];  // whole packets, also at the tail
  A sum;
  for (;;) {
    sum = sum_of<T>(n, [&](int64_t j, auto width) {
      V v = exponential(j, width);
      raise(j, width);
      if (buffered) store(e + j, v, Whole{});
      return v;
    });
    A found = max_lanes<A>(tops);
    bool masked_so_far = top == -kInfinity<A> && found > top;
    if (!masked_so_far && !((found - top) * sign * factor > A(64))) break;  // 2^64 times kBuffer is far from overflow
    top = found;
  }
  A inverse = A(1) / sum;
  if (buffered)
    for_each_packet<T>(0, n, [&](int64_t j, auto width) {
      prefetch(next + j);
      store(y + j, live(load(e + j, Whole{}) * inverse, V{}, j, width), width);
    });
  else
    for_each_packet<T>(0, n,
                       [&](int64_t j, auto width) { store(y + j, live(exponential(j, width) * inverse, V{}, j, width), width); });
}

template <class T>
void forward(const SoftmaxForward& a, ParallelFor pf) {
  parallel(pf, a.rows, a.cols, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.cols;
      T* y = static_cast<T*>(a.y) + row * a.cols;
      const uint8_t* mask = a.mask.data ? a.mask.data + mask_offset(a.mask, row) : nullptr;
      int64_t n = live_columns(a.causal, row, a.queries, a.cols);
      bool whole_row = mask && a.mask.col_stride == 0;
      if (n == 0 || (whole_row && *mask)) {
        clear(y, a.cols);
        continue;
      }
      if (mask && !whole_row)
        forward_row<T, true>(x, mask, y, n, acc_t<T>(a.scale), x + a.cols);
      else
        forward_row<T, false>(x, nullptr, y, n, acc_t<T>(a.scale), x + a.cols);
      clear(y + n, a.cols - n);
    }
  });
}

template <class T>
void backward(const SoftmaxBackward& a, ParallelFor pf) {
  using A = acc_t<T>;
  parallel(pf, a.rows, a.cols, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* dy = static_cast<const T*>(a.dy) + row * a.cols;
      const T* y = static_cast<const T*>(a.y) + row * a.cols;
      T* dx = static_cast<T*>(a.dx) + row * a.cols;
      int64_t n = live_columns(a.causal, row, a.queries, a.cols);
      A scale = A(a.scale), dot = sum_of<T>(n, [&](int64_t j, auto width) { return load(y + j, width) * load(dy + j, width); });
      for_each_packet<T>(
          0, n, [&](int64_t j, auto width) { store(dx + j, scale * load(y + j, width) * (load(dy + j, width) - dot), width); });
      clear(dx + n, a.cols - n);
    }
  });
}

}  // namespace

void scaled_masked_softmax_forward(const SoftmaxForward& a, ParallelFor pf) {
  visit(a.dtype, [&](auto type) { forward<typename decltype(type)::type>(a, pf); });
}

void scaled_masked_softmax_backward(const SoftmaxBackward& a, ParallelFor pf) {
  visit(a.dtype, [&](auto type) { backward<typename decltype(type)::type>(a, pf); });
}

}  // namespace mk::cpu::MK_ISA
