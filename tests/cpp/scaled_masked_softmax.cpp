// scaled_masked_softmax against its formula in long double.
#include "../../csrc/scaled_masked_softmax.h"

#include "simt_testing.h"

using namespace test;

namespace {

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
  int64_t batch = 2, heads = 3;
};

struct Problem {
  Case c;
  std::vector<uint8_t> bytes;
  mk::RowMask mask = {};

  explicit Problem(const Case& which) : c(which) {
    if (!c.mask.present) return;
    mask = {nullptr, 3, {c.batch, c.heads, c.queries}, {}, c.mask.keys};
    int64_t n = c.mask.keys ? c.keys : 1;
    if (c.mask.queries) mask.stride[2] = n, n *= c.queries;
    if (c.mask.heads) mask.stride[1] = n, n *= c.heads;
    if (c.mask.batch) mask.stride[0] = n, n *= c.batch;
    Random random{uint64_t(n)};
    bytes.resize(n);
    for (uint8_t& byte : bytes) byte = random() > 0.2 ? "\1\2\200"[(&byte - bytes.data()) % 3] : 0;  // all but 0 masks
    if (c.mask.queries && c.mask.keys) std::fill_n(bytes.begin(), c.keys, 1);                        // the first row is dead
    mask.data = bytes.data();
  }

  int64_t rows() const { return c.batch * c.heads * c.queries; }
  bool future(int64_t row, int64_t k) const { return c.causal && k > row % c.queries + c.keys - c.queries; }
  bool masked(int64_t row, int64_t k) const {
    if (future(row, k)) return true;
    int64_t q = row % c.queries, h = row / c.queries % c.heads, b = row / c.queries / c.heads;
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

// How many elements past an aligned address the inputs and the output begin.
struct Layout {
  int in, out;
};
std::vector<Layout> layouts() {
  std::vector<Layout> all = {{0, 0}, {1, 1}};
  if (on_simt) all.push_back({1, 0});  // no packet can be both loaded and stored
  return all;
}

void check(const Case& c, const std::vector<Layout>& all = layouts()) {
  for (Layout at : all) {
    describe("%s, [%ld, %ld, %ld, %ld], mask %d%d%d%d, causal %d, scale %g, offsets %d and %d", format(c.type).name, long(c.batch),
             long(c.heads), long(c.queries), long(c.keys), c.mask.batch, c.mask.heads, c.mask.queries, c.mask.keys, c.causal,
             c.scale, at.in, at.out);
    Problem p(c);
    int64_t rows = p.rows(), n = rows * c.keys;
    Buffer x(c.type, n, at.in), dy(c.type, n, at.in), y(c.type, n, at.in);
    x.fill(1), dy.fill(2);
    for (int64_t i = 0; i < n; ++i)  // what is masked has no part, whatever it is
      if (p.masked(i / c.keys, i % c.keys)) x.set(i, i % 3 ? NAN : INFINITY);

    std::vector<Buffer> forward = on_every_pool([&](ParallelFor pool) {
      Buffer out(c.type, n, at.out);
      call(BOTH(scaled_masked_softmax_forward), {x.data(), p.mask, out.data(), rows, c.keys, c.queries, c.scale, c.causal, c.type},
           pool);
      return list(std::move(out));
    });
    check_forward(p, x, forward[0]);

    for (int64_t i = 0; i < n; ++i) {
      bool future = p.future(i / c.keys, i % c.keys);
      y.set(i, future ? NAN : forward[0][i]);
      if (future) dy.set(i, NAN);
    }
    std::vector<Buffer> backward = on_every_pool([&](ParallelFor pool) {
      Buffer dx(c.type, n, at.out);
      call(BOTH(scaled_masked_softmax_backward),
           {dy.data(), y.data(), dx.data(), rows, c.keys, c.queries, c.scale, c.causal, c.type}, pool);
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
  call(BOTH(scaled_masked_softmax_forward), {x.data(), mask, y.data(), 1, n, 1, scale, false, DType::f32}, serial);
  expect_no_findings();
  return y;
}

}  // namespace

TEST(every_width) {
  for (DType type : types())
    for (int64_t keys : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 513, 1025}) {
      check({type, 2, keys});
      check({type, 2, keys, kMasks[1]});
    }
}

// On a GPU another plan takes over where packets become too many; W of them are one element each if no packet can be moved.
TEST(where_plans_meet) {
  if (!on_simt) return;
  for (DType type : types()) {
    int64_t width = 16 / format(type).bytes;
    for (int64_t packets : {8, 32, 64, 128})
      for (int64_t keys : {packets * width - 1, packets * width, packets * width + 1, (packets + 1) * width}) {
        check({type, 3, keys, kMasks[2]}, {{0, 0}, {1, 1}});
        check({type, 3, keys, {}, true}, {{0, 0}});
      }
    for (int64_t keys : {128, 129}) check({type, 3, keys, kMasks[2], true}, {{1, 0}});
    for (int64_t packets : {1024, 4096, 8192})
      for (int64_t keys : {packets * width, packets * width + 1}) {
        check({type, 1, keys, kMasks[1], false, 0.3, 1, 1}, {{0, 0}});
        check({type, 2, keys, kMasks[keys % 2 * 3], true, -0.3, 1, 1}, {{int(keys % 2), int(keys % 2)}});
      }
    for (int64_t keys : {4096, 4097, 8192, 8193}) check({type, 1, keys, kMasks[1], true, 0.3, 1, 1}, {{1, 0}});
  }
}

// Rows of a causal matrix begin and end anywhere in the parts that threads hold.
TEST(causal_rows_of_every_length) {
  if (!on_simt) return;
  for (DType type : types()) {
    check({type, 400, 390, {}, true, 0.3, 1, 1}, {{0, 0}});
    check({type, 140, 1100, kMasks[2], true, 0.3, 1, 1}, {{1, 1}});
  }
}

TEST(no_rows) {
  for (DType type : types()) check({type, 0, 5});
}

TEST(rows_too_long_for_a_buffer) {
  for (DType type : types())
    for (int64_t keys : {8191, 8192, 8193, 20011}) check({type, 1, keys, kMasks[keys % 2]});
}

TEST(causal_with_fewer_and_more_queries_than_keys) {
  for (DType type : types())
    for (int64_t queries : {1, 5, 33, 40, 70})
      for (int64_t keys : {1, 33, 40}) check({type, queries, keys, {}, true});
}

TEST(masks_broadcast) {
  for (DType type : types())
    for (const Mask& mask : kMasks)
      for (bool causal : {false, true}) check({type, 6, 37, mask, causal});
}

TEST(mask_of_many_dimensions) {
  constexpr int64_t kKeys = 40, kRows = 2 * 3 * 4 * 1 * 5;
  mk::RowMask mask = {nullptr, 5, {2, 3, 4, 1, 5}, {7, 0, 50, 1000, 13}, 1};
  std::vector<uint8_t> bytes(7 + 3 * 50 + 4 * 13 + kKeys);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = i * i % 3;
  mask.data = bytes.data();
  for (DType type : types()) {
    describe("%s", format(type).name);
    std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) {
      Buffer x(type, kRows * kKeys, 0), y(type, kRows * kKeys, 0);
      for (int64_t i = 0; i < kRows * kKeys; ++i) x.set(i, 1);
      call(BOTH(scaled_masked_softmax_forward), {x.data(), mask, y.data(), kRows, kKeys, 1, 1., false, type}, pool);
      return list(std::move(y));
    });
    for (int64_t row = 0; row < kRows; ++row) {
      const uint8_t* at = &bytes[row / 60 * 7 + row / 5 % 4 * 50 + row % 5 * 13];
      Real live = 0;
      for (int64_t k = 0; k < kKeys; ++k) live += !at[k];
      for (int64_t k = 0; k < kKeys; ++k) near("y", out[0], row * kKeys + k, at[k] ? 0 : 1 / live, at[k] ? 0 : eps(type));
    }
  }
}

TEST(scales) {
  for (DType type : types())
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
  for (int64_t n : {20, 40, 9000, 40000})
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

TEST(masked_rows_without_a_softmax) {
  for (int64_t n : {5, 30, 100, 500, 3000, 9000, 40000})
    for (double value : {double(NAN), double(INFINITY), -double(INFINITY)}) {
      describe("%ld columns, %g where not masked", long(n), value);
      std::vector<double> values(n, -double(INFINITY));
      std::vector<uint8_t> masked(n);
      for (int64_t i = 0; i < n; ++i) masked[i] = i % 5 == 1 || i < n / 2;
      values[n - 1] = value;
      Buffer y = float_row(values, masked);
      for (int64_t i = 0; i < n; ++i) near("y", y, i, masked[i] ? 0 : NAN, 0);
      y = float_row(values, std::vector<uint8_t>(n, 1));
      for (int64_t i = 0; i < n; ++i) near("y of a dead row", y, i, 0, 0);
    }
}

TEST(nothing_but_masked_for_a_long_while) {
  for (int64_t n : {30, 3000, 40000})
    for (double scale : {3., -3.}) {
      describe("%ld columns, scale %g", long(n), scale);
      std::vector<uint8_t> masked(n, 1);
      masked[n - 1] = masked[n - 3] = 0;
      Buffer y = float_row(std::vector<double>(n, -1e30), masked, scale);
      for (int64_t i = 0; i < n; ++i) near("y", y, i, masked[i] ? 0 : 0.5, 1e-6);
    }
}

TEST(scale_zero_of_infinities) {
  std::vector<double> values(12, 1e38);
  for (double value : {-double(INFINITY), double(INFINITY)}) {
    values[4] = value;
    Buffer y = float_row(values, {0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0);
    for (int64_t i = 0; i < 12; ++i) near("y", y, i, i == 1 ? 0 : NAN, 0);
    y = float_row(values, {0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}, 0);
    for (int64_t i = 0; i < 12; ++i) near("y", y, i, i == 1 || i == 4 ? 0 : 0.1, 1e-7);
  }
}

TEST(nan_spreads_over_its_row) {
  for (int64_t n : {1, 5, 40, 700, 9000, 40000})
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

namespace {

struct BothTraffics {
  std::vector<Traffic> forward, backward;
};
BothTraffics traffic(const Case& c) {
  Problem p(c);
  int64_t rows = p.rows(), n = rows * c.keys;
  Buffer x(c.type, n, 0), y(c.type, n, 0), dx(c.type, n, 0);
  for (int64_t i = 0; i < n; ++i) x.set(i, 0);
  std::vector<uint8_t> nothing(p.bytes.size());  // rows of which all is masked are another matter
  if (p.mask.data) p.mask.data = nothing.data();
  begin({});
  expect_ok(mk::cuda::scaled_masked_softmax_forward(
      {x.data(), p.mask, y.data(), rows, c.keys, c.queries, c.scale, c.causal, c.type}, {}));
  std::vector<Traffic> forward = mk::simt::host::take_traffic();
  expect_ok(mk::cuda::scaled_masked_softmax_backward(
      {x.data(), y.data(), dx.data(), rows, c.keys, c.queries, c.scale, c.causal, c.type}, {}));
  expect_no_findings();
  return {forward, mk::simt::host::take_traffic()};
}

}  // namespace

TEST(bytes_moved) {
  if (!on_simt) return;
  for (DType type : types()) {
    int64_t bytes = format(type).bytes;
    for (const Case& c :
         {Case{type, 3, 1024}, Case{type, 3, 1024, kMasks[2]}, Case{type, 2, 4096, kMasks[3]}, Case{type, 1, 20480, kMasks[1]},
          Case{type, 1, 131072 / bytes, kMasks[1], false, 1, 1, 1}, Case{type, 1, 131072 / bytes + 8, kMasks[1], false, 1, 1, 2},
          Case{type, 512, 1024, {}, true, 1, 1, 1}, Case{type, 1024, 1024, {}, true, 1, 1, 1}}) {
      int64_t rows = c.batch * c.heads * c.queries, n = rows * c.keys, live = 0;
      describe("%s, [%ld, %ld], mask %d, causal %d", format(type).name, long(rows), long(c.keys), c.mask.present, c.causal);
      for (int64_t q = 0; q < c.queries; ++q) live += c.batch * c.heads * (c.causal ? q + 1 + c.keys - c.queries : c.keys);
      int64_t times = c.keys * bytes > 131072 ? 2 : 1, times_back = c.keys * bytes > 65536 ? 2 : 1;
      auto [forward, back] = traffic(c);
      expect_traffic(forward, "x", times * live * bytes, 0);
      expect_traffic(forward, "y", 0, n * bytes);
      if (c.mask.present) expect_traffic(forward, "mask", times * n, 0);
      expect_traffic(back, "y", times_back * live * bytes, 0);
      expect_traffic(back, "dy", times_back * live * bytes, 0);
      expect_traffic(back, "dx", 0, n * bytes);
      if (!c.causal)
        for (const Traffic& t :
             {traffic_of(forward, "x"), traffic_of(forward, "y"), traffic_of(back, "dy"), traffic_of(back, "dx")})
          CHECK(t.narrow == 0);
    }
  }
}

// The last block's rows lie beyond element 2^31 of every tensor, and of the mask.
TEST(more_than_2_to_the_31_elements) {
  if (!on_simt) return;
  constexpr int64_t kRows = (int64_t(1) << 21) + 4;
  for (int64_t keys : {1024, 1040}) {
    describe("%ld columns", long(keys));
    int64_t n = kRows * keys;
    Mapping x(n * 2), y(n * 2), dx(n * 2), bytes(n);
    auto element = [&](Mapping& m, int64_t row, int64_t j) { return reinterpret_cast<uint16_t*>(m.data) + row * keys + j; };
    mk::RowMask mask = {reinterpret_cast<const uint8_t*>(bytes.data), 1, {kRows}, {keys}, 1};
    for (int64_t row = kRows - 4; row < kRows; ++row) {
      bytes.data[row * keys] = 1;
      for (int64_t j = 1; j < keys; j += 2) *element(x, row, j) = encode(1, kFormats[2]);
    }
    Options options;
    options.first_block = keys <= 1024 ? kRows / 4 - 1 : kRows - 1;
    begin(options);
    expect_ok(mk::cuda::scaled_masked_softmax_forward({x.data, mask, y.data, kRows, keys, 1, 1., false, DType::bf16}, {}));
    expect_ok(mk::cuda::scaled_masked_softmax_backward({x.data, y.data, dx.data, kRows, keys, 1, 1., false, DType::bf16}, {}));
    expect_no_findings();
    Real sum = expl(1) * keys / 2 + keys / 2 - 1, dot = expl(1) * keys / 2 / sum;
    for (int64_t j = 0; j < keys; ++j) {
      Real p = j ? expl(j % 2) / sum : 0, d = p * (j % 2 - dot);
      CHECK(fabsl(decode(*element(y, kRows - 1, j), kFormats[2]) - p) <= p / 256);
      CHECK(fabsl(decode(*element(dx, kRows - 1, j), kFormats[2]) - d) <= fabsl(d) / 50);
    }
    begin({});
  }
}

TEST(float64_is_refused) {
  if (!on_simt) return;
  double x[2] = {};
  const char* forward = mk::cuda::scaled_masked_softmax_forward({x, {}, x, 1, 2, 1, 1., false, DType::f64}, {});
  const char* backward = mk::cuda::scaled_masked_softmax_backward({x, x, x, 1, 2, 1, 1., false, DType::f64}, {});
  CHECK(forward && strstr(forward, "float64") && backward && strstr(backward, "float64"));
}
