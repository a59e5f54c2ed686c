// The example kernels on the CPU: right numbers, the same ones in every order of threads, no findings, and the traffic to the byte.
#include "simt_example.h"

#include "simt_testing.h"

using namespace test;

namespace {

template <class T>
struct Dtype;
template <>
struct Dtype<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct Dtype<mk::half> {
  static constexpr DType value = DType::f16;
};
template <>
struct Dtype<mk::bfloat16> {
  static constexpr DType value = DType::bf16;
};

template <class T>
T* as(Buffer& b) {
  return static_cast<T*>(b.data());
}

// Runs `run(y)` once per order of threads; all must give the same bits and no finding. Returns the output and the traffic.
template <class Run>
std::pair<Buffer, std::vector<Traffic>> in_every_order(DType type, int64_t n, int offset, Run run) {
  std::vector<Buffer> all;
  std::vector<Traffic> traffic;
  for (uint64_t seed : kSeeds) {
    Options options;
    options.seed = seed;
    begin(options);
    all.emplace_back(type, n, offset);
    expect_ok(run(all.back()));
    expect_no_findings();
    traffic = mk::simt::host::take_traffic();
    if (!(all.back() == all.front())) fail("seed %ld gives other bits", long(seed));
  }
  return {std::move(all.front()), traffic};
}

// Positive values, so that sums don't cancel.
Buffer input(DType type, int64_t n, int offset, bool positive) {
  Buffer x(type, n, offset);
  x.fill(uint64_t(n));
  for (int64_t i = 0; positive && i < n; ++i) x.set(i, fabs(x[i]) + 0.01);
  return x;
}

template <class T>
void check_normalise(mk::example::Error (*launcher)(const T*, T*, int64_t, int64_t), int64_t rows, int64_t cols, int offset) {
  DType type = Dtype<T>::value;
  describe("%s [%ld, %ld], offset %d", format(type).name, long(rows), long(cols), offset);
  Buffer x = input(type, rows * cols, offset, true);
  auto [y, traffic] =
      in_every_order(type, rows * cols, offset, [&](Buffer& out) { return launcher(as<T>(x), as<T>(out), rows, cols); });
  for (int64_t row = 0; row < rows; ++row) {
    Real sum = 0;
    for (int64_t j = 0; j < cols; ++j) sum += x[row * cols + j];
    for (int64_t j = 0; j < cols; ++j) {
      Real exact = x[row * cols + j] / sum;
      near("y", y, row * cols + j, exact, exact * (eps(type) + 20 * eps(DType::f32)) + tiny(type) * eps(type));
    }
  }
  int64_t bytes = rows * cols * format(type).bytes;
  expect_traffic(traffic, "x", bytes, 0);
  expect_traffic(traffic, "y", 0, bytes);
}

template <class T>
void check_softmax(int64_t rows, int64_t cols, int offset) {
  DType type = Dtype<T>::value;
  describe("%s [%ld, %ld], offset %d", format(type).name, long(rows), long(cols), offset);
  Buffer x = input(type, rows * cols, offset, false);
  auto [y, traffic] = in_every_order(type, rows * cols, offset,
                                     [&](Buffer& out) { return mk::example::softmax_long<T>(as<T>(x), as<T>(out), rows, cols); });
  for (int64_t row = 0; row < rows; ++row) {
    Real top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < cols; ++j) top = std::max<Real>(top, x[row * cols + j]);
    for (int64_t j = 0; j < cols; ++j) sum += expl(x[row * cols + j] - top);
    for (int64_t j = 0; j < cols; ++j) {
      Real exact = expl(x[row * cols + j] - top) / sum;
      near("y", y, row * cols + j, exact, exact * (eps(type) + 400 * eps(DType::f32)) + tiny(type) * eps(type));
    }
  }
  int64_t bytes = rows * cols * format(type).bytes;
  expect_traffic(traffic, "x", 2 * bytes, 0);
  expect_traffic(traffic, "y", 0, bytes);
  // Before the first multiple of 16 and after the last, at most 7 elements each are moved one by one.
  int64_t full = 16 / format(type).bytes;
  CHECK(traffic_of(traffic, "y").narrow <= rows * 2 * (full - 1));
}

template <class T>
void check_gelu(int64_t rows, int64_t cols, bool tanh) {
  DType type = Dtype<T>::value;
  describe("%s [%ld, %ld] %s", format(type).name, long(rows), long(cols), tanh ? "tanh" : "erf");
  Buffer x = input(type, rows * cols, 0, false), bias = input(type, cols, 0, false);
  std::vector<uint8_t> mask(size_t(rows * cols));
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 == 0;
  auto [y, traffic] = in_every_order(type, rows * cols, 0, [&](Buffer& out) {
    return mk::example::masked_gelu<T>(as<T>(x), as<T>(bias), mask.data(), as<T>(out), rows, cols, tanh);
  });
  for (int64_t i = 0; i < rows * cols; ++i) {
    Real v = Real(float(x[i])) + float(bias[i % cols]);
    Real exact = tanh ? v / 2 * (1 + tanhl(0.79788456080286535588L * (v + 0.044715L * v * v * v))) : v / 2 * erfcl(-v / sqrtl(2));
    if (mask[size_t(i)]) exact = 0;
    near("y", y, i, exact,
         fabsl(exact) * (eps(type) + (100 + 4 * v * v) * eps(DType::f32)) + fabsl(v) * 1e-20L + tiny(type) * eps(type));
  }
  int64_t bytes = rows * cols * format(type).bytes;
  expect_traffic(traffic, "x", bytes, 0);
  expect_traffic(traffic, "bias", bytes, 0);
  expect_traffic(traffic, "mask", rows * cols, 0);
  expect_traffic(traffic, "y", 0, bytes);
}

template <class T>
void check_column_sums(int64_t rows, int64_t cols) {
  DType type = Dtype<T>::value;
  describe("%s [%ld, %ld]", format(type).name, long(rows), long(cols));
  Buffer x = input(type, rows * cols, 0, true);
  std::vector<int64_t> index(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) index[size_t(i)] = (i * 7 + 3) % rows;
  int64_t parts = mk::example::column_sum_blocks(rows);
  auto [out, traffic] = in_every_order(type, cols, 0, [&](Buffer& sums) {
    Buffer partials(DType::f32, parts * cols, 0);
    return mk::example::column_sums<T>(as<T>(x), index.data(), as<float>(partials), as<T>(sums), rows, cols);
  });
  for (int64_t j = 0; j < cols; ++j) {
    Real exact = 0;
    for (int64_t row : index) exact += x[row * cols + j];
    near("out", out, j, exact, exact * (eps(type) + rows * eps(DType::f32)));
  }
  expect_traffic(traffic, "x", rows * cols * format(type).bytes, 0);
  expect_traffic(traffic, "partials", 0, parts * cols * 4);
}

template <class T>
void check_all() {
  for (int64_t cols : {1, 7, 16, 31, 32}) check_normalise<T>(mk::example::normalise_short<T>, 37, cols, 0);
  for (int64_t cols : {1, 9, 64, 1000, 1024, 4096})
    for (int offset : {0, 1}) check_normalise<T>(mk::example::normalise<T>, 5, cols, offset);
  for (int64_t cols : {1, 3, 2048, 5001})
    for (int offset : {0, 1}) check_softmax<T>(3, cols, offset);
  for (bool tanh : {false, true})
    for (int64_t cols : {33, 64, 1024}) check_gelu<T>(3, cols, tanh);
  for (int64_t cols : {5, 64, 1024}) check_column_sums<T>(29, cols);
}

}  // namespace

TEST(float32) { check_all<float>(); }
TEST(float16) { check_all<mk::half>(); }
TEST(bfloat16) { check_all<mk::bfloat16>(); }

TEST(no_rows_is_no_launch) {
  begin({});
  expect_ok(mk::example::softmax_long<float>(nullptr, nullptr, 0, 4));
  expect_no_findings();
  CHECK(mk::simt::host::take_traffic().empty());
}
