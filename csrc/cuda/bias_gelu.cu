// The forward knows no rows: the tensor is one run of elements, so that rows of any length move in 16-byte accesses, and only the
// bias is looked up by column (2T bytes per element). The backward gives each thread a packet of columns to keep: it adds up dbias
// in registers while it writes dx (3T, and a float per column and part of the rows).
#include "../bias_gelu.h"

#include "rows.h"

namespace mk::cuda {
namespace {

constexpr int kThreads = 256;
template <int W>
constexpr int kPackets = W == 1 ? 16 : 4;  // of x that a thread of the forward has under way
constexpr int kTileColumns = 256;          // of the backward: a block takes as many neighbouring columns, or all if there are fewer
constexpr int kBlocksAtOnce = 4;           // of the backward, on a multiprocessor

// W <= cols elements of the bias from `column` on; after the last column comes the first.
template <class T, int W>
MK_FN Floats<W> load_around(const T* bias, int64_t column, int64_t cols) {
  Floats<W> out;
  const T *here = bias + column, *next = here - cols;
  int left = int(min(cols - column, int64_t(W)));
  MK_UNROLL
  for (int i = 0; i < W; ++i) out[i] = load_one((i < left ? here : next) + i);
  return out;
}

// `step`: how many columns a thread's packets lie apart, modulo cols. `whole`: every packet of x has an aligned packet of the bias.
template <class T, int W, class Gelu>
MK_KERNEL MK_MAX_THREADS(kThreads) void bias_gelu_forward_kernel(const T* x, Parameter bias, T* y, int64_t n, int64_t cols,
                                                                 int64_t step, bool whole) {
  Range mine = chunk<W>(x, n, block(), kThreads * kPackets<W> * W);
  x += mine.begin;
  y += mine.begin;
  auto run = load_row<kPackets<W>>(x, span<W>(x, mine.end - mine.begin), Team{thread(), kThreads});
  int64_t column = quotient(mine.begin + run.span.packet_column(thread()), cols).remainder;
  auto floats = static_cast<const float*>(bias.data);
  auto elements = static_cast<const T*>(bias.data);
  run.for_each([&](int64_t j, auto& packet) {
    constexpr int kWidth = decltype(packet.width())::value;
    if constexpr (kWidth < W) column = quotient(mine.begin + j, cols).remainder;
    auto v = widen(packet), b = v;
    if (whole)
      b = bias.is_float ? widen(load(floats + column, packet.width())) : widen(load(elements + column, packet.width()));
    else
      b = bias.is_float ? load_around<float, kWidth>(floats, column, cols) : load_around<T, kWidth>(elements, column, cols);
    MK_UNROLL
    for (int i = 0; i < kWidth; ++i) v[i] = Gelu::value(v[i] + b[i]);
    store_once(y + j, v);
    column += step;
    if (column >= cols) column -= cols;
  });
}

// A block takes 2^log_lanes packets of columns: each of its teams of as many threads has a row of them, and then the row that lies
// `step` rows or `pitch` elements further.
template <class T, int W, class Gelu>
MK_KERNEL MK_MAX_THREADS(kThreads, kBlocksAtOnce) void bias_gelu_backward_kernel(const T* dy, const T* x, Parameter bias, T* dx,
                                                                                 float* partials, int64_t rows, int64_t cols,
                                                                                 int log_lanes, int64_t tiles, int64_t step,
                                                                                 int64_t pitch) {
  constexpr int kRows = W == 1 ? 4 : 2;  // so many are loaded before the first is used
  MK_SHARED(Floats<W>, sums, kThreads);
  Quotient at = quotient(block(), tiles);
  int lanes = 1 << log_lanes, team = thread() >> log_lanes, teams = kThreads >> log_lanes;
  int64_t j = (at.remainder * lanes + thread() % lanes) * W, row = at.quotient * teams + team;
  bool inside = j < cols;
  int left = inside && row < rows ? int(quotient(rows - 1 - row, step).quotient) + 1 : 0;  // rows of this thread
  Floats<W> b = fill<W>(0.f), sum = b;
  if (inside) b = load_parameter<T>(bias, j, Width<W>{}, 0.f);
  dy += row * cols + j;
  x += row * cols + j;
  dx += row * cols + j;
  for (; left > 0; left -= kRows) {
    Packet<T, W> dys[kRows], xs[kRows];
    MK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= left) continue;
      dys[r] = load_once(dy, Width<W>{});
      xs[r] = load_once(x, Width<W>{});
      dy += pitch;
      x += pitch;
    }
    MK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= left) continue;
      Floats<W> v = widen(xs[r]), d = widen(dys[r]);
      MK_UNROLL
      for (int i = 0; i < W; ++i) {
        d[i] *= Gelu::derivative(v[i] + b[i]);
        sum[i] += d[i];
      }
      store_once(dx, d);
      dx += pitch;
    }
  }
  sums.set(thread(), sum);
  for (int half = teams / 2; half > 0; half /= 2) {
    sync_block();
    if (team >= half) continue;
    Floats<W> other = sums.get(thread() + half * lanes);
    MK_UNROLL
    for (int i = 0; i < W; ++i) sum[i] += other[i];
    sums.set(thread(), sum);
  }
  if (team == 0) store(partials + (block() * lanes + thread()) * W, round<float>(sum));
}

// How the backward is cut into blocks: neighbouring columns, and every so many rows. Each block leaves a row of partial sums.
struct Grid {
  int64_t tile, tiles, splits;  // columns of a block, a power of two; blocks side by side; blocks below each other
  int64_t blocks() const { return tiles * splits; }
  int64_t partials() const { return blocks() * tile; }
};
Grid backward_grid(int64_t rows, int64_t cols, Stream stream) {
  Grid g = {1, 1, 1};
  while (g.tile < cols && g.tile < kTileColumns) g.tile *= 2;
  g.tiles = (cols + g.tile - 1) / g.tile;
  // As many blocks as run at once, but none for less than 16 elements a thread.
  int64_t at_once = multiprocessors(stream) * kBlocksAtOnce / g.tiles, worthwhile = rows * g.tile / (16 * kThreads);
  g.splits = at_once < worthwhile ? at_once : worthwhile;
  if (g.splits < 1) g.splits = 1;
  return g;
}

template <class T, class Gelu>
Error forward(const BiasGeluForward& a, Stream stream) {
  auto x = static_cast<const T*>(a.x);
  auto y = static_cast<T*>(a.y);
  Parameter bias = {a.bias, a.bias_dtype == DType::f32};
  return visit_width<T>(lie_alike<T>(x, y) && a.cols >= kFull<T>, [&](auto width) {
    constexpr int W = decltype(width)::value, kSize = kThreads * kPackets<W> * W;
    int64_t n = a.rows * a.cols;
    return launch("bias_gelu_forward", {reads("x", x, n), reads<T>("bias", bias, a.cols), writes("y", y, n)},
                  (n + W - 1 + kSize - 1) / kSize, kThreads, stream, bias_gelu_forward_kernel<T, W, Gelu>, x, bias, y, n, a.cols,
                  int64_t(kThreads * W) % a.cols, rows_are_aligned<T>(a.cols, x, static_cast<const T*>(a.bias)));
  });
}

template <class T, class Gelu>
Error backward(const BiasGeluBackward& a, Stream stream) {
  auto dy = static_cast<const T*>(a.dy), x = static_cast<const T*>(a.x);
  auto dx = static_cast<T*>(a.dx);
  auto partials = static_cast<float*>(a.workspace);
  Parameter bias = {a.bias, a.bias_dtype == DType::f32};
  int64_t n = a.rows * a.cols;
  Grid g = backward_grid(a.rows, a.cols, stream);
  bool full = rows_are_aligned<T>(a.cols, dy, x, dx) && reinterpret_cast<uintptr_t>(partials) % 16 == 0;
  Error error = visit_width<T>(full, [&](auto width) {
    constexpr int W = decltype(width)::value;
    int log_lanes = 0;
    while (W << log_lanes < g.tile) ++log_lanes;
    int64_t step = g.splits * (kThreads >> log_lanes);
    return launch("bias_gelu_backward",
                  {reads("dy", dy, n), reads("x", x, n), reads<T>("bias", bias, a.cols), writes("dx", dx, n),
                   writes("partials", partials, g.partials())},
                  g.blocks(), kThreads, stream, bias_gelu_backward_kernel<T, W, Gelu>, dy, x, bias, dx, partials, a.rows, a.cols,
                  log_lanes, g.tiles, step, step * a.cols);
  });
  return error ? error : column_sums("dbias", partials, g.splits, g.tiles * g.tile, a.cols, a.dbias, a.bias_dtype, stream);
}

}  // namespace

int64_t bias_gelu_forward_workspace(int64_t, int64_t, Stream) { return 0; }
int64_t bias_gelu_backward_workspace(int64_t rows, int64_t cols, Stream stream) {
  return backward_grid(rows, cols, stream).partials();
}

Error bias_gelu_forward(const BiasGeluForward& a, Stream stream) {
  return visit_16_or_32_bits(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return a.tanh ? forward<T, GeluTanh<float>>(a, stream) : forward<T, GeluErf<float>>(a, stream);
  });
}

Error bias_gelu_backward(const BiasGeluBackward& a, Stream stream) {
  return visit_16_or_32_bits(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return a.tanh ? backward<T, GeluTanh<float>>(a, stream) : backward<T, GeluErf<float>>(a, stream);
  });
}

}  // namespace mk::cuda
