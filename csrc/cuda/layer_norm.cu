// Forward: a row stays in registers, so that mean and variance can take a pass each, and x is read once; a row that is too long
// gets both from one pass that merges packet after packet (Chan, Golub and LeVeque 1983), and is read again for y. Moves 2T bytes
// per element, 3T for long rows.
//
// Backward: a persistent grid. A thread has the same columns in every row, so it adds up dweight and dbias in registers while it
// computes dx; a block leaves one partial row of either, and column_sums adds those up. 3T bytes per element, and 16 bytes per
// column and block. Beyond 16384 columns in 16 bits, 8192 in 32, registers hold x and dy but not the sums, which then stay in the
// partial rows: 16 bytes more per element, from the L2 cache. Beyond twice that a first kernel reads x and dy for the two means
// that dx needs, and a second one for the rest: 5T bytes.
#include "../layer_norm.h"

#include <algorithm>

#include "rows.h"

namespace mk::cuda {
namespace {

template <class T>
struct Forward {
  const T* x;
  Parameter weight, bias;
  T* y;
  float *mean, *rstd;
  int64_t rows, cols;
  float eps;
};

constexpr int kMost = 1024;  // threads of a block that keep eight packets of a row

// Of the values seen so far: how many, their mean, and the sum of squares about it. They are counted from the first one, so that
// rounding is in proportion to how far they spread, not to how large they are.
struct Moments {
  float count = 0, origin = 0, mean = 0, squares = 0;

  template <int W>
  MK_FN void add(Floats<W> v) {
    if (count == 0.f) origin = v[0];
    float sum = 0, about = 0;
    for (float& e : v.v) e -= origin, sum += e;
    float other = sum * (1.f / W);
    for (float e : v.v) about += (e - other) * (e - other);
    float ratio = math::divide(float(W), count + W), shift = other - mean;
    squares += about + shift * shift * count * ratio;
    mean += shift * ratio;
    count += W;
  }
};

// How many blocks must fit on a multiprocessor: with one asked for, the compiler doesn't spill eight packets to make room for two;
// of rows that don't stay in registers two are under way. 0: no matter.
constexpr int forward_blocks(int packets) { return packets == 8 ? 1 : packets == 0 ? 2 : 0; }

template <class T, int W, int kTeam, int kPackets>
MK_KERNEL MK_MAX_THREADS(plan_threads(kTeam, kPackets, kMost), forward_blocks(kPackets)) void  // at most 64 registers
    layer_norm_forward_kernel(Forward<T> a) {
  MK_SHARED(float, sums, 32);
  MK_SHARED(float, squares, 32);
  const Team team = row_team<kTeam>();
  const int64_t row = row_number<kTeam>();
  const T* x = a.x + row * a.cols;
  Span<W> s = span<W>(x, a.cols);
  if (row >= a.rows) s = {0, 0, 0};
  float mean, about;
  CachedRow<T, W, kPackets ? kPackets : 1> kept;
  if constexpr (kPackets > 0) {
    kept = load_row<kPackets>(x, s, team);
    float sum = 0;
    kept.for_each([&](int64_t, const auto& packet) {
      float part = 0;
      for (float e : widen(packet).v) part += e;
      sum += part;
    });
    mean = row_reduce<kTeam>(sum, Sum{}, 0.f, sums) / float(a.cols);
    about = 0;
    kept.for_each([&](int64_t, const auto& packet) {
      float part = 0;
      for (float e : widen(packet).v) part += (e - mean) * (e - mean);
      about += part;
    });
  } else {
    Moments seen;
    for_each_loaded<4, false>(x, s, team, [&](int64_t, const auto& packet) { seen.add(widen(packet)); });
    mean = row_reduce<kTeam>(seen.count * (seen.origin + seen.mean), Sum{}, 0.f, sums) / float(a.cols);
    const float shift = seen.origin - mean + seen.mean;
    about = seen.squares + seen.count * shift * shift;
  }
  const float rstd = math::rsqrt(math::divide(row_reduce<kTeam>(about, Sum{}, 0.f, squares), float(a.cols)) + a.eps);
  if (team.rank == 0 && row < a.rows) {
    store_one(a.mean + row, mean);
    store_one(a.rstd + row, rstd);
  }
  auto normalise = [&](int64_t j, const auto& packet) {
    auto v = widen(packet);
    auto w = load_parameter<T>(a.weight, j, packet.width(), 1.f);
    MK_UNROLL
    for (int i = 0; i < packet.width().value; ++i) v[i] = (v[i] - mean) * rstd * w[i];
    auto b = load_parameter<T>(a.bias, j, packet.width(), 0.f);
    MK_UNROLL
    for (int i = 0; i < packet.width().value; ++i) v[i] += b[i];
    store_once(a.y + row * a.cols + j, v);
  };
  if constexpr (kPackets > 0)
    kept.for_each(normalise);
  else
    for_each_loaded<4, true>(x, s, team, normalise);
}

template <class T>
struct Backward {
  const T *dy, *x;
  Parameter weight;
  const float *mean, *rstd;
  T* dx;
  float* partials;  // [parts][2][cols]: dweight, dbias
  float* means;     // [rows][2], for rows that are read twice
  int64_t rows, cols;
};

// A gradient and its product with xhat, added up: over a row those of g = dy weight, over a column those of dy.
struct Pair {
  float sum, dot;
};
struct PairSum {
  MK_FN Pair operator()(Pair a, Pair b) const { return {a.sum + b.sum, a.dot + b.dot}; }
};

// The same columns of x and of dy.
template <class T, int W>
struct Both {
  Packet<T, W> x, dy;

  // Adds to dweight and dbias, and returns these columns' part of the row's sums.
  MK_FN Pair add(const Floats<W>& weight, float mean, float rstd, Floats<W>& dweight, Floats<W>& dbias) const {
    Floats<W> v = widen(x), d = widen(dy);
    Pair sums = {0, 0};
    MK_UNROLL
    for (int i = 0; i < W; ++i) {
      float xhat = (v[i] - mean) * rstd, g = d[i] * weight[i];
      sums.sum += g;
      sums.dot += g * xhat;
      dweight[i] += d[i] * xhat;
      dbias[i] += d[i];
    }
    return sums;
  }
  // dx = rstd (g - mean(g) - xhat mean(g xhat)), xhat = (x - mean) rstd.
  MK_FN Floats<W> gradient(const Floats<W>& weight, float mean, float rstd, Pair means) const {
    Floats<W> v = widen(x), d = widen(dy);
    float slope = rstd * means.dot;
    MK_UNROLL
    for (int i = 0; i < W; ++i) v[i] = rstd * (d[i] * weight[i] - means.sum - (v[i] - mean) * slope);
    return v;
  }
};

constexpr int kThreads = 512;  // of a block, at most

// What a thread keeps in registers: its columns of a row; their dweight and dbias too; the weight and the next row too.
enum class Keep { row, sums, next };

// A thread's columns of one row.
template <class T, int W, int kPackets>
struct Strip {
  Both<T, W> packets[kPackets];
  int count;
  float mean, rstd;
};

// A block is several teams, each of which takes every so manieth row; where rows are long it is one team. Teams of several warps
// meet at one barrier per row, as the halves of `scratch` take turns.
template <class T, int W, int kPackets, Keep kKeep>
MK_KERNEL MK_MAX_THREADS(kThreads) void layer_norm_backward_kernel(Backward<T> a, int threads_per_row) {
  MK_SHARED(Pair, scratch, 2 * kThreads / 32);
  constexpr bool kSums = kKeep != Keep::row, kNext = kKeep == Keep::next;
  const int size = kNext ? threads_per_row : kThreads, team = kNext ? thread() / size : 0, teams = kNext ? threads() / size : 1;
  const int stride = size * W;
  const int first = (thread() - team * size) * W, count = (int(a.cols) - first + stride - 1) / stride;
  auto dweight = [&](int i) { return a.partials + block() * 2 * a.cols + first + i * stride; };
  auto dbias = [&](int i) { return dweight(i) + a.cols; };
  auto for_each = [&](int n, const auto& body) {
    MK_UNROLL
    for (int i = 0; i < kPackets; ++i)
      if (i < n) body(i);
  };
  auto load_strip = [&](int64_t row, auto& strip) {
    strip.count = row < a.rows ? count : 0;
    if (row < a.rows) {
      strip.mean = load_one(a.mean + row);
      strip.rstd = load_one(a.rstd + row);
    }
    const int64_t at = row * a.cols + first;
    for_each(strip.count, [&](int i) {
      strip.packets[i].x = load_once(a.x + at + i * stride, Width<W>{});
      strip.packets[i].dy = load_once(a.dy + at + i * stride, Width<W>{});
    });
  };
  auto load_weight = [&](int i) { return load_parameter<T>(a.weight, first + i * stride, Width<W>{}, 1.f); };
  Floats<W> weights[kPackets], dweights[kPackets], dbiases[kPackets];
  MK_UNROLL
  for (int i = 0; i < kPackets; ++i) {
    weights[i] = kNext && i < count ? load_weight(i) : fill<W>(0.f);
    dweights[i] = dbiases[i] = fill<W>(0.f);
    if (kSums || i >= count) continue;
    store(dweight(i), dweights[i]);
    store(dbias(i), dbiases[i]);
  }
  auto weight = [&](int i) { return kNext ? weights[i] : load_weight(i); };

  const int64_t step = blocks() * teams;
  int64_t row = block() * teams + team;
  int at = 0;
  Strip<T, W, kPackets> strip, next;
  if (kNext) load_strip(row, next);
  // Every team of the block goes round as often as the first, which has the fewest rows before it.
  for (; row - team < a.rows; row += step) {
    if (kNext) {
      strip = next;
      load_strip(row + step, next);
    } else {
      load_strip(row, strip);
    }
    Pair sums = {0, 0};
    for_each(strip.count, [&](int i) {
      if constexpr (kSums) {
        sums = PairSum{}(sums, strip.packets[i].add(weight(i), strip.mean, strip.rstd, dweights[i], dbiases[i]));
      } else {
        Floats<W> dw = widen(load(dweight(i), Width<W>{})), db = widen(load(dbias(i), Width<W>{}));
        sums = PairSum{}(sums, strip.packets[i].add(weight(i), strip.mean, strip.rstd, dw, db));
        store(dweight(i), dw);
        store(dbias(i), db);
      }
    });
    sums = team_reduce<kThreads>(sums, PairSum{}, Pair{0, 0}, size, scratch, at);
    at ^= kThreads / 32;
    const Pair means = {sums.sum / float(a.cols), math::divide(sums.dot, float(a.cols))};
    for_each(strip.count, [&](int i) {
      store_once(a.dx + row * a.cols + first + i * stride, strip.packets[i].gradient(weight(i), strip.mean, strip.rstd, means));
    });
  }

  if constexpr (kNext) {
    MK_SHARED(Pair, given, kThreads / 2 * kPackets * W);
    // The upper half of the teams gives its sums to the lower half, until one team has them all.
    for (int n = teams; n > 1;) {
      const int half = (n + 1) / 2;
      for_each(team >= half && team < n ? kPackets : 0, [&](int i) {
        MK_UNROLL
        for (int e = 0; e < W; ++e)
          given.set((i * W + e) * (kThreads / 2) + thread() - half * size, {dbiases[i][e], dweights[i][e]});
      });
      sync_block();
      for_each(team < n - half ? kPackets : 0, [&](int i) {
        MK_UNROLL
        for (int e = 0; e < W; ++e) {
          const Pair pair = given.get((i * W + e) * (kThreads / 2) + thread());
          dbiases[i][e] += pair.sum;
          dweights[i][e] += pair.dot;
        }
      });
      sync_block();
      n = half;
    }
  }
  if constexpr (kSums)
    for_each(team == 0 ? count : 0, [&](int i) {
      store(dweight(i), dweights[i]);
      store(dbias(i), dbiases[i]);
    });
}

// The means of a row that registers cannot hold; a block per row.
template <class T, int W>
MK_KERNEL MK_MAX_THREADS(kThreads) void layer_norm_backward_means_kernel(Backward<T> a) {
  MK_SHARED(Pair, scratch, kThreads / 32);
  constexpr int kBatch = 4;
  const int64_t row = block(), packets = a.cols / W;
  const float mean = load_one(a.mean + row), rstd = load_one(a.rstd + row);
  Pair sums = {0, 0};
  for (int64_t begin = thread(); begin < packets; begin += kBatch * kThreads) {
    Both<T, W> batch[kBatch];
    MK_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      int64_t k = begin + i * kThreads;
      if (k < packets) batch[i] = {load(a.x + row * a.cols + k * W, Width<W>{}), load(a.dy + row * a.cols + k * W, Width<W>{})};
    }
    MK_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      int64_t k = begin + i * kThreads;
      Floats<W> unused = {};
      if (k < packets)
        sums = PairSum{}(sums, batch[i].add(load_parameter<T>(a.weight, k * W, Width<W>{}, 1.f), mean, rstd, unused, unused));
    }
  }
  sums = block_reduce(sums, PairSum{}, Pair{0, 0}, scratch);
  if (thread() == 0) {
    store_one(a.means + 2 * row, sums.sum / float(a.cols));
    store_one(a.means + 2 * row + 1, sums.dot / float(a.cols));
  }
}

// dx, dweight and dbias from those means. A thread has one packet of columns, and every `parts`-th row.
constexpr int kTile = 256;
template <class T, int W>
MK_KERNEL MK_MAX_THREADS(kTile) void layer_norm_backward_columns_kernel(Backward<T> a, int64_t parts) {
  constexpr int kBatch = 4;
  const int64_t part = block() % parts, j = (block() / parts * kTile + thread()) * W;
  if (j >= a.cols) return;
  const Floats<W> weight = load_parameter<T>(a.weight, j, Width<W>{}, 1.f);
  Floats<W> dweight = fill<W>(0.f), dbias = fill<W>(0.f);
  for (int64_t begin = part; begin < a.rows; begin += kBatch * parts) {
    Both<T, W> batch[kBatch];
    MK_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      int64_t row = begin + i * parts;
      if (row < a.rows) batch[i] = {load_once(a.x + row * a.cols + j, Width<W>{}), load_once(a.dy + row * a.cols + j, Width<W>{})};
    }
    MK_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      int64_t row = begin + i * parts;
      if (row >= a.rows) continue;
      const float mean = load_one(a.mean + row), rstd = load_one(a.rstd + row);
      const Pair means = {load_one(a.means + 2 * row), load_one(a.means + 2 * row + 1)};
      batch[i].add(weight, mean, rstd, dweight, dbias);
      store_once(a.dx + row * a.cols + j, batch[i].gradient(weight, mean, rstd, means));
    }
  }
  store(a.partials + part * 2 * a.cols + j, dweight);
  store(a.partials + part * 2 * a.cols + a.cols + j, dbias);
}

}  // namespace

int64_t layer_norm_forward_workspace(int64_t, int64_t, Stream) { return 0; }

Error layer_norm_forward(const LayerNormForward& c, Stream stream) {
  return visit_16_or_32_bits(c.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Forward<T> a = {static_cast<const T*>(c.x),  {},     {},     static_cast<T*>(c.y), static_cast<float*>(c.mean),
                    static_cast<float*>(c.rstd), c.rows, c.cols, float(c.eps)};
    a.weight = {c.weight, c.weight_dtype == DType::f32};
    a.bias = {c.bias, c.bias_dtype == DType::f32};
    const int64_t n = c.rows * c.cols;
    return visit_width<T>(lie_alike(a.x, a.y), [&](auto width) {
      constexpr int W = decltype(width)::value;
      return visit_plan<W>(c.cols, rows_are_aligned<T>(c.cols, a.x, a.y), kMost, [&](auto plan) {
        return launch("layer_norm_forward",
                      {reads("x", a.x, n), reads<T>("weight", a.weight, c.cols), reads<T>("bias", a.bias, c.cols),
                       writes("y", a.y, n), writes("mean", a.mean, c.rows), writes("rstd", a.rstd, c.rows)},
                      plan.blocks(c.rows), plan.threads, stream, layer_norm_forward_kernel<T, W, plan.team, plan.packets>, a);
      });
    });
  });
}

namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many partial rows the backward leaves at most: one per multiprocessor, but of long rows as many as take 64 MiB at 256
// multiprocessors.
constexpr int64_t kLong = 32768;
int64_t most_parts(int64_t rows, int64_t cols, Stream stream) {
  int64_t most = multiprocessors(stream);
  return std::min(rows, cols > kLong ? ceil_divide(most * kLong, cols) : most);
}

// Threads that share a row: as few as can keep it, but a warp rather than a part of one where packets are single elements.
int team_size(int64_t packets, int per_thread, int W) {
  int64_t wanted = ceil_divide(packets, per_thread);
  if (wanted > 32) return int(ceil_divide(wanted, 32) * 32);
  if (W == 1) wanted = packets;
  int size = 1;
  while (size < wanted && size < 32) size *= 2;
  return size;
}

template <int W, int kPackets, Keep kKeep, class T>
Error by_rows(const Backward<T>& a, int64_t& parts, Stream stream) {
  const int size = team_size(a.cols / W, kPackets, W), per_warp = size < 32 ? 32 / size : 1;
  const int64_t wanted = ceil_divide(ceil_divide(a.rows, parts), per_warp) * per_warp;
  const int teams = int(std::min(wanted, int64_t(kThreads / size)));
  parts = std::min(parts, ceil_divide(a.rows, teams));
  const int64_t n = a.rows * a.cols, sums = parts * 2 * a.cols;
  return launch("layer_norm_backward",
                {reads("dy", a.dy, n), reads("x", a.x, n), reads<T>("weight", a.weight, a.cols), reads("mean", a.mean, a.rows),
                 reads("rstd", a.rstd, a.rows), writes("dx", a.dx, n),
                 kKeep == Keep::row ? updates("partials", a.partials, sums) : writes("partials", a.partials, sums)},
                parts, kKeep == Keep::next ? teams * size : kThreads, stream, layer_norm_backward_kernel<T, W, kPackets, kKeep>, a,
                size);
}

template <int W, class T>
Error by_columns(const Backward<T>& a, int64_t& parts, Stream stream) {
  parts = std::min(parts, ceil_divide(a.rows, 8));
  const int64_t n = a.rows * a.cols, tiles = ceil_divide(a.cols / W, kTile);
  const Tensor dy = reads("dy", a.dy, n), x = reads("x", a.x, n), weight = reads<T>("weight", a.weight, a.cols),
               mean = reads("mean", a.mean, a.rows), rstd = reads("rstd", a.rstd, a.rows);
  Error error = launch("layer_norm_backward_means", {dy, x, weight, mean, rstd, writes("means", a.means, 2 * a.rows)}, a.rows,
                       kThreads, stream, layer_norm_backward_means_kernel<T, W>, a);
  if (error) return error;
  return launch("layer_norm_backward_columns",
                {dy, x, weight, mean, rstd, reads("means", a.means, 2 * a.rows), writes("dx", a.dx, n),
                 writes("partials", a.partials, parts * 2 * a.cols)},
                tiles * parts, kTile, stream, layer_norm_backward_columns_kernel<T, W>, a, parts);
}

template <class T>
Error backward(const LayerNormBackward& c, Stream stream) {
  int64_t parts = most_parts(c.rows, c.cols, stream);
  float* partials = static_cast<float*>(c.workspace);
  Backward<T> a = {static_cast<const T*>(c.dy),
                   static_cast<const T*>(c.x),
                   {c.weight, c.weight_dtype == DType::f32},
                   static_cast<const float*>(c.mean),
                   static_cast<const float*>(c.rstd),
                   static_cast<T*>(c.dx),
                   partials,
                   partials + parts * 2 * c.cols,
                   c.rows,
                   c.cols};
  Error error = nullptr;
  if (c.rows > 0)
    error = visit_width<T>(rows_are_aligned<T>(c.cols, a.dy, a.x, a.dx, partials), [&](auto width) {
      constexpr int W = decltype(width)::value, kFew = W > 1 ? 2 : 8;
      if (c.cols <= W * kFew * kThreads) return by_rows<W, kFew, Keep::next>(a, parts, stream);
      if constexpr (W > 1) {
        if (c.cols <= W * 4 * kThreads) return by_rows<W, 4, Keep::sums>(a, parts, stream);
        if (c.cols <= W * 8 * kThreads) return by_rows<W, 8, Keep::row>(a, parts, stream);
      }
      return by_columns<W>(a, parts, stream);
    });
  return error ? error
               : column_sums(partials, parts, 2 * c.cols, c.cols, {"dweight", c.dweight, c.weight_dtype},
                             {"dbias", c.dbias, c.bias_dtype}, stream);
}

}  // namespace

int64_t layer_norm_backward_workspace(int64_t rows, int64_t cols, Stream stream) {
  return most_parts(rows, cols, stream) * 2 * cols + 2 * rows;
}

Error layer_norm_backward(const LayerNormBackward& c, Stream stream) {
  return visit_16_or_32_bits(c.dtype, [&](auto type) { return backward<typename decltype(type)::type>(c, stream); });
}

}  // namespace mk::cuda
