// Sharing rows among threads, and column sums over rows.
#pragma once
#include "../parallel_for.h"
#include "vec.h"

namespace mk {
namespace {

template <class T>
MK_FN void clear(T* first, int64_t n) {
  __builtin_memset(first, 0, size_t(n) * sizeof(T));
}

// Brings the packet at p into the second-level cache. Hardware prefetchers follow a stream, and lose it where a causal row ends;
// into the first-level cache this would fight with the stores. Never faults, so p may lie beyond the tensor.
template <class T>
MK_FN void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Rows whose work is too small to share are run by one thread.
constexpr int64_t kGrainElements = 16384;

// Runs f(first, last) over [0, items) on the caller's threads; one item is about `elements` elements of work.
template <class F>
void parallel(ParallelFor pf, int64_t items, int64_t elements, const F& f) {
  if (items == 0) return;
  int64_t grain = max<int64_t>(1, kGrainElements / max<int64_t>(1, elements));
  pf(
      0, items, grain, [](int64_t first, int64_t last, void* body) { (*static_cast<const F*>(body))(first, last); },
      const_cast<F*>(&f));
}

// The sum of f(j, width) over the packets of [0, n), tile by tile: in one running sum a large term would swallow thousands of small
// ones. Lanes beyond n must come out of f as 0.
template <class T, class F>
MK_FN acc_t<T> sum_of(int64_t n, const F& f) {
  constexpr int64_t kTile = 512;
  vec_t<acc_t<T>> total{};
  for (int64_t begin = 0; begin < n; begin += kTile) {
    vec_t<acc_t<T>> sum{};
    for_each_packet<T>(begin, min(n, begin + kTile), [&](int64_t j, auto width) { sum += f(j, width); });
    total += sum;
  }
  return sum_lanes<acc_t<T>>(total);
}

// Copies a parameter vector into the accumulation type; a null one becomes `missing` everywhere.
template <class A>
void widen_parameter(const void* from, DType dtype, int64_t n, A missing, A* to) {
  if (!from) {
    for (int64_t j = 0; j < n; ++j) to[j] = missing;
    return;
  }
  visit(dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    if constexpr (sizeof(acc_t<P>) == sizeof(A))
      for_each_packet<P>(0, n, [&](int64_t j, auto width) { store(to + j, load(static_cast<const P*>(from) + j, width), width); });
  });
}

// Column sums over many rows in two stages: each of row_blocks() blocks of rows adds up a partial row of its own, then the
// partials are added in order. The split depends on the shape alone, so results don't depend on the number of threads.
MK_FN int64_t row_blocks(int64_t rows, int64_t cols) {
  int64_t wanted = (rows * cols + 65535) / 65536;
  return max<int64_t>(1, min<int64_t>(min<int64_t>(wanted, 64), rows));
}
MK_FN int64_t block_begin(int64_t block, int64_t blocks, int64_t rows) { return rows / blocks * block + min(block, rows % blocks); }

template <class A>
void sum_partials(ParallelFor pf, const A* partials, int64_t stride, int64_t blocks, int64_t cols, void* out, DType dtype) {
  if (!out) return;
  constexpr int64_t kTile = 256;
  parallel(pf, (cols + kTile - 1) / kTile, kTile * blocks, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * kTile; begin < min(cols, last * kTile); begin += kTile) {
      int64_t n = min(kTile, cols - begin);
      A sum[kTile] = {};
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = 0; j < n; ++j) sum[j] += partials[b * stride + begin + j];
      visit(dtype, [&](auto type) {
        using P = typename decltype(type)::type;
        P* to = static_cast<P*>(out) + begin;
        if constexpr (sizeof(acc_t<P>) == sizeof(A))
          for_each_packet<P>(0, n, [&](int64_t j, auto width) { store(to + j, load(sum + j, width), width); });
      });
    }
  });
}

}  // namespace
}  // namespace mk
