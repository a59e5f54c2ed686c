// A row is read once, all its loads under way before the first is used. It waits in registers, as packed as in memory, while each
// thread finds its maximum and, relative to that, its sum of exponentials, which the team then merges. A causal row is a shorter
// row with zeros behind it; a masked element becomes -inf in its register. Bytes moved per element of T: forward 2T (causal 1.5T)
// and the mask, backward 3T (causal 2T). A row that registers cannot hold is read twice.
#include "../scaled_masked_softmax.h"

#include "rows.h"

namespace mk::cuda {
namespace {

// Threads of a block that reads its row twice, and packets of it that each of them has under way.
constexpr int kLongThreads = 768, kLongPackets = 4;
// The most threads of a block that holds its row: with eight packets each, of one tensor or of two.
constexpr int kMostForward = 1024, kMostBackward = 512;

// As visit_plan; but teams for short rows are so small that each thread has four packets, as it takes it as long to find its row as
// to compute one.
template <int W, class F>
Error visit_softmax_plan(int64_t cols, bool aligned, int most, const F& f) {
  int64_t packets = (cols + W - 1) / W;
  if constexpr (W > 1) {
    if (packets <= 32 && aligned) return f(Plan<8, 4>{128});
    if (packets <= 64) return f(Plan<16, 4>{128});
    if (packets > 128 && packets <= 1024) return f(Plan<0, 4>{int((packets + 127) / 128 * 32)});
  }
  if (packets <= 128) return f(Plan<32, 4>{128});
  if (packets <= 8 * most) return f(Plan<0, 8>{int((packets + 255) / 256 * 32)});
  return f(Plan<0, 0>{kLongThreads});
}
// For MK_MAX_THREADS: the most threads of a block, and how many blocks of the forward must fit on a multiprocessor, which bounds
// registers so that enough threads have loads under way.
constexpr int most_threads(int team, int packets, int holding) {
  return team ? 128 : packets == 0 ? kLongThreads : packets == 4 ? 256 : holding;
}
constexpr int forward_threads(int team, int packets) { return most_threads(team, packets, kMostForward); }
constexpr int backward_threads(int team, int packets) { return most_threads(team, packets, kMostBackward); }
constexpr int forward_blocks(int team, int packets) { return team ? 8 : packets == 4 ? 4 : 1; }

template <int kPackets>
constexpr int kHeld = kPackets > 0 ? kPackets : kLongPackets;

struct Shape {
  int64_t rows, cols, queries;  // no queries: not causal
};
// The row of this thread: `cols` elements from `begin` on, of which the first `live` are not right of the diagonal.
struct Row {
  int64_t number, begin, cols, live;
};
template <int kTeam, int kPackets>
MK_FN Row this_row(Shape a) {
  int64_t number = row_number<kTeam>();
  if (number >= a.rows) return {0, 0, 0, 0};
  int64_t live = a.queries ? min(a.cols, quotient(number, a.queries).remainder + a.cols - a.queries + 1) : a.cols;
  live = max<int64_t>(live, 0);
  if (kPackets > 0) return {number, number * a.cols, int(a.cols), int(live)};  // 32-bit numbers take half the registers
  return {number, number * a.cols, a.cols, live};
}

// Calls body(column, span) for each part of a row that registers can hold; its span counts from `column` on. A row that they hold
// whole is one part. `backwards`: the last part first, as the caches still have the end of a row that was just read.
template <int kPackets, int W, class F>
MK_FN void for_each_part(Span<W> s, int threads, bool backwards, const F& body) {
  if constexpr (kPackets > 0) return body(int64_t(0), s);
  int64_t size = int64_t(kLongPackets) * threads, parts = s.packets > size ? (s.packets + size - 1) / size : 1;
  for (int64_t i = 0; i < parts; ++i) {
    int64_t first = (backwards ? parts - 1 - i : i) * size;
    body(first ? s.packet_column(first) : 0, first ? Span<W>{0, s.packets - first, 0} : s);
  }
}
template <int kPackets, bool kOnce, int W, class T>
MK_FN CachedRow<T, W, kHeld<kPackets>> load_part(const T* row, Span<W> s, Team team, Site site = {}) {
  CachedRow<T, W, kHeld<kPackets>> out;
  out.span = s;
  out.team = team;
  if constexpr (kPackets == 0)  // or packets that are not loaded would keep those of the part before in registers
    for (auto& packet : out.packets) packet = {};
  out.for_each([&](int64_t j, auto& packet) {
    constexpr int kWidth = decltype(packet.width())::value;
    packet = load_as<kOnce, T, kWidth>(row + j, site);
  });
  return out;
}

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// body(column, packet, other packet) for two rows that were loaded by one span and team.
template <class A, class B, int W, int kCount, class F>
MK_FN void for_each_pair(CachedRow<A, W, kCount>& a, CachedRow<B, W, kCount>& b, const F& body) {
  a.for_each_index([&](int i, int64_t j) { body(j, a.packets[i], b.packets[i]); });
  if constexpr (W > 1)
    if (a.has_single()) body(a.span.single_column(a.team.rank), a.single, b.single);
}

// Zeros right of the diagonal.
template <int W, class T>
MK_FN void clear_rest(T* y, Row row, Team team) {
  if (row.live == row.cols) return;
  y += row.live;
  Span<W> s = span<W>(y, row.cols - row.live);
  MK_NO_UNROLL
  for (int64_t k = team.rank; k < s.packets; k += team.size) store_once(y + s.packet_column(k), fill<W>(0.f));
  MK_NO_UNROLL
  for (int64_t k = team.rank; k < s.singles(); k += team.size) store_once(y + s.single_column(k), fill<1>(0.f));
}

// The bytes of a row's mask; with col_stride 0 one byte.
MK_FN const uint8_t* mask_row(const RowMask& mask, int64_t row) {
  int64_t offset = 0;
  MK_NO_UNROLL
  for (int d = mask.ndim - 1; d > 0; --d) {
    Quotient q = quotient(row, mask.size[d]);
    offset += q.remainder * mask.stride[d];
    row = q.quotient;
  }
  return mask.ndim > 0 ? mask.data + offset + row * mask.stride[0] : mask.data;
}

template <class T>
constexpr uint32_t kMinusInfinityBits = 0xff800000;
template <>
constexpr uint32_t kMinusInfinityBits<half> = 0xfc00;
template <>
constexpr uint32_t kMinusInfinityBits<bfloat16> = 0xff80;

// -inf where the mask has a byte that is not 0.
template <class T, int W>
MK_FN void mask_packet(Packet<T, W>& p, const Packet<uint8_t, W>& mask) {
  constexpr int kPerWord = 4 / sizeof(T);
  MK_UNROLL
  for (int e = 0; e < W; ++e) {
    uint32_t& word = p.words[e / kPerWord];
    uint32_t others = kPerWord == 1 ? 0 : e % 2 ? 0x0000ffff : 0xffff0000;
    if (mask.get(e)) word = (word & others) | kMinusInfinityBits<T> << e % kPerWord * 16;
  }
}
// Four packets of the mask are loaded at a time, as there are no registers for more. Where they are not aligned, a packet is loaded
// byte by byte.
template <class T, int W, int kCount>
MK_FN void mask_part(CachedRow<T, W, kCount>& part, const uint8_t* mask) {
  constexpr int kGroup = kCount < 4 ? kCount : 4;
  if (reinterpret_cast<uintptr_t>(mask + part.span.head) % W == 0) {
    MK_UNROLL
    for (int group = 0; group < kCount / kGroup; ++group) {
      Packet<uint8_t, W> masks[kGroup];
      part.for_each_index([&](int i, int64_t j) {
        if (i / kGroup == group) masks[i % kGroup] = load(mask + j, Width<W>{});
      });
      part.for_each_index([&](int i, int64_t) {
        if (i / kGroup == group) mask_packet(part.packets[i], masks[i % kGroup]);
      });
    }
  } else {
    part.for_each_index([&](int i, int64_t j) {
      Packet<uint8_t, W> bytes = {};
      MK_UNROLL
      for (int e = 0; e < W; ++e) bytes.words[e / 4] |= uint32_t(load_one(mask + j + e)) << e % 4 * 8;
      mask_packet(part.packets[i], bytes);
    });
  }
  if constexpr (W > 1)
    if (part.has_single()) mask_packet(part.single, load(mask + part.span.single_column(part.team.rank), Width<1>{}));
}

// Maximum, and sum of 2^((v - top) * factor). The difference comes first, as v * factor can overflow. -inf minus itself is NaN, so
// as long as there is no other value, 0 stands for the maximum.
struct Online {
  float top, sum;
};
MK_FN float pivot(float top) { return top == -kInfinity<float> ? 0.f : top; }

template <class T, int W, int kCount>
MK_FN Online extend(Online before, CachedRow<T, W, kCount>& part, float factor) {
  float top = before.top;
  part.for_each([&](int64_t, auto& packet) {
    auto v = widen(packet);
    float most = v[0];
    for (float e : v.v) most = math::maximum(most, e);
    top = math::maximum(top, most);
  });
  float shift = pivot(top), sum = before.sum * math::exp2((before.top - shift) * factor);
  part.for_each([&](int64_t, auto& packet) {
    float more = 0;
    for (float e : widen(packet).v) more += math::exp2((e - shift) * factor);
    sum += more;
  });
  return {top, sum};
}
template <int kLanes>
MK_FN Online merge_lanes(Online own, float factor) {
  float top = warp_reduce<kLanes>(own.top, Max{});
  return {top, warp_reduce<kLanes>(own.sum * math::exp2((own.top - pivot(top)) * factor), Sum{})};
}
template <int kTeam>
MK_FN Online merge(Online own, float factor, Shared<Online> scratch) {
  if constexpr (kTeam > 0) return merge_lanes<kTeam>(own, factor);
  own = merge_lanes<32>(own, factor);
  if (lane() == 0) scratch.set(warp(), own);
  sync_block();
  own = {-kInfinity<float>, 0};
  if (lane() < warps()) own = scratch.get(lane());
  return merge_lanes<32>(own, factor);
}

// `sign` and |scale| are apart because the maximum is that of x * sign.
template <class T, int W, int kTeam, int kPackets>
MK_KERNEL MK_MAX_THREADS(forward_threads(kTeam, kPackets), forward_blocks(kTeam, kPackets)) void  // at most 80 registers
    scaled_masked_softmax_forward_kernel(const T* x, T* y, RowMask mask, Shape shape, float sign, float factor) {
  MK_SHARED(Online, scratch, 32);
  Team team = row_team<kTeam>(), holders = holding_team<kTeam, kHeld<kPackets>>();
  Row row = this_row<kTeam, kPackets>(shape);
  x += row.begin;
  y += row.begin;
  const uint8_t* masked = mask.data ? mask_row(mask, row.number) : nullptr;
  if (mask.data && mask.col_stride == 0) {
    if (load_one(masked)) row.live = 0;
    masked = nullptr;
  }
  clear_rest<W>(y, row, team);

  Span<W> live = span<W>(x, row.live);
  auto load_values = [&](int64_t at, Span<W> s, auto once) {
    auto part = load_part<kPackets, once.value>(x + at, s, holders);
    if (sign != 1.f)
      part.for_each([&](int64_t, auto& packet) {
        auto v = widen(packet);
        for (float& e : v.v) e *= sign;
        packet = round<T>(v);
      });
    if (masked) mask_part(part, masked + at);
    return part;
  };

  CachedRow<T, W, kHeld<kPackets>> held;
  Online all = {-kInfinity<float>, 0};
  for_each_part<kPackets>(live, team.size, false, [&](int64_t at, Span<W> s) {
    auto part = load_values(at, s, Bool<(kPackets > 0)>{});
    all = extend(all, part, factor);
    if constexpr (kPackets > 0) held = part;
  });
  all = merge<kTeam>(all, factor, scratch);

  // NaN or +inf is there, or nothing but -inf: NaN for what is not masked. Without a mask the formula says so too.
  if (masked && !(all.sum > 0)) {
    MK_NO_UNROLL
    for (int64_t j = team.rank; j < row.live; j += team.size) store_one(y + j, load_one(masked + j) ? 0.f : kNaN<float>);
    return;
  }
  float inverse = math::divide(1.f, all.sum);
  for_each_part<kPackets>(live, team.size, true, [&](int64_t at, Span<W> s) {
    auto part = held;
    if constexpr (kPackets == 0) part = load_values(at, s, Bool<true>{});
    part.for_each([&](int64_t j, auto& packet) {
      auto v = widen(packet);
      for (float& e : v.v) e = math::exp2((e - all.top) * factor) * inverse;
      store_once(y + at + j, v);
    });
  });
}

template <class T, int W, int kTeam, int kPackets>
MK_KERNEL MK_MAX_THREADS(backward_threads(kTeam, kPackets)) void  // two rows to hold
    scaled_masked_softmax_backward_kernel(const T* dy, const T* y, T* dx, Shape shape, float scale) {
  MK_SHARED(float, scratch, 32);
  Team team = row_team<kTeam>(), holders = holding_team<kTeam, kHeld<kPackets>>();
  Row row = this_row<kTeam, kPackets>(shape);
  dy += row.begin;
  y += row.begin;
  dx += row.begin;
  clear_rest<W>(dx, row, team);

  Span<W> live = span<W>(y, row.live);
  struct Pair {
    CachedRow<T, W, kHeld<kPackets>> y, dy;
  };
  auto load_pair = [&](int64_t at, Span<W> s, auto once) {
    return Pair{load_part<kPackets, once.value>(y + at, s, holders), load_part<kPackets, once.value>(dy + at, s, holders)};
  };

  Pair held;
  float dot = 0;
  for_each_part<kPackets>(live, team.size, false, [&](int64_t at, Span<W> s) {
    Pair part = load_pair(at, s, Bool<(kPackets > 0)>{});
    for_each_pair(part.y, part.dy, [&](int64_t, auto& packet, auto& gradient) {
      auto p = widen(packet), d = widen(gradient);
      float more = 0;
      for (int e = 0; e < packet.width().value; ++e) more += p[e] * d[e];
      dot += more;
    });
    if constexpr (kPackets > 0) held = part;
  });
  dot = row_reduce<kTeam>(dot, Sum{}, 0.f, scratch);

  for_each_part<kPackets>(live, team.size, true, [&](int64_t at, Span<W> s) {
    Pair part = held;
    if constexpr (kPackets == 0) part = load_pair(at, s, Bool<true>{});
    for_each_pair(part.y, part.dy, [&](int64_t j, auto& packet, auto& gradient) {
      auto p = widen(packet), d = widen(gradient);
      for (int e = 0; e < packet.width().value; ++e) d[e] = scale * p[e] * (d[e] - dot);
      store_once(dx + at + j, d);
    });
  });
}

}  // namespace

Error scaled_masked_softmax_forward(const SoftmaxForward& a, Stream stream) {
  float scale = float(a.scale), sign = scale > 0 ? 1.f : scale < 0 ? -1.f : scale == 0 ? 0.f : scale;
  // x * 0 is 0 or NaN, and any factor leaves it that; but -inf * 0 would not stay what masked elements must be.
  float factor = scale == 0 ? 1.f : scale * sign * kLog2e<float>;
  int64_t n = a.rows * a.cols, mask_bytes = n && a.mask.data ? 1 + (a.cols - 1) * a.mask.col_stride : 0;
  for (int d = 0; mask_bytes && d < a.mask.ndim; ++d) mask_bytes += (a.mask.size[d] - 1) * a.mask.stride[d];
  return visit_16_or_32_bits(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    return visit_width<T>(lie_alike<T>(x, y), [&](auto width) {
      constexpr int W = decltype(width)::value;
      return visit_softmax_plan<W>(a.cols, rows_are_aligned<T>(a.cols, x, y), kMostForward, [&](auto plan) {
        using P = decltype(plan);
        return launch("scaled_masked_softmax_forward",
                      {reads("x", x, n), reads("mask", a.mask.data, mask_bytes), writes("y", y, n)}, plan.blocks(a.rows),
                      plan.threads, stream, scaled_masked_softmax_forward_kernel<T, W, P::team, P::packets>, x, y, a.mask,
                      Shape{a.rows, a.cols, a.causal ? a.queries : 0}, sign, factor);
      });
    });
  });
}

Error scaled_masked_softmax_backward(const SoftmaxBackward& a, Stream stream) {
  int64_t n = a.rows * a.cols;
  return visit_16_or_32_bits(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *dy = static_cast<const T*>(a.dy), *y = static_cast<const T*>(a.y);
    T* dx = static_cast<T*>(a.dx);
    return visit_width<T>(lie_alike(dy, y) && lie_alike<T>(dx, y), [&](auto width) {
      constexpr int W = decltype(width)::value;
      return visit_softmax_plan<W>(a.cols, rows_are_aligned<T>(a.cols, dy, y, dx), kMostBackward, [&](auto plan) {
        using P = decltype(plan);
        return launch("scaled_masked_softmax_backward", {reads("dy", dy, n), reads("y", y, n), writes("dx", dx, n)},
                      plan.blocks(a.rows), plan.threads, stream, scaled_masked_softmax_backward_kernel<T, W, P::team, P::packets>,
                      dy, y, dx, Shape{a.rows, a.cols, a.causal ? a.queries : 0}, float(a.scale));
      });
    });
  });
}

}  // namespace mk::cuda
