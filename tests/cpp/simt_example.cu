// One kernel in each of the shapes that the dialect is for. Bytes moved per element of T: normalise 2T, softmax_long 3T,
// masked_gelu 2T and the mask, column_sums T.
#include "simt_example.h"

#include "../../csrc/simt/simt.h"

namespace mk::example {
namespace {

using namespace simt;

constexpr int kThreads = 256;

// Several rows a warp. Lanes whose row does not exist take part in the shuffles all the same.
template <class T, int W, int kLanes>
MK_KERNEL MK_MAX_THREADS(kThreads) void normalise_short_kernel(const T* x, T* y, int64_t rows, int64_t cols) {
  int64_t row = block() * (kThreads / kLanes) + thread() / kLanes;
  Span<W> s = span<W>(x, cols);
  if (row >= rows) s = {0, 0, 0};
  CachedRow<T, W, 1> cached = load_row<1>(x + row * cols, s, lanes<kLanes>());
  float sum = 0;
  cached.for_each([&](int64_t, auto& packet) {
    auto v = widen(packet);
    for (float e : v.v) sum += e;
  });
  float scale = 1.f / warp_reduce<kLanes>(sum, Sum{});
  cached.for_each([&](int64_t j, auto& packet) {
    auto v = widen(packet);
    for (float& e : v.v) e *= scale;
    store_once(y + row * cols + j, v);
  });
}

// A block per row; the row stays in registers, so that it is read once.
template <class T, int W, int kPackets>
MK_KERNEL MK_MAX_THREADS(kThreads) void normalise_kernel(const T* x, T* y, int64_t cols) {
  MK_SHARED(float, scratch, kThreads / 32);
  x += block() * cols;
  y += block() * cols;
  auto cached = load_row<kPackets>(x, span<W>(x, cols), whole_block());
  float sum = 0;
  cached.for_each([&](int64_t, auto& packet) {
    auto v = widen(packet);
    for (float e : v.v) sum += e;
  });
  float scale = 1.f / block_reduce(sum, Sum{}, 0.f, scratch);
  cached.for_each([&](int64_t j, auto& packet) {
    auto v = widen(packet);
    for (float& e : v.v) e *= scale;
    store_once(y + j, v);
  });
}

struct Online {
  float top, sum;  // maximum, and sum of 2^(x - top)
};
struct Merge {
  MK_FN Online operator()(Online a, Online b) const {
    float top = Max{}(a.top, b.top), shift = top == -kInfinity<float> ? 0.f : top;
    return {top, a.sum * math::exp2(a.top - shift) + b.sum * math::exp2(b.top - shift)};
  }
};

// A block per row, a row of any length: maximum and sum in one pass, then the output.
template <class T, int W>
MK_KERNEL MK_MAX_THREADS(kThreads) void softmax_long_kernel(const T* x, T* y, int64_t cols) {
  MK_SHARED(Online, scratch, kThreads / 32);
  x += block() * cols;
  y += block() * cols;
  Span<W> s = span<W>(x, cols);
  Online state = {-kInfinity<float>, 0};
  for_each_packet(s, whole_block(), [&](int64_t j, auto width) {
    auto v = widen(load(x + j, width));
    float top = state.top;
    for (float& e : v.v) {
      e *= kLog2e<float>;
      top = Max{}(top, e);
    }
    float shift = top == -kInfinity<float> ? 0.f : top, sum = state.sum * math::exp2(state.top - shift);
    for (float e : v.v) sum += math::exp2(e - shift);
    state = {top, sum};
  });
  state = block_reduce(state, Merge{}, Online{-kInfinity<float>, 0}, scratch);
  float scale = 1.f / state.sum;
  for_each_packet(s, whole_block(), [&](int64_t j, auto width) {
    auto v = widen(load_once(x + j, width));
    for (float& e : v.v) e = math::exp2(e * kLog2e<float> - state.top) * scale;
    store_once(y + j, v);
  });
}

template <class T, int W, class Gelu>
MK_KERNEL MK_MAX_THREADS(kThreads) void masked_gelu_kernel(const T* x, const T* bias, const uint8_t* mask, T* y, int64_t cols) {
  int64_t row = block() * cols;
  for_each_packet(span<W>(x, cols), whole_block(), [&](int64_t j, auto width) {
    auto v = widen(load_once(x + row + j, width));
    auto b = widen(load(bias + j, width));
    auto masked = load_once(mask + row + j, width);
    MK_UNROLL
    for (int i = 0; i < decltype(width)::value; ++i) v[i] = masked.get(i) ? 0.f : Gelu::value(v[i] + b[i]);
    store_once(y + row + j, v);
  });
}

// A persistent grid: each block adds up its rows in registers, packet by packet of columns, and leaves one partial row.
template <class T, int W, int kPackets>
MK_KERNEL MK_MAX_THREADS(kThreads) void column_sums_kernel(const T* x, const int64_t* index, float* partials, int64_t rows,
                                                           int64_t cols) {
  Floats<W> sums[kPackets];
  for (auto& sum : sums) sum = fill<W>(0.f);
  int64_t packets = cols / W;  // rows begin at multiples of W elements
  for (int64_t row = block(); row < rows; row += blocks()) {
    const T* from = x + load_one(index + row) * cols;
    MK_UNROLL
    for (int i = 0; i < kPackets; ++i) {
      int64_t k = thread() + int64_t(i) * kThreads;
      if (k >= packets) continue;
      auto v = widen(load_once(from + k * W, Width<W>{}));
      MK_UNROLL
      for (int e = 0; e < W; ++e) sums[i][e] += v[e];
    }
  }
  MK_UNROLL
  for (int i = 0; i < kPackets; ++i) {
    int64_t k = thread() + int64_t(i) * kThreads;
    if (k < packets) store(partials + block() * cols + k * W, sums[i]);
  }
}
template <class T>
MK_KERNEL void column_totals_kernel(const float* partials, T* out, int64_t parts, int64_t cols) {
  int64_t j = block() * threads() + thread();
  if (j >= cols) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += load_one(partials + part * cols + j);
  store_one(out + j, sum);
}

}  // namespace

template <class T>
Error normalise_short(const T* x, T* y, int64_t rows, int64_t cols) {
  return visit_width<T>(rows_are_aligned<T>(cols, x, y), [&](auto width) {
    constexpr int W = decltype(width)::value, kLanes = W > 1 ? 32 / W : 32;
    int64_t per_block = kThreads / kLanes;
    return launch("normalise_short", {reads("x", x, rows * cols), writes("y", y, rows * cols)}, (rows + per_block - 1) / per_block,
                  kThreads, {}, normalise_short_kernel<T, W, kLanes>, x, y, rows, cols);
  });
}

template <class T>
Error normalise(const T* x, T* y, int64_t rows, int64_t cols) {
  return visit_width<T>(lie_alike(x, y), [&](auto width) {
    constexpr int W = decltype(width)::value, kPackets = 4096 / kThreads / W;
    return launch("normalise", {reads("x", x, rows * cols), writes("y", y, rows * cols)}, rows, kThreads, {},
                  normalise_kernel<T, W, kPackets>, x, y, cols);
  });
}

template <class T>
Error softmax_long(const T* x, T* y, int64_t rows, int64_t cols) {
  return visit_width<T>(lie_alike(x, y), [&](auto width) {
    return launch("softmax_long", {reads("x", x, rows * cols), writes("y", y, rows * cols)}, rows, kThreads, {},
                  softmax_long_kernel<T, decltype(width)::value>, x, y, cols);
  });
}

template <class T>
Error masked_gelu(const T* x, const T* bias, const uint8_t* mask, T* y, int64_t rows, int64_t cols, bool tanh) {
  bool full = rows_are_aligned<T>(cols, x, bias, y) && reinterpret_cast<uintptr_t>(mask) % kFull<T> == 0;
  return visit_width<T>(full, [&](auto width) {
    constexpr int W = decltype(width)::value;
    return launch(
        "masked_gelu",
        {reads("x", x, rows * cols), reads("bias", bias, cols), reads("mask", mask, rows * cols), writes("y", y, rows * cols)},
        rows, kThreads, {}, tanh ? masked_gelu_kernel<T, W, GeluTanh<float>> : masked_gelu_kernel<T, W, GeluErf<float>>, x, bias,
        mask, y, cols);
  });
}

int64_t column_sum_blocks(int64_t rows) { return rows < 2 * multiprocessors({}) ? rows : 2 * multiprocessors({}); }

template <class T>
Error column_sums(const T* x, const int64_t* index, float* partials, T* out, int64_t rows, int64_t cols) {
  int64_t parts = column_sum_blocks(rows);
  Error error = visit_width<T>(rows_are_aligned<T>(cols, x, partials), [&](auto width) {
    constexpr int W = decltype(width)::value;
    return launch("column_sums",
                  {reads("x", x, rows * cols), reads("index", index, rows), writes("partials", partials, parts * cols)}, parts,
                  kThreads, {}, column_sums_kernel<T, W, 4096 / kThreads / W>, x, index, partials, rows, cols);
  });
  if (error) return error;
  return launch("column_totals", {reads("partials", partials, parts * cols), writes("out", out, cols)},
                (cols + kThreads - 1) / kThreads, kThreads, {}, column_totals_kernel<T>, partials, out, parts, cols);
}

#define MK_INSTANTIATE(T)                                                                     \
  template Error normalise_short(const T*, T*, int64_t, int64_t);                             \
  template Error normalise(const T*, T*, int64_t, int64_t);                                   \
  template Error softmax_long(const T*, T*, int64_t, int64_t);                                \
  template Error masked_gelu(const T*, const T*, const uint8_t*, T*, int64_t, int64_t, bool); \
  template Error column_sums(const T*, const int64_t*, float*, T*, int64_t, int64_t);
MK_INSTANTIATE(float)
MK_INSTANTIATE(half)
MK_INSTANTIATE(bfloat16)

}  // namespace mk::example
