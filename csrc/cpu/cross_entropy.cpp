// The forward reads the logits once: tile by tile it keeps the maximum and the sum of exponentials relative to it, in one pass; a
// tile that raises the maximum is done again from the cache, which is rare after the first (T bytes per element). The backward
// reads and writes once (2T), from the saved log-sum-exp.
#include "../cross_entropy.h"

#include "rows.h"

namespace mk::cpu::MK_ISA {
namespace {

constexpr int64_t kTile = 512;

template <class A>
struct RowState {
  A top = -kInfinity<A>, exps = 0, sum = 0;  // max, sum of exp(x - max), sum of x
};

template <class T, bool kSum>
RowState<acc_t<T>> scan(const T* x, int64_t cols) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  RowState<A> s;
  for (int64_t begin = 0; begin < cols;) {
    int64_t end = min(cols, begin + kTile);
    // While all is -inf any finite number serves as the maximum: exp gives 0 for each -inf, and NaN for a NaN.
    A shift = s.top == -kInfinity<A> ? A(0) : s.top;
    V tops = broadcast(s.top), exps{}, sums{};
    for_each_packet<T>(begin, end, [&](int64_t j, auto width) {
      V v = load(x + j, width);
      exps += keep(math::exp2((v - shift) * kLog2e<A>), V{}, width);
      if (kSum) sums += v;
      v = keep(v, tops, width);
      tops = select(v > tops, v, tops);
    });
    A top = max_lanes<A>(tops);
    if (top > s.top) {  // a new maximum: what was added up is rescaled, and the tile done again
      s.exps *= math::exp2_one<A>((s.top - top) * kLog2e<A>);
      s.top = top;
      continue;
    }
    s.exps += sum_lanes<A>(exps);
    s.sum += sum_lanes<A>(sums);
    begin = end;
  }
  return s;
}

// Keeps the smallest row number among all threads'.
void report(int64_t* bad_row, int64_t row) {
  int64_t seen = __atomic_load_n(bad_row, __ATOMIC_RELAXED);
  while (row < seen && !__atomic_compare_exchange_n(bad_row, &seen, row, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

template <class Args>
bool is_class(const Args& a, int64_t target) {
  return target >= 0 && target < a.vocab_size;
}

// Columns of this shard that are classes.
template <class Args>
int64_t class_columns(const Args& a) {
  return max<int64_t>(0, min(a.cols, a.vocab_size - a.vocab_start));
}

template <class T>
void forward(const CrossEntropyForward& a, ParallelFor pf) {
  using A = acc_t<T>;
  int64_t cols = class_columns(a);
  A alpha = A(a.label_smoothing);
  parallel(pf, a.rows, a.cols, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(a.logits) + row * a.cols;
      int64_t target = a.target[row], column = target - a.vocab_start;
      bool ignored = target == a.ignore_index, bad = !ignored && !is_class(a, target);
      if (bad) report(a.bad_row, row);
      RowState<A> s;
      if (!ignored) s = a.label_smoothing != 0 ? scan<T, true>(x, cols) : scan<T, false>(x, cols);
      bool here = !ignored && !bad && column >= 0 && column < cols;
      if (a.partial) {
        A* out = static_cast<A*>(a.partial) + row * 3;
        out[0] = s.top;
        out[1] = s.exps;
        out[2] = (here ? (A(1) - alpha) * load_one(x + column) : A(0)) + alpha / A(a.vocab_size) * s.sum;
        if (bad) out[2] = kNaN<A>;
        continue;
      }
      A log_exps = math::log(s.exps), lse = s.top + log_exps, loss = 0;
      if (here) {  // differences from the maximum, so that large logits don't cancel
        loss = log_exps - (A(1) - alpha) * (load_one(x + column) - s.top) + A(a.z_loss) * lse * lse;
        if (alpha != 0) loss -= alpha * (s.sum / A(a.vocab_size) - s.top);
      }
      static_cast<A*>(a.loss)[row] = bad ? kNaN<A> : loss;
      static_cast<A*>(a.lse)[row] = lse;
    }
  });
}

template <class T>
void backward(const CrossEntropyBackward& a, ParallelFor pf) {
  using A = acc_t<T>;
  int64_t cols = class_columns(a);
  A alpha = A(a.label_smoothing);
  parallel(pf, a.rows, a.cols, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(a.logits) + row * a.cols;
      T* dx = static_cast<T*>(a.dlogits) + row * a.cols;
      int64_t target = a.target[row], column = target - a.vocab_start;
      if (target == a.ignore_index) {
        clear(dx, a.cols);
        continue;
      }
      A lse = static_cast<const A*>(a.lse)[row], dloss = static_cast<const A*>(a.dloss)[row];
      if (!is_class(a, target)) dloss = kNaN<A>;
      A factor = dloss * (A(1) + A(2) * A(a.z_loss) * lse), uniform = dloss * alpha / A(a.vocab_size);
      bool here = column >= 0 && column < cols;
      // p - 1 formed in float: in 16 bits it would cancel where p is close to 1.
      A true_class =
          here ? factor * math::exp2_one<A>((load_one(x + column) - lse) * kLog2e<A>) - uniform - dloss * (A(1) - alpha) : A(0);
      for_each_packet<T>(0, cols, [&](int64_t j, auto width) {
        store(dx + j, factor * math::exp2((load(x + j, width) - lse) * kLog2e<A>) - uniform, width);
      });
      if (here) store_one(dx + column, true_class);
      clear(dx + cols, a.cols - cols);
    }
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a, ParallelFor pf) {
  visit(a.dtype, [&](auto type) { forward<typename decltype(type)::type>(a, pf); });
}

void cross_entropy_backward(const CrossEntropyBackward& a, ParallelFor pf) {
  visit(a.dtype, [&](auto type) { backward<typename decltype(type)::type>(a, pf); });
}

}  // namespace mk::cpu::MK_ISA
