// layer_norm against its formula in long double.
#include "../../csrc/layer_norm.h"

#include "simt_testing.h"
#include "testing.h"

using namespace test;

namespace {

struct Case {
  DType type, parameter;
  int64_t rows, cols;
  bool weight = true, bias = true;
  double centre = 0;
  double eps = 1e-5;
  bool narrow_bias = false;  // the bias has the rows' type, whatever the weight's
  DType bias_type() const { return narrow_bias ? type : parameter; }
};

void check_forward(const Case& c, const Buffer& x, const Buffer& weight, const Buffer& bias, const std::vector<Buffer>& out) {
  Real arithmetic = 8 * eps(acc(c.type));
  for (int64_t row = 0; row < c.rows; ++row) {
    Real mean = 0, size = 0, variance = 0;
    for (int64_t j = 0; j < c.cols; ++j) mean += x[row * c.cols + j] / Real(c.cols), size += fabsl(x[row * c.cols + j]) / c.cols;
    for (int64_t j = 0; j < c.cols; ++j) variance += powl(x[row * c.cols + j] - mean, 2) / c.cols;
    Real rstd = 1 / sqrtl(variance + c.eps);
    near("mean", out[1], row, mean, arithmetic * size);
    near("rstd", out[2], row, rstd, arithmetic * rstd);
    for (int64_t j = 0; j < c.cols; ++j) {
      Real value = x[row * c.cols + j], xhat = (value - mean) * rstd, w = c.weight ? weight[j] : 1, b = c.bias ? bias[j] : 0;
      Real y = xhat * w + b, slack = fabsl(xhat) + rstd * (size + fabsl(value));
      near("y", out[0], row * c.cols + j, y, eps(c.type) * fabsl(y) + arithmetic * (slack * fabsl(w) + fabsl(b)) + tiny(c.type));
    }
  }
}

// xhat's own error is that of the mean, which grows with the size of x against its spread.
void check_backward(const Case& c, const Buffer& dy, const Buffer& x, const Buffer& weight, const std::vector<Buffer>& out) {
  Real arithmetic = 8 * eps(acc(c.type));
  std::vector<Real> dweight(c.cols), dbias(c.cols), dweight_slack(c.cols), dbias_slack(c.cols), xhat(c.cols), error(c.cols);
  for (int64_t row = 0; row < c.rows; ++row) {
    int64_t at = row * c.cols;
    Real mean = 0, size = 0, variance = 0, sum = 0, dot = 0, sum_size = 0, dot_size = 0, dot_error = 0;
    for (int64_t j = 0; j < c.cols; ++j) mean += x[at + j] / Real(c.cols), size += fabsl(x[at + j]) / c.cols;
    for (int64_t j = 0; j < c.cols; ++j) variance += powl(x[at + j] - mean, 2) / c.cols;
    Real rstd = 1 / sqrtl(variance + c.eps);
    for (int64_t j = 0; j < c.cols; ++j) {
      Real d = dy[at + j], g = d * (c.weight ? weight[j] : 1);
      xhat[j] = (x[at + j] - mean) * rstd;
      error[j] = arithmetic * (fabsl(xhat[j]) + rstd * (size + fabsl(x[at + j])));
      sum += g / c.cols, sum_size += fabsl(g) / c.cols;
      dot += g * xhat[j] / c.cols, dot_size += fabsl(g * xhat[j]) / c.cols, dot_error += fabsl(g) * error[j] / c.cols;
      dweight[j] += d * xhat[j], dweight_slack[j] += arithmetic * fabsl(d * xhat[j]) + fabsl(d) * error[j];
      dbias[j] += d, dbias_slack[j] += arithmetic * fabsl(d);
    }
    for (int64_t j = 0; j < c.cols; ++j) {
      Real g = dy[at + j] * (c.weight ? weight[j] : Real(1)), dx = rstd * (g - sum - xhat[j] * dot);
      Real slack =
          arithmetic * (fabsl(g) + sum_size + fabsl(xhat[j]) * dot_size) + error[j] * dot_size + fabsl(xhat[j]) * dot_error;
      near("dx", out[0], at + j, dx, eps(c.type) * fabsl(dx) + rstd * slack + tiny(c.type));
    }
  }
  for (int64_t j = 0; j < c.cols; ++j) {
    auto slack = [&](Real value, Real sum, DType type) { return eps(type) * fabsl(value) + sum + tiny(type); };
    if (c.weight) near("dweight", out[1], j, dweight[j], slack(dweight[j], dweight_slack[j], c.parameter));
    if (c.bias) near("dbias", out[2], j, dbias[j], slack(dbias[j], dbias_slack[j], c.bias_type()));
  }
}

// How many elements past an aligned address inputs, outputs, parameters and workspaces begin.
struct Layout {
  int in, out, parameter, workspace;
};
std::vector<Layout> layouts() {
  std::vector<Layout> all = {{0, 0, 0, 0}, {1, 1, 1, 1}};
  // No packet can be both loaded and stored; none of a parameter can be; none of a workspace.
  if (on_simt) all.insert(all.end(), {{0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1}});
  return all;
}

void check(const Case& c, const std::vector<Layout>& all = layouts()) {
  for (Layout at : all) {
    describe("%s, parameters %s, [%ld, %ld], weight %d, bias %d, eps %g, centre %g, offsets %d, %d, %d, %d", format(c.type).name,
             format(c.parameter).name, long(c.rows), long(c.cols), c.weight, c.bias, c.eps, c.centre, at.in, at.out, at.parameter,
             at.workspace);
    DType a = acc(c.type);
    int64_t n = c.rows * c.cols;
    Buffer x(c.type, n, at.in), dy(c.type, n, at.in), weight(c.parameter, c.cols, at.parameter),
        bias(c.bias_type(), c.cols, at.parameter);
    x.fill(1, c.centre), dy.fill(2), weight.fill(3), bias.fill(4);
    const void *w = c.weight ? weight.data() : nullptr, *b = c.bias ? bias.data() : nullptr;

    std::vector<Buffer> forward = on_every_pool([&](ParallelFor pool) {
      Buffer y(c.type, n, at.out), mean(a, c.rows, at.out), rstd(a, c.rows, at.out);
      Buffer workspace(a, workspace_size(BOTH(layer_norm_forward_workspace), c.rows, c.cols), at.workspace);
      call(BOTH(layer_norm_forward),
           {x.data(), w, b, y.data(), mean.data(), rstd.data(), workspace.data(), c.rows, c.cols, c.eps, c.type, c.parameter,
            c.bias_type()},
           pool);
      return list(std::move(y), std::move(mean), std::move(rstd));
    });
    check_forward(c, x, weight, bias, forward);

    std::vector<Buffer> backward = on_every_pool([&](ParallelFor pool) {
      Buffer dx(c.type, n, at.out), dweight(c.parameter, c.cols, at.out), dbias(c.bias_type(), c.cols, at.out);
      Buffer workspace(a, workspace_size(BOTH(layer_norm_backward_workspace), c.rows, c.cols), at.workspace);
      call(BOTH(layer_norm_backward),
           {dy.data(), x.data(), w, forward[1].data(), forward[2].data(), dx.data(), c.weight ? dweight.data() : nullptr,
            c.bias ? dbias.data() : nullptr, workspace.data(), c.rows, c.cols, c.type, c.parameter, c.bias_type()},
           pool);
      return list(std::move(dx), std::move(dweight), std::move(dbias));
    });
    check_backward(c, dy, x, weight, backward);
  }
}

}  // namespace

TEST(every_width) {
  for (DType type : types())
    for (int64_t cols : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 511, 513, 1025, 5003}) check({type, type, 3, cols});
}

// On a GPU another kernel or plan takes over where packets become too many; W of them are one element each if none can be moved.
TEST(where_plans_meet) {
  if (!on_simt) return;
  for (DType type : types()) {
    int64_t width = 16 / format(type).bytes;
    for (int64_t packets : {1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129})
      check({type, packets % 2 ? type : DType::f32, 3, packets * width}, {{0, 0, 0, 0}});
    for (int64_t packets : {576, 1024, 1025, 2048, 2049, 4096, 4097, 8192, 8193})
      check({type, type, 2, packets * width}, {{0, 0, int(packets % 2), 0}});
    for (int64_t cols : {128, 129, 256, 257}) check({type, type, 3, cols}, {{1, 1, 1, 1}, {0, 1, 0, 0}});
    for (int64_t cols : {4096, 4097, 8192, 8193}) check({type, type, 2, cols}, {{0, 1, 0, 0}});
  }
}

// Teams of a block, of every size, in every number: whole blocks, and last ones that lack teams.
TEST(many_rows_of_every_plan) {
  if (!on_simt) return;
  for (DType type : {DType::f32, DType::bf16}) {
    int64_t width = 16 / format(type).bytes;
    for (int64_t packets : {1, 3, 9}) check({type, type, 1601, packets * width}, {{0, 0, 0, 0}});
    for (int64_t rows : {4, 11, 28, 66}) check({type, type, rows, 125 * width}, {{0, 0, 0, 0}});
    check({type, DType::f32, 50, 288 * width}, {{0, 0, 0, 0}});
    check({type, type, 9, 1200 * width}, {{0, 0, 0, 0}});
    check({type, type, 9, 2400 * width}, {{0, 0, 0, 0}});
    check({type, type, 35, 4200 * width, true, true, 3}, {{0, 0, 1, 0}});
    for (int64_t cols : {3, 40, 1500}) check({type, type, 77, cols}, {{1, 1, 1, 1}});
    check({type, type, 35, 4500}, {{1, 1, 1, 1}});
  }
}

TEST(any_number_of_multiprocessors) {
  if (!on_simt) return;
  for (int multiprocessors : {1, 7, 132}) {
    mk::simt::host::options().multiprocessors = multiprocessors;
    check({DType::f32, DType::f32, 37, 260}, {{0, 0, 0, 0}, {1, 1, 1, 1}});
  }
  mk::simt::host::options() = {};
}

TEST(no_rows) {
  for (DType type : types())
    for (int64_t cols : {5, 1024}) check({type, type, 0, cols});
}

TEST(many_blocks_of_rows) {
  for (DType type : types()) check({type, type, 3001, 70}, {{0, 0, 0, 0}, {1, 1, 1, 1}});
}

TEST(parameters_may_be_absent_or_wider) {
  for (DType type : types())
    for (DType parameter : {type, acc(type)})
      for (int present = 0; present < 4; ++present)
        for (bool narrow_bias : {false, true})
          check({type, parameter, 5, 33, bool(present & 1), bool(present & 2), 0, 1e-5, narrow_bias});
}

TEST(large_offset_does_not_cancel) {
  for (int64_t cols : {1000, 40000}) check({DType::f32, DType::f32, 2, cols, true, true, 1e4});
}

TEST(eps_is_used) {
  for (double eps : {1e-12, 1e-3, 10.}) check({DType::f32, DType::f32, 2, 40, true, true, 0, eps});
}

TEST(constant_row_gives_the_bias) {
  Buffer x(DType::f32, 50, 0), bias(DType::f32, 50, 0), y(DType::f32, 50, 0), mean(DType::f32, 1, 0), rstd(DType::f32, 1, 0);
  Buffer workspace(DType::f32, workspace_size(BOTH(layer_norm_forward_workspace), 1, 50), 0);
  for (int j = 0; j < 50; ++j) x.set(j, 3), bias.set(j, j);
  call(BOTH(layer_norm_forward),
       {x.data(), nullptr, bias.data(), y.data(), mean.data(), rstd.data(), workspace.data(), 1, 50, 1e-5, DType::f32, DType::f32,
        DType::f32},
       serial);
  for (int j = 0; j < 50; ++j) near("y", y, j, j, 0);
}

TEST(large_constant_row) {
  Buffer x(DType::f32, 10, 0), dy(DType::f32, 10, 0), y(DType::f32, 10, 0), dx(DType::f32, 10, 0);
  Buffer mean(DType::f32, 2, 0), rstd(DType::f32, 2, 0);
  Buffer workspace(DType::f32, workspace_size(BOTH(layer_norm_backward_workspace), 2, 5) + 10, 0);
  for (int i = 0; i < 10; ++i) x.set(i, 1e36), dy.set(i, 1);
  constexpr DType kType = DType::f32;
  call(BOTH(layer_norm_forward),
       {x.data(), nullptr, nullptr, y.data(), mean.data(), rstd.data(), workspace.data(), 2, 5, 1e-5, kType, kType, kType}, serial);
  call(BOTH(layer_norm_backward),
       {dy.data(), x.data(), nullptr, mean.data(), rstd.data(), dx.data(), nullptr, nullptr, workspace.data(), 2, 5, kType, kType,
        kType},
       serial);
  for (int i = 0; i < 10; ++i) near("y", y, i, 0, 0), near("dx", dx, i, 0, 0);
}

namespace {

// In all kernels of a call.
struct Moved {
  int64_t read = 0, written = 0, narrow = 0;
};
Moved moved(const std::vector<Traffic>& all, const char* tensor) {
  Moved sum;
  for (const Traffic& t : all)
    if (t.tensor == tensor) sum.read += t.read, sum.written += t.written, sum.narrow += t.narrow;
  return sum;
}

void expect_moved(const std::vector<Traffic>& all, const char* tensor, int64_t read, int64_t written) {
  Moved m = moved(all, tensor);
  if (m.read != read || m.written != written)
    fail("%s: %ld bytes read and %ld written, expected %ld and %ld", tensor, long(m.read), long(m.written), long(read),
         long(written));
}

void check_traffic(DType type, DType parameter, int64_t rows, int64_t cols) {
  describe("%s, parameters %s, [%ld, %ld]", format(type).name, format(parameter).name, long(rows), long(cols));
  begin({});
  int64_t bytes = format(type).bytes, n = rows * cols, row_bytes = cols * bytes, p = cols * format(parameter).bytes;
  bool full = row_bytes % 16 == 0;
  Buffer x(type, n, 0), dy(type, n, 0), out(type, n, 0), weight(parameter, cols, 0), bias(parameter, cols, 0);
  Buffer mean(DType::f32, rows, 0), rstd(DType::f32, rows, 0), dweight(parameter, cols, 0), dbias(parameter, cols, 0);
  Buffer workspace(DType::f32, mk::cuda::layer_norm_backward_workspace(rows, cols, {}), 0);
  x.fill(1), dy.fill(2), weight.fill(3), bias.fill(4);

  expect_ok(mk::cuda::layer_norm_forward({x.data(), weight.data(), bias.data(), out.data(), mean.data(), rstd.data(), nullptr, rows,
                                          cols, 1e-5, type, parameter, parameter},
                                         {}));
  std::vector<Traffic> forward = mk::simt::host::take_traffic();
  expect_moved(forward, "x", (row_bytes > 131072 ? 2 : 1) * n * bytes, 0);
  expect_moved(forward, "y", 0, n * bytes);
  for (const char* tensor : {"weight", "bias"}) expect_moved(forward, tensor, rows * p, 0);
  for (const char* tensor : {"mean", "rstd"}) expect_moved(forward, tensor, 0, rows * 4);

  expect_ok(mk::cuda::layer_norm_backward({dy.data(), x.data(), weight.data(), mean.data(), rstd.data(), out.data(), dweight.data(),
                                           dbias.data(), workspace.data(), rows, cols, type, parameter, parameter},
                                          {}));
  std::vector<Traffic> back = mk::simt::host::take_traffic();
  bool twice = full ? row_bytes > 65536 : cols > 4096, in_memory = !twice && row_bytes > 32768;
  for (const char* tensor : {"x", "dy"}) expect_moved(back, tensor, (twice ? 2 : 1) * n * bytes, 0);
  expect_moved(back, "dx", 0, n * bytes);
  // Of 4 multiprocessors each leaves a partial row. Where sums stay in those, each row updates them once they are 0.
  int64_t parts = twice ? (rows + 7) / 8 : 4, sums = parts * 2 * cols * 4, updates = in_memory ? rows * 2 * cols * 4 : 0;
  expect_moved(back, "partials", sums + updates, sums + updates);
  // Registers hold the weight of a short row; otherwise a row reads it for its sums, and for dx.
  int64_t wanted = full ? (row_bytes + 31) / 32 : (cols + 7) / 8, teams = 512 / ((wanted + 31) / 32 * 32);
  expect_moved(back, "weight", (twice ? rows + parts : row_bytes > 16384 ? 2 * rows : parts * teams) * p, 0);
  for (const char* tensor : {"dweight", "dbias"}) expect_moved(back, tensor, 0, p);
  for (const Moved& m : {moved(forward, "x"), moved(forward, "y"), moved(back, "x"), moved(back, "dy"), moved(back, "dx")})
    CHECK(!full || m.narrow == 0);
  expect_no_findings();
}

}  // namespace

TEST(bytes_moved) {
  if (!on_simt) return;
  for (DType type : types())
    for (DType parameter : {type, DType::f32}) {
      int64_t bytes = format(type).bytes;
      for (int64_t cols : {2048 / bytes, 12288 / bytes}) check_traffic(type, parameter, 64, cols);
      for (int64_t cols : {32768 / bytes, 65536 / bytes, 65536 / bytes + 8, 131072 / bytes, 131072 / bytes + 8})
        check_traffic(type, parameter, 9, cols);
      check_traffic(type, parameter, 64, 1031);
      check_traffic(type, parameter, 9, 4097);
    }
}

// Blocks whose rows lie beyond element 2^31 of tensors that are mostly address space: the last row is 0, 1, 0, 1, ...
TEST(more_than_2_to_the_31_elements) {
  if (!on_simt) return;
  constexpr DType kType = DType::bf16;
  for (int64_t cols : {1024, 1040, 9000, 18000, 131072}) {
    describe("%ld columns", long(cols));
    const int64_t rows = ((int64_t(1) << 31) / cols + 8) / 4 * 4, n = rows * cols, last = n - cols, bytes = format(kType).bytes;
    Options options;
    options.multiprocessors = int(rows);  // a block of the backward has one row
    options.shadow = false;
    begin(options);
    Mapping dy(n * bytes), x(n * bytes), out(n * bytes), mean(rows * 4), rstd(rows * 4);
    Mapping workspace(mk::cuda::layer_norm_backward_workspace(rows, cols, {}) * 4);
    Buffer seen(kType, cols, 0), statistics(DType::f32, 2, 0);
    for (int64_t j = 0; j < cols; ++j) {
      reinterpret_cast<uint16_t*>(x.data)[last + j] = encode(j % 2, format(kType));
      reinterpret_cast<uint16_t*>(dy.data)[last + j] = encode(j % 4 == 1, format(kType));
    }
    mk::simt::host::options().first_block = cols == 1024 ? rows / 4 - 1 : rows - 1;
    expect_ok(mk::cuda::layer_norm_forward(
        {x.data, nullptr, nullptr, out.data, mean.data, rstd.data, nullptr, rows, cols, 1e-5, kType, kType, kType}, {}));
    memcpy(seen.data(), out.data + last * bytes, cols * bytes);
    memcpy(statistics.data(), mean.data + (rows - 1) * 4, 4);
    memcpy(static_cast<char*>(statistics.data()) + 4, rstd.data + (rows - 1) * 4, 4);
    const Real scale = 1 / sqrtl(0.25L + 1e-5L);
    near("mean", statistics, 0, 0.5, 0);
    near("rstd", statistics, 1, scale, 1e-6);
    for (int64_t j = 0; j < cols; ++j) near("y", seen, j, (j % 2 - 0.5L) * scale, 0.01);

    // Beyond 32768 columns a second kernel has a block for each part of the rows and tile of 2048 columns.
    const int64_t parts = (rows + 7) / 8, tile = (rows - 1) / parts;
    mk::simt::host::options().first_block = rows - 1;
    mk::simt::host::options().last_block = rows;
    expect_ok(mk::cuda::layer_norm_backward({dy.data, x.data, nullptr, mean.data, rstd.data, out.data, nullptr, nullptr,
                                             workspace.data, rows, cols, kType, kType, kType},
                                            {}));
    memcpy(seen.data(), out.data + last * bytes, cols * bytes);
    const Real dot = 0.125L * scale;
    for (int64_t j = 0; j < cols; ++j)
      if (cols <= 32768 || j / 2048 == tile)
        near("dx", seen, j, scale * ((j % 4 == 1) - 0.25L - (j % 2 - 0.5L) * scale * dot), 0.01);
    expect_no_findings();
  }
  begin({});
}

TEST(float64_is_refused) {
  if (!on_simt) return;
  double x[2] = {};
  constexpr DType kType = DType::f64;
  const char* forward = mk::cuda::layer_norm_forward({x, nullptr, nullptr, x, x, x, x, 1, 2, 1e-5, kType, kType, kType}, {});
  const char* backward =
      mk::cuda::layer_norm_backward({x, x, nullptr, x, x, x, nullptr, nullptr, x, 1, 2, kType, kType, kType}, {});
  CHECK(forward && strstr(forward, "float64") && backward && strstr(backward, "float64"));
}
