// bias_gelu against its formula in long double.
#include "../../csrc/bias_gelu.h"

#include "simt_testing.h"

using namespace test;

namespace {

const Real kSqrt2OverPi = sqrtl(2 / M_PIl);

Real gelu(Real v, bool tanh) {
  if (!tanh) return v / 2 * erfcl(-v * M_SQRT1_2l);
  return v / (1 + expl(-2 * kSqrt2OverPi * (v + 0.044715l * v * v * v)));
}

Real gelu_derivative(Real v, bool tanh) {
  if (!tanh) return erfcl(-v * M_SQRT1_2l) / 2 + v * expl(-v * v / 2) * kSqrt2OverPi / 2;
  Real s = 1 / (1 + expl(-2 * kSqrt2OverPi * (v + 0.044715l * v * v * v)));
  return s + (s < 1 ? s * (1 - s) * v * 2 * kSqrt2OverPi * (1 + 3 * 0.044715l * v * v) : 0);
}

struct Case {
  DType type, bias_type;
  int64_t rows, cols;
};

// Where each tensor begins, in elements past an aligned address.
struct Offsets {
  int x, y, bias, dy, dx, workspace;
};

void check_at(const Case& c, const Offsets& o) {
  for (bool tanh : {true, false}) {
    describe("%s, bias %s, [%ld, %ld], tanh %d, offsets %d %d %d %d %d %d", format(c.type).name, format(c.bias_type).name,
             long(c.rows), long(c.cols), tanh, o.x, o.y, o.bias, o.dy, o.dx, o.workspace);
    DType a = acc(c.type);
    int64_t n = c.rows * c.cols;
    Buffer x(c.type, n, o.x), dy(c.type, n, o.dy), bias(c.bias_type, c.cols, o.bias);
    x.fill(1), dy.fill(2), bias.fill(3);

    std::vector<Buffer> forward = on_every_pool([&](ParallelFor pool) {
      Buffer y(c.type, n, o.y), workspace(a, workspace_size(BOTH(bias_gelu_forward_workspace), c.rows, c.cols), o.workspace);
      call(BOTH(bias_gelu_forward), {x.data(), bias.data(), y.data(), workspace.data(), c.rows, c.cols, tanh, c.type, c.bias_type},
           pool);
      return list(std::move(y));
    });
    std::vector<Buffer> backward = on_every_pool([&](ParallelFor pool) {
      Buffer dx(c.type, n, o.dx), dbias(c.bias_type, c.cols, o.bias);
      Buffer workspace(a, workspace_size(BOTH(bias_gelu_backward_workspace), c.rows, c.cols), o.workspace);
      call(BOTH(bias_gelu_backward),
           {dy.data(), x.data(), bias.data(), dx.data(), dbias.data(), workspace.data(), c.rows, c.cols, tanh, c.type, c.bias_type},
           pool);
      return list(std::move(dx), std::move(dbias));
    });

    Real arithmetic = 4 * eps(a);
    std::vector<Real> dbias(c.cols), slack(c.cols);
    for (int64_t i = 0; i < n; ++i) {
      int64_t j = i % c.cols;
      Real size = fabsl(x[i]) + fabsl(bias[j]), y = gelu(Real(x[i]) + bias[j], tanh);
      near("y", forward[0], i, y, eps(c.type) * fabsl(y) + arithmetic * size + tiny(c.type));
      Real dx = dy[i] * gelu_derivative(Real(x[i]) + bias[j], tanh), error = arithmetic * fabsl(dy[i]) * (1 + size);
      near("dx", backward[0], i, dx, eps(c.type) * fabsl(dx) + error + tiny(c.type));
      dbias[j] += dx, slack[j] += error + arithmetic * fabsl(dx);
    }
    for (int64_t j = 0; j < c.cols; ++j)
      near("dbias", backward[1], j, dbias[j], eps(c.bias_type) * fabsl(dbias[j]) + slack[j] + tiny(c.bias_type));
  }
}

void check(const Case& c) {
  check_at(c, {0, 0, 0, 0, 0, 0});
  check_at(c, {1, 1, 1, 1, 1, 1});
}

// y and dy/dx at one value in float.
std::vector<Buffer> at(float value, bool tanh) {
  Buffer x(DType::f32, 1, 0), bias(DType::f32, 1, 0), one(DType::f32, 1, 0), y(DType::f32, 1, 0), dx(DType::f32, 1, 0);
  Buffer dbias(DType::f32, 1, 0), workspace(DType::f32, workspace_size(BOTH(bias_gelu_backward_workspace), 1, 1), 0);
  x.set(0, value), bias.set(0, 0), one.set(0, 1);
  call(BOTH(bias_gelu_forward), {x.data(), bias.data(), y.data(), workspace.data(), 1, 1, tanh, DType::f32, DType::f32}, serial);
  call(BOTH(bias_gelu_backward),
       {one.data(), x.data(), bias.data(), dx.data(), dbias.data(), workspace.data(), 1, 1, tanh, DType::f32, DType::f32}, serial);
  return list(std::move(y), std::move(dx));
}

}  // namespace

TEST(every_width) {
  for (DType type : types())
    for (int64_t cols : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1025}) check({type, type, 3, cols});
}

TEST(no_rows) {
  for (DType type : types()) check({type, type, 0, 5});
}

TEST(many_blocks_of_rows) {
  for (DType type : types()) check({type, type, 3001, 45});
}

TEST(bias_may_be_wider) {
  for (DType type : {DType::f16, DType::bf16}) check({type, DType::f32, 5, 33});
}

// The error is that of the exponential's argument, v^2/2 or about v + 0.04 v^3, not a fixed fraction of |v|.
TEST(left_tail_keeps_its_relative_accuracy) {
  for (bool tanh : {true, false})
    for (float v = -5; v < 0; v += 1.f / 128) {
      describe("v %g, tanh %d", v, tanh);
      std::vector<Buffer> out = at(v, tanh);
      Real y = gelu(v, tanh);
      near("y", out[0], 0, y, 40 * eps(DType::f32) * fabsl(y));
    }
}

TEST(extreme_values) {
  for (bool tanh : {true, false}) {
    for (float v : {1e38f, 3e4f, 100.f, 12.f, 0.f, -12.f, -100.f, -3e4f, -1e38f}) {
      describe("v %g, tanh %d", v, tanh);
      std::vector<Buffer> out = at(v, tanh);
      near("y", out[0], 0, v > 0 ? v : 0, 1e-30);
      near("dx", out[1], 0, v > 0 ? 1 : v < 0 ? 0 : 0.5, 1e-7);
    }
    std::vector<Buffer> out = at(NAN, tanh);
    CHECK(isnan(out[0][0]) && isnan(out[1][0]));
    CHECK(at(INFINITY, tanh)[0][0] == INFINITY && at(INFINITY, tanh)[1][0] == 1);
    CHECK(fabs(at(-INFINITY, tanh)[1][0]) < 1e-30);
  }
}

// Several tiles of columns, parts of the rows and rows per thread, with teams of every size.
TEST(rows_of_whole_packets) {
  for (DType type : types())
    for (auto [rows, cols] : {std::pair(1500, 8), {1200, 16}, {700, 64}, {150, 264}, {70, 1024}, {9, 4096}})
      check({type, type, rows, cols});
  check({DType::f32, DType::f32, 1700, 4});
}

// Several chunks of the run of elements, which end within rows; packets go on in the next row, or rows are shorter than a packet.
TEST(many_chunks) {
  for (DType type : types())
    for (auto [rows, cols] : {std::pair(3, 6001), {2, 10000}, {2500, 7}, {1300, 9}}) check({type, type, rows, cols});
  check({DType::bf16, DType::f32, 3, 6001});
  check({DType::bf16, DType::f32, 300, 64});
}

TEST(tensors_that_begin_anywhere) {
  constexpr Offsets kOffsets[] = {{3, 0, 0, 0, 0, 0}, {3, 3, 0, 0, 0, 0}, {5, 5, 3, 0, 0, 0}, {0, 0, 1, 0, 0, 0},
                                  {0, 0, 0, 1, 0, 0}, {0, 0, 0, 0, 1, 0}, {0, 0, 0, 0, 0, 1}};
  for (const Offsets& offsets : kOffsets)
    for (int64_t cols : {40, 41}) {
      check_at({DType::f32, DType::f32, 300, cols}, offsets);
      check_at({DType::bf16, DType::bf16, 300, cols}, offsets);
      check_at({DType::f16, DType::f32, 300, cols}, offsets);
    }
}

namespace {

int64_t total_read(const std::vector<Traffic>& all, const char* kernel, const char* tensor) {
  int64_t bytes = 0;
  for (const Traffic& t : all)
    if (t.kernel == kernel && t.tensor == tensor) bytes += t.read;
  return bytes;
}

void check_traffic(const Case& c) {
  describe("%s, bias %s, [%ld, %ld]", format(c.type).name, format(c.bias_type).name, long(c.rows), long(c.cols));
  int64_t n = c.rows * c.cols, size = n * format(c.type).bytes, bias_element = format(c.bias_type).bytes;
  Buffer x(c.type, n, 0), dy(c.type, n, 0), bias(c.bias_type, c.cols, 0), y(c.type, n, 0), dbias(c.bias_type, c.cols, 0);
  x.fill(1), dy.fill(2), bias.fill(3);
  int64_t partials = mk::cuda::bias_gelu_backward_workspace(c.rows, c.cols, {});
  Buffer workspace(DType::f32, partials, 0);
  begin({});
  expect_ok(mk::cuda::bias_gelu_forward({x.data(), bias.data(), y.data(), nullptr, c.rows, c.cols, true, c.type, c.bias_type}, {}));
  std::vector<Traffic> forward = mk::simt::host::take_traffic();
  expect_traffic(forward, "x", size, 0);
  expect_traffic(forward, "y", 0, size);
  expect_traffic(forward, "bias", n * bias_element, 0);  // from the cache
  CHECK(c.cols % 8 || (traffic_of(forward, "x").narrow == 0 && traffic_of(forward, "y").narrow == 0));
  CHECK(traffic_of(forward, "x").narrow <= 15 && traffic_of(forward, "y").narrow <= 15);  // the two ends of all rows together

  expect_ok(mk::cuda::bias_gelu_backward(
      {dy.data(), x.data(), bias.data(), y.data(), dbias.data(), workspace.data(), c.rows, c.cols, true, c.type, c.bias_type}, {}));
  std::vector<Traffic> backward = mk::simt::host::take_traffic();
  for (const char* tensor : {"dy", "x"}) expect_traffic(backward, tensor, size, 0);
  expect_traffic(backward, "dx", 0, size);
  expect_traffic(backward, "partials", 0, partials * 4);
  expect_traffic(backward, "dbias", 0, c.cols * bias_element);
  int64_t tiles = (c.cols + 255) / 256, splits = partials / (tiles * 256);
  CHECK(splits == 16 / tiles);  // four blocks for each of the four multiprocessors
  CHECK(total_read(backward, "column_sums", "partials") == splits * c.cols * 4);
  int64_t teams = c.cols % 8 ? 1 : format(c.type).bytes == 4 ? 4 : 8;
  CHECK(traffic_of(backward, "bias").read == splits * teams * c.cols * bias_element);
  for (const char* tensor : {"dy", "x", "dx"}) CHECK(traffic_of(backward, tensor).narrow == (c.cols % 8 ? n : 0));
  expect_no_findings();
}

}  // namespace

TEST(every_element_is_moved_once) {
  if (!on_simt) return;
  for (DType type : types())
    for (int64_t cols : {1024, 1031, 3000}) {
      check_traffic({type, type, 80, cols});
      check_traffic({type, DType::f32, 80, cols});
    }
}

// Blocks that work beyond element 2^31, or 2^32, of tensors that are mostly address space.
TEST(more_elements_than_32_bits_count) {
  if (!on_simt) return;
  constexpr DType kType = DType::bf16;
  Format f = format(kType);
  {
    constexpr int64_t kCols = 1001, kRows = (int64_t(1) << 32) / kCols + 2, kSize = kRows * kCols;
    Options options;
    options.first_block = (kSize - 1) / 8192;
    begin(options);
    Mapping x(kSize * 2), y(kSize * 2);
    Buffer bias(kType, kCols, 0), seen(kType, kCols, 0);
    bias.fill(4);
    expect_ok(mk::cuda::bias_gelu_forward({x.data, bias.data(), y.data, nullptr, kRows, kCols, true, kType, kType}, {}));
    memcpy(seen.data(), y.data + (kRows - 1) * kCols * 2, kCols * 2);
    static_assert(kSize % 8192 > kCols, "the block has all of the last row");
    for (int64_t j = 0; j < kCols; ++j) {
      Real value = gelu(bias[j], true);
      near("y", seen, j, value, eps(kType) * fabsl(value) + 1e-30);
    }
    expect_no_findings();
  }
  constexpr int64_t kCols = 1024, kRows = (int64_t(1) << 21) + 3, kSize = kRows * kCols;
  Options options;
  options.multiprocessors = 2048;
  options.last_block = kCols / 256;  // the first part of the rows, to which the last rows belong
  begin(options);
  int64_t partials = mk::cuda::bias_gelu_backward_workspace(kRows, kCols, {});
  CHECK(partials == 2048 * kCols);
  Mapping dy(kSize * 2), x(kSize * 2), dx(kSize * 2), workspace(partials * 4);
  Buffer bias(kType, kCols, 0), dbias(kType, kCols, 0), seen(kType, kCols, 0), sums(DType::f32, kCols, 0);
  bias.fill(4);
  uint16_t* last = reinterpret_cast<uint16_t*>(dy.data) + (kRows - 1) * kCols;
  for (int64_t j = 0; j < kCols; ++j) last[j] = encode(0.5, f);
  expect_ok(mk::cuda::bias_gelu_backward(
      {dy.data, x.data, bias.data(), dx.data, dbias.data(), workspace.data, kRows, kCols, true, kType, kType}, {}));
  memcpy(seen.data(), dx.data + (kRows - 1) * kCols * 2, kCols * 2);
  memcpy(sums.data(), workspace.data, kCols * 4);
  for (int64_t j = 0; j < kCols; ++j) {
    Real value = gelu_derivative(bias[j], true) / 2;
    near("dx", seen, j, value, eps(kType) * fabsl(value) + 1e-30);
    near("partial sum", sums, j, value, 4 * eps(DType::f32) * (1 + fabsl(bias[j])));
  }
  expect_no_findings();
  begin({});
}

TEST(float64_is_refused) {
  if (!on_simt) return;
  for (mk::Error error : {mk::cuda::bias_gelu_forward({nullptr, nullptr, nullptr, nullptr, 1, 1, true, DType::f64, DType::f64}, {}),
                          mk::cuda::bias_gelu_backward(
                              {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, true, DType::f64, DType::f64}, {})})
    CHECK(error && strstr(error, "float64"));
}
