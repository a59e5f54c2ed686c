// scaled_masked_softmax against its formula in long double.
#include "../../csrc/scaled_masked_softmax.h"

#include "testing.h"

using namespace test;

namespace {

constexpr int64_t kBatch = 2, kHeads = 3;

// A mask over [batch, heads, queries, keys] that has the dimensions named and broadcasts over the others.
struct Mask {
  bool present = false, batch = false, heads = false, queries = false, keys = false;
};
constexpr Mask kMasks[] = {{},
                           {true, true, true, true, true},
                           {true, true, false, true, true},
                           {true, true, false, false, true},
                           {true, false, false, true, true},
                           {true, true, true, true, false},
                           {true, false, false, false, true}};

struct Case {
  DType type;
  int64_t queries, keys;
  Mask mask = {};
  bool causal = false;
  double scale = 0.3;
};

struct Problem {
  Case c;
  std::vector<uint8_t> bytes;
  mk::RowMask mask = {};

  explicit Problem(const Case& which) : c(which) {
    if (!c.mask.present) return;
    mask = {nullptr, 3, {kBatch, kHeads, c.queries}, {}, c.mask.keys};
    int64_t n = c.mask.keys ? c.keys : 1;
    if (c.mask.queries) mask.stride[2] = n, n *= c.queries;
    if (c.mask.heads) mask.stride[1] = n, n *= kHeads;
    if (c.mask.batch) mask.stride[0] = n, n *= kBatch;
    Random random{uint64_t(n)};
    bytes.resize(n);
    for (uint8_t& byte : bytes) byte = random() > 0.2;
    if (c.mask.queries && c.mask.keys) std::fill_n(bytes.begin(), c.keys, 1);  // the first row is dead
    mask.data = bytes.data();
  }

  int64_t rows() const { return kBatch * kHeads * c.queries; }
  bool future(int64_t row, int64_t k) const { return c.causal && k > row % c.queries + c.keys - c.queries; }
  bool masked(int64_t row, int64_t k) const {
    if (future(row, k)) return true;
    int64_t q = row % c.queries, h = row / c.queries % kHeads, b = row / c.queries / kHeads;
    return mask.data && mask.data[b * mask.stride[0] + h * mask.stride[1] + q * mask.stride[2] + k * mask.col_stride];
  }
};

void check_forward(const Problem& p, const Buffer& x, const Buffer& y) {
  const Case& c = p.c;
  Real unit = eps(acc(c.type)), flushed = tiny(c.type) + tiny(DType::f32);
  for (int64_t row = 0; row < p.rows(); ++row) {
    Real top = -INFINITY, sum = 0;
    for (int64_t k = 0; k < c.keys; ++k)
      if (!p.masked(row, k)) top = std::max(top, Real(x[row * c.keys + k]) * c.scale);
    for (int64_t k = 0; k < c.keys; ++k)
      if (!p.masked(row, k)) sum += expl(x[row * c.keys + k] * Real(c.scale) - top);
    for (int64_t k = 0; k < c.keys; ++k) {
      int64_t i = row * c.keys + k;
      if (p.masked(row, k)) {
        near("masked y", y, i, 0, 0);
        continue;
      }
      Real z = x[i] * Real(c.scale), value = expl(z - top) / sum;
      Real carried = 4 * (1 + logl(sum) + top - z + fabsl(z)) + std::min<Real>(c.keys, 512) / 8;
      near("y", y, i, value, value * (eps(c.type) + unit * carried) + flushed);
    }
  }
}

void check_backward(const Problem& p, const Buffer& dy, const Buffer& y, const Buffer& dx) {
  const Case& c = p.c;
  Real unit = eps(acc(c.type)), flushed = tiny(c.type) + tiny(DType::f32);
  for (int64_t row = 0; row < p.rows(); ++row) {
    Real dot = 0, size = 0;
    for (int64_t k = 0; k < c.keys; ++k) {
      if (p.future(row, k)) continue;
      Real term = Real(y[row * c.keys + k]) * dy[row * c.keys + k];
      dot += term, size += fabsl(term);
    }
    for (int64_t k = 0; k < c.keys; ++k) {
      int64_t i = row * c.keys + k;
      if (p.masked(row, k)) {
        near("masked dx", dx, i, 0, 0);
        continue;
      }
      Real value = c.scale * y[i] * (dy[i] - dot),
           terms = fabs(c.scale * y[i]) * (fabs(dy[i]) + (2 + std::min<Real>(c.keys, 512) / 32) * size);
      near("dx", dx, i, value, eps(c.type) * fabsl(value) + 4 * unit * terms + flushed * (1 + fabs(dy[i]) + size));
    }
  }
}

void check(const Case& c) {
  for (int offset : {0, 1}) {
    describe("%s, [%ld, %ld], mask %d%d%d%d, causal %d, scale %g, offset %d", format(c.type).name, long(c.queries), long(c.keys),
             c.mask.batch, c.mask.heads, c.mask.queries, c.mask.keys, c.causal, c.scale, offset);
    Problem p(c);
    int64_t rows = p.rows(), n = rows * c.keys;
    Buffer x(c.type, n, offset), dy(c.type, n, offset);
    x.fill(1), dy.fill(2);
    for (int64_t i = 0; i < n; ++i)  // what is masked has no part, whatever it is
      if (p.masked(i / c.keys, i % c.keys)) x.set(i, i % 3 ? NAN : INFINITY);

    std::vector<Buffer> forward = on_every_pool([&](ParallelFor pool) {
      Buffer y(c.type, n, offset);
      mk::cpu::scaled_masked_softmax_forward({x.data(), p.mask, y.data(), rows, c.keys, c.queries, c.scale, c.causal, c.type},
                                             pool);
      return list(std::move(y));
    });
    check_forward(p, x, forward[0]);

    Buffer& y = forward[0];
    for (int64_t i = 0; i < n; ++i)
      if (p.future(i / c.keys, i % c.keys)) y.set(i, NAN), dy.set(i, NAN);
    std::vector<Buffer> backward = on_every_pool([&](ParallelFor pool) {
      Buffer dx(c.type, n, offset);
      mk::cpu::scaled_masked_softmax_backward({dy.data(), y.data(), dx.data(), rows, c.keys, c.queries, c.scale, c.causal, c.type},
                                              pool);
      return list(std::move(dx));
    });
    check_backward(p, dy, y, backward[0]);
  }
}

Buffer float_row(const std::vector<double>& values, std::vector<uint8_t> masked = {}, double scale = 1) {
  int64_t n = int64_t(values.size());
  Buffer x(DType::f32, n, 0), y(DType::f32, n, 0);
  for (int64_t i = 0; i < n; ++i) x.set(i, values[i]);
  mk::RowMask mask = {masked.empty() ? nullptr : masked.data(), 0, {}, {}, 1};
  mk::cpu::scaled_masked_softmax_forward({x.data(), mask, y.data(), 1, n, 1, scale, false, DType::f32}, serial);
  return y;
}

}  // namespace

TEST(every_width) {
  for (DType type : kTypes)
    for (int64_t keys : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 513, 1025}) {
      check({type, 2, keys});
      check({type, 2, keys, kMasks[1]});
    }
}

TEST(no_rows) {
  for (DType type : kTypes) check({type, 0, 5});
}

TEST(rows_too_long_for_a_buffer) {
  for (DType type : kTypes)
    for (int64_t keys : {8191, 8192, 8193, 20011}) check({type, 1, keys, kMasks[keys % 2]});
}

TEST(causal_with_fewer_and_more_queries_than_keys) {
  for (DType type : kTypes)
    for (int64_t queries : {1, 5, 33, 40, 70})
      for (int64_t keys : {1, 33, 40}) check({type, queries, keys, {}, true});
}

TEST(masks_broadcast) {
  for (DType type : kTypes)
    for (const Mask& mask : kMasks)
      for (bool causal : {false, true}) check({type, 6, 37, mask, causal});
}

TEST(scales) {
  for (DType type : kTypes)
    for (double scale : {1., -0.7, 0., 0.1234567890123}) check({type, 2, 50, {}, false, scale});
}

TEST(largest_finite_values) {
  const double big = 3e38;
  for (double scale : {4., -4.}) {
    describe("scale %g", scale);
    Buffer y = float_row({big, -big, big, 0}, {}, scale);
    for (int i = 0; i < 4; ++i) near("y", y, i, scale > 0 ? (i % 2 ? 0 : 0.5) : i == 1, 1e-6);
    y = float_row({-big, -big, -big}, {}, scale);
    for (int i = 0; i < 3; ++i) near("y", y, i, 1. / 3, 1e-6);
  }
}

TEST(maximum_far_from_the_first_packet) {
  for (int64_t n : {20, 40, 9000})
    for (double low : {-5., -double(INFINITY)}) {
      describe("%ld columns, %g before the last two", long(n), low);
      std::vector<double> values(n, low);
      values[n - 1] = values[n - 2] = 2000;
      Buffer y = float_row(values);
      for (int64_t i = 0; i < n; ++i) near("y", y, i, i < n - 2 ? 0 : 0.5, 1e-6);
    }
}

TEST(first_packet_masked_and_scale_zero) {
  std::vector<uint8_t> masked(40, 1);
  masked[38] = masked[39] = 0;
  Buffer y = float_row(std::vector<double>(40, 3.), masked, 0);
  for (int64_t i = 0; i < 40; ++i) near("y", y, i, i < 38 ? 0 : 0.5, 1e-6);
}

TEST(dead_rows_are_decided_by_the_mask_alone) {
  Buffer y = float_row({-INFINITY, -INFINITY, -INFINITY});
  for (int i = 0; i < 3; ++i) near("y", y, i, NAN, 0);
  y = float_row({-INFINITY, 7, -INFINITY});
  for (int i = 0; i < 3; ++i) near("y", y, i, i == 1, 0);
  y = float_row({-INFINITY, NAN, 5}, {1, 1, 1});
  for (int i = 0; i < 3; ++i) near("y", y, i, 0, 0);
  y = float_row({-INFINITY, NAN, 5}, {0, 1, 1});
  for (int i = 0; i < 3; ++i) near("y", y, i, i == 0 ? NAN : 0, 0);
}

TEST(nan_spreads_over_its_row) {
  for (int64_t n : {1, 5, 40, 9000})
    for (int64_t at : {int64_t(0), n / 2, n - 1}) {
      describe("%ld columns, NaN at %ld", long(n), long(at));
      std::vector<double> values(n, 1.0);
      values[at] = NAN;
      Buffer y = float_row(values);
      for (int64_t i = 0; i < n; ++i) near("y", y, i, NAN, 0);
    }
}

TEST(large_values_do_not_overflow) {
  Buffer y = float_row({3e38, 3e38, -3e38});
  for (int i = 0; i < 3; ++i) near("y", y, i, i < 2 ? 0.5 : 0, 0);
  y = float_row(std::vector<double>(4, -0x1.fffffep127));  // as an additive mask of the smallest float leaves a row
  for (int i = 0; i < 4; ++i) near("y", y, i, 0.25, 0);
}
