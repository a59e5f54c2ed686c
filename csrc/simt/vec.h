// Packets: W neighbouring elements, moved together. A kernel takes W as a template argument, 16 bytes' worth (kFull<T>) or 1, so
// that its symbol shows which accesses it makes; a packet's address must be a multiple of its size, up to 16 bytes.
//
// A row is walked by a team of threads: packet by packet, then one element a thread for what lies before the first 16-byte boundary
// of the row and after the last. Rows of any length are so read in 16-byte accesses. One body serves both: it is called with
// Width<W> for packets and with Width<1> for single elements, and hands that to load. Bodies compute in float: widen and round
// convert whole packets.
#pragma once

namespace mk::simt {

template <class T>
constexpr int kFull = 16 / int(sizeof(T));

template <class T>
constexpr bool kIsFloating = false;
template <>
constexpr bool kIsFloating<float> = true;
template <>
constexpr bool kIsFloating<half> = true;
template <>
constexpr bool kIsFloating<bfloat16> = true;

template <int W>
struct Width {
  static constexpr int value = W;
};

// As it lies in memory, in words: 16-bit elements take half a register each.
template <class T, int W>
struct Packet {
  static constexpr int kBytes = int(sizeof(T)) * W, kWords = (kBytes + 3) / 4;
  static constexpr int kAccess = kBytes < 16 ? kBytes : 16;
  static MK_FN Width<W> width() { return {}; }
  uint32_t words[kWords];
  // The element itself, for masks and indices.
  MK_FN T get(int i) const {
    if constexpr (sizeof(T) == 8) return T(uint64_t(words[2 * i]) | uint64_t(words[2 * i + 1]) << 32);
    constexpr int kPerWord = sizeof(T) < 4 ? 4 / int(sizeof(T)) : 1;
    return T(words[i / kPerWord] >> (i % kPerWord * 8 * int(sizeof(T))));
  }
};

template <int W>
struct Floats {
  float v[W];
  MK_FN float& operator[](int i) { return v[i]; }
  MK_FN float operator[](int i) const { return v[i]; }
};
template <int W>
MK_FN Floats<W> fill(float value) {
  Floats<W> out;
  MK_UNROLL
  for (int i = 0; i < W; ++i) out[i] = value;
  return out;
}

template <class T, int W>
MK_FN Floats<W> widen(const Packet<T, W>& p) {
  Floats<W> out;
  MK_UNROLL
  for (int i = 0; i < Packet<T, W>::kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = as_float(p.words[i]);
    } else {
      float low, high;
      unpack(Type<T>{}, p.words[i], low, high);
      out[2 * i] = low;
      if (W > 1) out[2 * i + (W > 1)] = high;
    }
  }
  return out;
}
// To nearest, ties to even.
template <class T, int W>
MK_FN Packet<T, W> round(const Floats<W>& v) {
  Packet<T, W> out;
  MK_UNROLL
  for (int i = 0; i < out.kWords; ++i) {
    if constexpr (sizeof(T) == 4)
      out.words[i] = as_bits(v[i]);
    else
      out.words[i] = pack(Type<T>{}, v[2 * i], W > 1 ? v[2 * i + (W > 1)] : 0.f);
  }
  return out;
}

// load and store keep data in the caches; load_once and store_once let it pass through, for data that nobody uses again.
template <bool kOnce, class T, int W>
MK_FN Packet<T, W> load_as(const T* p, Site site) {
  Packet<T, W> out;
  out.words[out.kWords - 1] = 0;
  MK_UNROLL
  for (int i = 0; i < out.kBytes; i += out.kAccess)
    load_bytes<out.kAccess, kOnce>(reinterpret_cast<const char*>(p) + i, out.words + i / 4, site);
  return out;
}
template <bool kOnce, class T, int W>
MK_FN void store_as(T* p, const Packet<T, W>& v, Site site) {
  MK_UNROLL
  for (int i = 0; i < v.kBytes; i += v.kAccess)
    store_bytes<v.kAccess, kOnce>(reinterpret_cast<char*>(p) + i, v.words + i / 4, site);
}
template <class T, int W>
MK_FN Packet<T, W> load(const T* p, Width<W>, Site site = {}) {
  return load_as<false, T, W>(p, site);
}
template <class T, int W>
MK_FN Packet<T, W> load_once(const T* p, Width<W>, Site site = {}) {
  return load_as<true, T, W>(p, site);
}
template <class T, int W>
MK_FN void store(T* p, const Packet<T, W>& v, Site site = {}) {
  store_as<false>(p, v, site);
}
template <class T, int W>
MK_FN void store(T* p, const Floats<W>& v, Site site = {}) {
  store_as<false>(p, round<T>(v), site);
}
template <class T, int W>
MK_FN void store_once(T* p, const Packet<T, W>& v, Site site = {}) {
  store_as<true>(p, v, site);
}
template <class T, int W>
MK_FN void store_once(T* p, const Floats<W>& v, Site site = {}) {
  store_as<true>(p, round<T>(v), site);
}

// One element: a float where it is a floating-point type, else itself.
template <class T>
MK_FN auto load_one(const T* p, Site site = {}) {
  Packet<T, 1> packet = load(p, Width<1>{}, site);
  if constexpr (kIsFloating<T>)
    return widen(packet)[0];
  else
    return packet.get(0);
}
template <class T>
MK_FN void store_one(T* p, float value, Site site = {}) {
  store(p, Floats<1>{{value}}, site);
}

MK_FN int lane() { return thread() & 31; }
MK_FN int warp() { return thread() >> 5; }
MK_FN int warps() { return threads() >> 5; }

// Threads that share a row.
struct Team {
  int rank, size;
};
MK_FN Team whole_block() { return {thread(), threads()}; }
template <int kLanes = 32>
MK_FN Team lanes() {
  return {thread() & (kLanes - 1), kLanes};
}

// A row as single elements, packets, single elements.
template <int W>
struct Span {
  int64_t head, packets, tail;
  MK_FN int64_t singles() const { return head + tail; }
  MK_FN int64_t packet_column(int64_t k) const { return head + k * W; }
  MK_FN int64_t single_column(int64_t k) const { return k < head ? k : k + packets * W; }
};
// Boundaries are the row's own: other rows walked by this span must lie alike (lie_alike) towards multiples of 16 bytes.
template <int W, class T>
MK_FN Span<W> span(const T* row, int64_t cols) {
  if (W == 1) return {0, cols, 0};
  int64_t head = int64_t((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  head = head < cols ? head : cols;
  return {head, (cols - head) / W, (cols - head) % W};
}

// body(column, Width<W>{}) for this thread's packets, then body(column, Width<1>{}) for its single elements.
template <int W, class F>
MK_FN void for_each_packet(Span<W> s, Team team, const F& body) {
  for (int64_t k = team.rank; k < s.packets; k += team.size) body(s.packet_column(k), Width<W>{});
  if constexpr (W > 1)
    for (int64_t k = team.rank; k < s.singles(); k += team.size) body(s.single_column(k), Width<1>{});
}

// As for_each_packet, but body(column, packet), and kBatch packets at a time are loaded before the first is used: as many loads
// are under way. kOnce as in load_once.
template <int kBatch, bool kOnce, int W, class T, class F>
MK_FN void for_each_loaded(const T* row, Span<W> s, Team team, const F& body, Site site = {}) {
  for (int64_t begin = team.rank; begin < s.packets; begin += int64_t(kBatch) * team.size) {
    Packet<T, W> batch[kBatch];
    MK_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      int64_t k = begin + int64_t(i) * team.size;
      if (k < s.packets) batch[i] = load_as<kOnce, T, W>(row + s.packet_column(k), site);
    }
    MK_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      int64_t k = begin + int64_t(i) * team.size;
      if (k < s.packets) body(s.packet_column(k), batch[i]);
    }
  }
  if constexpr (W > 1)
    for (int64_t k = team.rank; k < s.singles(); k += team.size) {
      int64_t j = s.single_column(k);
      Packet<T, 1> single = load_as<kOnce, T, 1>(row + j, site);
      body(j, single);
    }
}

// This thread's part of a row, in registers: a row of at most kPackets * W * team.size elements that is walked by at least 2W - 2
// threads, or that has no single elements.
template <class T, int W, int kPackets>
struct CachedRow {
  Span<W> span;
  Team team;
  Packet<T, W> packets[kPackets];
  Packet<T, 1> single;

  // body(i, column of packets[i]). Addresses that differ by a constant share their registers, and comparing 32-bit numbers takes
  // half the instructions.
  template <class F>
  MK_FN void for_each_index(const F& body) const {
    int left = int(min(span.packets, int64_t(0x7fffffff))) - team.rank;
    int64_t first = span.packet_column(team.rank);
    MK_UNROLL
    for (int i = 0; i < kPackets; ++i)
      if (i * team.size < left) body(i, first + i * team.size * W);
  }
  MK_FN bool has_single() const { return W > 1 && team.rank < int(span.singles()); }

  // body(column, packet): a reference to a Packet<T, W> or Packet<T, 1>.
  template <class F>
  MK_FN void for_each(const F& body) {
    for_each_index([&](int i, int64_t j) { body(j, packets[i]); });
    if constexpr (W > 1)
      if (has_single()) body(span.single_column(team.rank), single);
  }
};
template <int kPackets, int W, class T>
MK_FN CachedRow<T, W, kPackets> load_row(const T* row, Span<W> s, Team team, Site site = {}) {
  CachedRow<T, W, kPackets> out;
  out.span = s;
  out.team = team;
  out.for_each([&](int64_t j, auto& packet) { packet = load_once(row + j, packet.width(), site); });
  return out;
}

// For launchers. Whether rows of `cols` elements begin at multiples of 16 bytes in every tensor given.
template <class T, class... Pointers>
bool rows_are_aligned(int64_t cols, const Pointers*... pointers) {
  return cols % kFull<T> == 0 && (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}
// Whether two tensors of T, whatever their rows' length, lie alike towards multiples of 16 bytes.
template <class T>
bool lie_alike(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}
// Calls f with Width<kFull<T>> or Width<1>.
template <class T, class F>
auto visit_width(bool full, const F& f) {
  return full ? f(Width<kFull<T>>{}) : f(Width<1>{});
}

}  // namespace mk::simt
