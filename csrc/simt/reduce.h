// Reductions that every thread takes part in and gets the result of: no thread may have returned, none may be in a branch that
// others of its warp (its block, for block_reduce) don't take. The order of the operations is fixed, so results repeat bitwise; op
// must be commutative, or the threads would not agree.
#pragma once

namespace mk::simt {

struct Sum {
  MK_FN float operator()(float a, float b) const { return a + b; }
};
// NaN in, NaN out.
struct Max {
  MK_FN float operator()(float a, float b) const { return math::maximum(a, b); }
};

// Over each group of kLanes neighbouring lanes. T is a float or a struct of floats.
template <int kLanes = 32, class T, class Op>
MK_FN T warp_reduce(T value, const Op& op, Site site = {}) {
  static_assert(kLanes >= 1 && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "a power of two, at most a warp");
  MK_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) value = op(value, shuffle_xor(value, step, site));
  return value;
}

// `scratch` has an element per warp. One barrier: whoever writes `scratch` next must be a barrier away, so two reductions in a row
// take two arrays, and a loop of two reductions or more may use them in turn.
template <class T, class Op>
MK_FN T block_reduce(T value, const Op& op, T identity, Shared<T> scratch, Site site = {}) {
  value = warp_reduce(value, op, site);
  if (lane() == 0) scratch.set(warp(), value, site);
  sync_block(site);
  value = identity;
  if (lane() < warps()) value = scratch.get(lane(), site);
  return warp_reduce(value, op, site);
}

}  // namespace mk::simt
