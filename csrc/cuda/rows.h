// What the kernels share: who walks a row, division, parameters, and column sums of partial results.
//
// A row is walked by some lanes of a warp, by a warp or by a block, and stays in registers unless it is too long. A kernel is
// written once, for a Plan<kTeam, kPackets>, which says who and how much.
#pragma once
#include "../simt/simt.h"

namespace mk::cuda {
namespace {

using namespace simt;

// kTeam: lanes that share a row; 0: the whole block. kPackets: how many each thread keeps in registers; 0: none, the row is read
// once more.
template <int kTeam, int kPackets>
struct Plan {
  static constexpr int team = kTeam, packets = kPackets;
  int threads;  // of a block
  int64_t blocks(int64_t rows) const {
    if constexpr (kTeam == 0) return rows;
    int64_t per_block = threads / max(kTeam, 1);
    return (rows + per_block - 1) / per_block;
  }
};

// For MK_MAX_THREADS: a block of a Plan, where a thread that keeps eight packets of each row may be one of `most`.
constexpr int plan_threads(int team, int packets, int most) { return team ? 128 : packets == 4 ? 256 : packets == 8 ? most : 512; }

// Calls f(Plan) with the plan for rows of `cols` elements in packets of W. `most`: the largest block of threads that keep eight
// packets of each row. Aligned rows have no single elements, which a small team could not hold.
template <int W, class F>
Error visit_plan(int64_t cols, bool aligned, int most, const F& f) {
  int64_t packets = (cols + W - 1) / W;
  if constexpr (W > 1) {
    if (packets <= 8 && aligned) return f(Plan<8, 1>{plan_threads(8, 1, most)});
    if (packets <= 32) return f(Plan<32, 1>{plan_threads(32, 1, most)});
    if (packets > 128 && packets <= 1024) return f(Plan<0, 4>{int((packets + 127) / 128 * 32)});
  }
  if (packets <= 128) return f(Plan<32, 4>{plan_threads(32, 4, most)});
  if (packets <= 8 * most) return f(Plan<0, 8>{int((packets + 255) / 256 * 32)});
  return f(Plan<0, 0>{plan_threads(0, 0, most)});
}

template <int kTeam>
MK_FN Team row_team() {
  if constexpr (kTeam == 0)
    return whole_block();
  else
    return lanes<kTeam>();
}
// The same for a part of a row that threads hold kPackets packets of: neighbouring ones in a warp, so that what one thread holds
// lies 512 bytes apart, a constant, which costs no registers for addresses.
template <int kTeam, int kPackets>
MK_FN Team holding_team() {
  if constexpr (kTeam == 0)
    return {warp() * 32 * kPackets + lane(), 32};
  else
    return lanes<kTeam>();
}
// The row of this thread; it may be beyond the last one, and then takes part with an empty span.
template <int kTeam>
MK_FN int64_t row_number() {
  if constexpr (kTeam == 0)
    return block();
  else
    return block() * int(unsigned(threads()) / kTeam) + int(unsigned(thread()) / kTeam);
}
// As warp_reduce or block_reduce: over the team. `scratch` has 32 elements, and is not touched by teams within a warp.
template <int kTeam, class T, class Op>
MK_FN T row_reduce(T value, const Op& op, T identity, Shared<T> scratch, Site site = {}) {
  if constexpr (kTeam == 0)
    return block_reduce(value, op, identity, scratch, site);
  else
    return warp_reduce<kTeam>(value, op, site);
}

// Over teams of `size` neighbouring threads: a power of two up to 32, or whole warps. `scratch` has one element per warp from `at`.
template <int kThreads, class T, class Op>
MK_FN T team_reduce(T value, const Op& op, T identity, int size, Shared<T> scratch, int at) {
  MK_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    T other = shuffle_xor(value, step);
    if (step < size) value = op(value, other);
  }
  if (size <= 32) return value;
  if (lane() == 0) scratch.set(at + warp(), value);
  sync_block();
  int first = thread() / size * (size / 32), i = lane() % (kThreads / 32);
  return warp_reduce<kThreads / 32>(i < size / 32 ? scratch.get(at + first + i) : identity, op);
}

// A row as chunks of `size` elements, a multiple of W. They meet at multiples of 16 bytes, wherever the row begins, so that only
// its two ends are single elements.
struct Range {
  int64_t begin, end;
};
// Elements between the last multiple of 16 bytes and the row's begin.
template <int W, class T>
MK_FN int64_t past_boundary(const T* row) {
  return W == 1 ? 0 : int64_t(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}
template <int W, class T>
MK_FN Range chunk(const T* row, int64_t cols, int64_t number, int64_t size) {
  int64_t begin = number * size - past_boundary<W>(row);
  return {min(max(begin, int64_t(0)), cols), min(begin + size, cols)};
}

// a / b and a % b for a >= 0 and b > 0. A division of 64-bit numbers takes some hundred instructions; the compiler puts one of
// 32-bit numbers, twenty, beside it for where that will do.
struct Quotient {
  int64_t quotient, remainder;
};
MK_FN Quotient quotient(int64_t a, int64_t b) {
  uint64_t q = uint64_t(a) / uint64_t(b);
  return {int64_t(q), a - int64_t(q) * b};
}

// A weight or bias: [cols] elements of the rows' type or float, or none.
struct Parameter {
  const void* data;
  bool is_float;
};
// Columns j to j + W; `absent` where there is no parameter. Whole packets where they are aligned.
template <class T, int W>
MK_FN Floats<W> load_parameter(Parameter p, int64_t j, Width<W> width, float absent, Site site = {}) {
  if (!p.data) return fill<W>(absent);
  Floats<W> out;
  if (p.is_float) {
    const float* from = static_cast<const float*>(p.data) + j;
    if (W > 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) return widen(load(from, width, site));
    MK_UNROLL
    for (int i = 0; i < W; ++i) out[i] = load_one(from + i, site);
  } else {
    const T* from = static_cast<const T*>(p.data) + j;
    if (W > 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) return widen(load(from, width, site));
    MK_UNROLL
    for (int i = 0; i < W; ++i) out[i] = load_one(from + i, site);
  }
  return out;
}
// For launchers, in the list of tensors.
using simt::reads;
template <class T>
Tensor reads(const char* name, Parameter p, int64_t cols) {
  return p.is_float ? simt::reads(name, static_cast<const float*>(p.data), p.data ? cols : 0)
                    : simt::reads(name, static_cast<const T*>(p.data), p.data ? cols : 0);
}

// A sum of partial rows: [cols] of dtype, or not wanted where data is null. `name` is the tensor's in reports.
struct Total {
  const char* name;
  void* data;
  DType dtype;
};

// Element j of `first` is the sum over `parts` of partials[part * stride + j]; `second` is that of the cols columns behind. A block
// has 32 neighbouring columns, and its warps, at most kSumWarps, share the parts; the order of additions is fixed. T is the totals'
// type unless that is float.
constexpr int kSumWarps = 16;
template <class T>
MK_KERNEL MK_MAX_THREADS(32 * kSumWarps) void column_sums_kernel(const float* partials, Total first, Total second, int64_t parts,
                                                                 int64_t stride, int64_t cols) {
  MK_SHARED(float, sums, 32 * kSumWarps);
  const int64_t tiles = (cols + 31) / 32;
  const bool behind = block() >= tiles;
  const Total out = behind ? second : first;
  const int64_t j = (block() - (behind ? tiles : 0)) * 32 + lane();
  if (behind) partials += cols;
  float sum = 0;
  if (j < cols)
    for (int64_t part = warp(); part < parts; part += warps()) sum += load_one(partials + part * stride + j);
  sums.set(thread(), sum);
  sync_block();
  if (warp() > 0 || j >= cols) return;
  for (int i = 1; i < warps(); ++i) sum += sums.get(32 * i + lane());
  if (out.dtype == DType::f32)
    store_one(static_cast<float*>(out.data) + j, sum);
  else
    store_one(static_cast<T*>(out.data) + j, sum);
}
template <class A>
Error column_sums(const A* partials, int64_t parts, int64_t stride, int64_t cols, Total first, Total second, Stream stream) {
  if (!first.data) {
    partials += cols;
    first = second;
    second = {};
  }
  if (!first.data) return nullptr;
  const int wanted = second.data ? 2 : 1, threads = 32 * (parts > kSumWarps ? kSumWarps : parts > 0 ? int(parts) : 1);
  const DType narrow = first.dtype == DType::f32 && second.data ? second.dtype : first.dtype;
  auto writes_total = [&](Total t) {
    int64_t n = t.data ? cols : 0;
    return t.dtype == DType::f32 ? writes(t.name, static_cast<float*>(t.data), n) : writes(t.name, static_cast<half*>(t.data), n);
  };
  auto run = [&](auto type) {
    return launch("column_sums",
                  {simt::reads("partials", partials, parts ? (parts - 1) * stride + wanted * cols : 0), writes_total(first),
                   writes_total(second)},
                  (cols + 31) / 32 * wanted, threads, stream, column_sums_kernel<typename decltype(type)::type>, partials, first,
                  second, parts, stride, cols);
  };
  return narrow == DType::f32 ? run(Type<float>{}) : narrow == DType::f16 ? run(Type<half>{}) : run(Type<bfloat16>{});
}
template <class A>
Error column_sums(const char* name, const A* partials, int64_t parts, int64_t stride, int64_t cols, void* out, DType dtype,
                  Stream stream) {
  return column_sums(partials, parts, stride, cols, {name, out, dtype}, {}, stream);
}

// Calls f(Type<T>{}) with the storage type of dtype.
template <class F>
Error visit_16_or_32_bits(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(Type<float>{});
    case DType::f16: return f(Type<half>{});
    case DType::bf16: return f(Type<bfloat16>{});
    case DType::f64: break;
  }
  return "float64 is not computed on GPUs";
}

}  // namespace
}  // namespace mk::cuda
