// The forward reads the logits once (T bytes per element): every thread keeps the maximum of what it has seen and the sum of
// exponentials relative to it, and the pairs are merged at the end. The backward reads and writes once (2T), from the saved
// log-sum-exp, and may write over what it reads: the thread that has the target's logit also takes the 1 off its probability.
#include "../cross_entropy.h"

#include "rows.h"

namespace mk::cuda {
namespace {

constexpr float kLowest = -3.40282347e+38f;  // in place of -infinity as the first maximum: its distance to -infinity is a number
template <int W>
constexpr int kPackets = W == 1 ? 16 : 4;  // that a thread has under way
// Threads of a block: where each warp has a row; at most, of the forward for a row, of the backward for a chunk of a row.
constexpr int kShort = 128, kForward = 512, kBackward = 256;

// What both directions know of the rows. A row's first `classes` columns are classes, the others are padding.
struct Rows {
  const int64_t* target;
  int64_t rows, cols, classes, vocab_start, vocab_size, ignore_index;
  float smoothing, z_loss;
};
template <class Arguments>
Rows rows_of(const Arguments& a) {
  int64_t left = a.vocab_size - a.vocab_start, classes = left < 0 ? 0 : left < a.cols ? left : a.cols;
  return {a.target,       a.rows, a.cols, classes, a.vocab_start, a.vocab_size, a.ignore_index, float(a.label_smoothing),
          float(a.z_loss)};
}
struct Target {
  bool ignored, bad;
  int64_t column;  // -1 where it is not among the row's classes
};
MK_FN Target target_of(const Rows& r, int64_t row) {
  if (row >= r.rows) return {true, false, -1};
  int64_t target = load_one(r.target + row), column = target - r.vocab_start;
  bool ignored = target == r.ignore_index, bad = !ignored && !(target >= 0 && target < r.vocab_size);
  return {ignored, bad, !ignored && !bad && column >= 0 && column < r.classes ? column : -1};
}

// Maximum, sum of exp(x - maximum), sum of x.
struct Online {
  float top, exps, sum;
};
struct Merge {
  MK_FN Online operator()(const Online& a, const Online& b) const {
    bool higher = a.top > b.top;
    float top = higher ? a.top : b.top, exps = higher ? a.exps : b.exps;  // those that are relative to `top`
    float others = higher ? b.exps : a.exps, distance = (higher ? b.top : a.top) - top;
    return {top, exps + others * math::exp2(distance * kLog2e<float>), a.sum + b.sum};
  }
};

template <class T, int W, int kTeam>
MK_KERNEL MK_MAX_THREADS(kTeam ? kShort : kForward) void cross_entropy_forward_kernel(const T* logits, Rows r, float* loss,
                                                                                      float* lse, float* partial) {
  MK_SHARED(Online, scratch, 32);
  Team team = row_team<kTeam>();
  int64_t row = row_number<kTeam>();
  Target target = target_of(r, row);
  logits += row * r.cols;
  float hit = team.rank == 0 && target.column >= 0 ? load_one(logits + target.column) : 0.f;
  Online s = {kLowest, 0, 0};
  auto add = [&](int64_t, auto& packet) {
    auto v = widen(packet);
    float top = s.top, exps = 0;
    for (float e : v.v) top = math::maximum(top, e);
    for (float e : v.v) exps += math::exp2((e - top) * kLog2e<float>);
    s.exps = s.exps * math::exp2((s.top - top) * kLog2e<float>) + exps;
    s.top = top;
    if (r.smoothing != 0)
      for (float e : v.v) s.sum += e;
  };
  for_each_loaded<kPackets<W>, true>(logits, span<W>(logits, target.ignored ? 0 : r.classes), team, add);
  s = row_reduce<kTeam>(s, Merge{}, Online{kLowest, 0, 0}, scratch);
  if (team.rank > 0 || row >= r.rows) return;

  if (s.exps == 0) s.top = -kInfinity<float>;  // nothing else was there
  float share = 1 - r.smoothing, classes = float(r.vocab_size);
  if (partial) {
    partial += row * 3;
    store_one(partial, s.top);
    store_one(partial + 1, s.exps);
    store_one(partial + 2, target.bad ? kNaN<float> : share * hit + r.smoothing / classes * s.sum);
    return;
  }
  float log_exps = math::log(s.exps), all = s.top + log_exps, value = 0;
  if (target.column >= 0) {  // differences from the maximum, so that large logits don't cancel
    value = log_exps - share * (hit - s.top) + r.z_loss * all * all;
    if (r.smoothing != 0) value -= r.smoothing * (s.sum / classes - s.top);
  }
  store_one(loss + row, target.bad ? kNaN<float> : value);
  store_one(lse + row, all);
}

// A team takes one of a row's `chunks`.
template <class T, int W, int kTeam>
MK_KERNEL MK_MAX_THREADS(kTeam ? kShort : kBackward) void cross_entropy_backward_kernel(const T* logits, Rows r, const float* dloss,
                                                                                        const float* lse, T* dlogits,
                                                                                        int64_t chunks) {
  Team team = row_team<kTeam>();
  Quotient at = kTeam ? Quotient{row_number<kTeam>(), 0} : quotient(block(), chunks);
  int64_t row = at.quotient;
  Target target = target_of(r, row);
  logits += row * r.cols;
  dlogits += row * r.cols;
  Range mine = chunk<W>(logits, row < r.rows ? r.cols : 0, at.remainder, team.size * kPackets<W> * W);
  int64_t classes = max(mine.begin, min(mine.end, target.ignored ? 0 : r.classes));  // where zeros begin
  logits += mine.begin;
  dlogits += mine.begin;
  auto cached = load_row<kPackets<W>>(logits, span<W>(logits, classes - mine.begin), team);
  float d = 0, all = 0;
  if (!target.ignored) {
    d = target.bad ? kNaN<float> : load_one(dloss + row);
    all = load_one(lse + row);
  }
  float factor = d * (1 + 2 * r.z_loss * all), uniform = d * r.smoothing / float(r.vocab_size), share = d * (1 - r.smoothing);
  int hit = target.column >= mine.begin && target.column < mine.end ? int(target.column - mine.begin) : -1;  // of this chunk
  cached.for_each([&](int64_t j, auto& packet) {
    auto v = widen(packet);
    for (float& e : v.v) e = factor * math::exp2((e - all) * kLog2e<float>) - uniform;
    constexpr int kWidth = decltype(packet.width())::value;
    if (unsigned(hit - int(j)) < kWidth) {  // in float: in 16 bits p - 1 would cancel where p is close to 1
      MK_UNROLL
      for (int i = 0; i < kWidth; ++i) v[i] -= hit - int(j) == i ? share : 0.f;
    }
    store_once(dlogits + j, v);
  });
  dlogits += classes - mine.begin;
  for_each_packet(span<W>(dlogits, mine.end - classes), team,
                  [&](int64_t j, auto width) { store_once(dlogits + j, fill<decltype(width)::value>(0.f)); });
}

int64_t short_blocks(int64_t rows) { return (rows + kShort / 32 - 1) / (kShort / 32); }

template <class T>
Error forward(const CrossEntropyForward& a, Stream stream) {
  constexpr int W = kFull<T>;
  Rows r = rows_of(a);
  auto logits = static_cast<const T*>(a.logits);
  auto loss = static_cast<float*>(a.loss), lse = static_cast<float*>(a.lse), partial = static_cast<float*>(a.partial);
  auto run = [&](auto team, int64_t blocks, int threads) {
    return launch(
        "cross_entropy_forward",
        {reads("logits", logits, a.rows * a.cols), reads("target", a.target, a.rows), writes("loss", loss, loss ? a.rows : 0),
         writes("lse", lse, lse ? a.rows : 0), writes("partial", partial, partial ? a.rows * 3 : 0)},
        blocks, threads, stream, cross_entropy_forward_kernel<T, W, team.value>, logits, r, loss, lse, partial);
  };
  int64_t warps = (r.classes / W + kPackets<W> * 32 - 1) / (kPackets<W> * 32);
  if (warps <= 1) return run(Width<32>{}, short_blocks(a.rows), kShort);
  return run(Width<0>{}, a.rows, warps * 32 < kForward ? int(warps) * 32 : kForward);
}

template <class T>
Error backward(const CrossEntropyBackward& a, Stream stream) {
  Rows r = rows_of(a);
  auto logits = static_cast<const T*>(a.logits);
  auto dlogits = static_cast<T*>(a.dlogits);
  auto dloss = static_cast<const float*>(a.dloss), lse = static_cast<const float*>(a.lse);
  int64_t n = a.rows * a.cols;
  return visit_width<T>(lie_alike(logits, static_cast<const T*>(dlogits)), [&](auto width) {
    constexpr int W = decltype(width)::value;
    auto run = [&](auto team, int64_t blocks, int threads, int64_t chunks) {
      return launch("cross_entropy_backward",
                    {reads("logits", logits, n), reads("target", a.target, a.rows), reads("dloss", dloss, a.rows),
                     reads("lse", lse, a.rows), writes("dlogits", dlogits, n)},
                    blocks, threads, stream, cross_entropy_backward_kernel<T, W, team.value>, logits, r, dloss, lse, dlogits,
                    chunks);
    };
    // Where rows begin anywhere, W - 1 elements before one share its first 16 bytes.
    int64_t elements = a.cols + (rows_are_aligned<T>(a.cols, logits) ? 0 : W - 1), warp_size = 32 * kPackets<W> * W;
    int64_t warps = (elements + warp_size - 1) / warp_size;
    if (warps <= 1) return run(Width<32>{}, short_blocks(a.rows), kShort, int64_t(1));
    int64_t chunks = (warps * 32 + kBackward - 1) / kBackward;
    return run(Width<0>{}, a.rows * chunks, int((warps + chunks - 1) / chunks) * 32, chunks);
  });
}

}  // namespace

Error cross_entropy_forward(const CrossEntropyForward& a, Stream stream) {
  return visit_16_or_32_bits(a.dtype, [&](auto type) { return forward<typename decltype(type)::type>(a, stream); });
}

Error cross_entropy_backward(const CrossEntropyBackward& a, Stream stream) {
  return visit_16_or_32_bits(a.dtype, [&](auto type) { return backward<typename decltype(type)::type>(a, stream); });
}

}  // namespace mk::cuda
