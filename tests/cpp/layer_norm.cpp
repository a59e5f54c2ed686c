// layer_norm against its formula in long double.
#include "../../csrc/layer_norm.h"

#include "testing.h"

using namespace test;

namespace {

struct Case {
  DType type, parameter;
  int64_t rows, cols;
  bool weight = true, bias = true;
  double centre = 0;
  double eps = 1e-5;
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
    Real rounding = eps(c.parameter);
    if (c.weight) near("dweight", out[1], j, dweight[j], rounding * fabsl(dweight[j]) + dweight_slack[j] + tiny(c.parameter));
    if (c.bias) near("dbias", out[2], j, dbias[j], rounding * fabsl(dbias[j]) + dbias_slack[j] + tiny(c.parameter));
  }
}

void check(const Case& c) {
  for (int offset : {0, 1}) {
    describe("%s, parameters %s, [%ld, %ld], weight %d, bias %d, eps %g, centre %g, offset %d", format(c.type).name,
             format(c.parameter).name, long(c.rows), long(c.cols), c.weight, c.bias, c.eps, c.centre, offset);
    DType a = acc(c.type);
    int64_t n = c.rows * c.cols;
    Buffer x(c.type, n, offset), dy(c.type, n, offset), weight(c.parameter, c.cols, offset), bias(c.parameter, c.cols, offset);
    x.fill(1, c.centre), dy.fill(2), weight.fill(3), bias.fill(4);
    const void *w = c.weight ? weight.data() : nullptr, *b = c.bias ? bias.data() : nullptr;

    std::vector<Buffer> forward = on_every_pool([&](ParallelFor pool) {
      Buffer y(c.type, n, offset), mean(a, c.rows, offset), rstd(a, c.rows, offset);
      Buffer workspace(a, mk::cpu::layer_norm_forward_workspace(c.rows, c.cols), offset);
      mk::cpu::layer_norm_forward({x.data(), w, b, y.data(), mean.data(), rstd.data(), workspace.data(), c.rows, c.cols, c.eps,
                                   c.type, c.parameter, c.parameter},
                                  pool);
      return list(std::move(y), std::move(mean), std::move(rstd));
    });
    check_forward(c, x, weight, bias, forward);

    std::vector<Buffer> backward = on_every_pool([&](ParallelFor pool) {
      Buffer dx(c.type, n, offset), dweight(c.parameter, c.cols, offset), dbias(c.parameter, c.cols, offset);
      Buffer workspace(a, mk::cpu::layer_norm_backward_workspace(c.rows, c.cols), offset);
      mk::cpu::layer_norm_backward(
          {dy.data(), x.data(), w, forward[1].data(), forward[2].data(), dx.data(), c.weight ? dweight.data() : nullptr,
           c.bias ? dbias.data() : nullptr, workspace.data(), c.rows, c.cols, c.type, c.parameter, c.parameter},
          pool);
      return list(std::move(dx), std::move(dweight), std::move(dbias));
    });
    check_backward(c, dy, x, weight, backward);
  }
}

}  // namespace

TEST(every_width) {
  for (DType type : kTypes)
    for (int64_t cols : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 511, 513, 1025, 5003}) check({type, type, 3, cols});
}

TEST(no_rows) {
  for (DType type : kTypes) check({type, type, 0, 5});
}

TEST(many_blocks_of_rows) {
  for (DType type : kTypes) check({type, type, 3001, 70});
}

TEST(parameters_may_be_absent_or_wider) {
  for (DType type : kTypes)
    for (DType parameter : {type, acc(type)})
      for (int present = 0; present < 4; ++present) check({type, parameter, 5, 33, bool(present & 1), bool(present & 2)});
}

TEST(large_offset_does_not_cancel) { check({DType::f32, DType::f32, 2, 1000, true, true, 1e4}); }

TEST(eps_is_used) {
  for (double eps : {1e-12, 1e-3, 10.}) check({DType::f32, DType::f32, 2, 40, true, true, 0, eps});
}

TEST(constant_row_gives_the_bias) {
  Buffer x(DType::f32, 50, 0), bias(DType::f32, 50, 0), y(DType::f32, 50, 0), mean(DType::f32, 1, 0), rstd(DType::f32, 1, 0);
  Buffer workspace(DType::f32, mk::cpu::layer_norm_forward_workspace(1, 50), 0);
  for (int j = 0; j < 50; ++j) x.set(j, 3), bias.set(j, j);
  mk::cpu::layer_norm_forward({x.data(), nullptr, bias.data(), y.data(), mean.data(), rstd.data(), workspace.data(), 1, 50, 1e-5,
                               DType::f32, DType::f32, DType::f32},
                              serial);
  for (int j = 0; j < 50; ++j) near("y", y, j, j, 0);
}
