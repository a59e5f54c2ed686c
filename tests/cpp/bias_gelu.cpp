// bias_gelu against its formula in long double.
#include "../../csrc/bias_gelu.h"

#include "testing.h"

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

void check(const Case& c) {
  for (int offset : {0, 1})
    for (bool tanh : {true, false}) {
      describe("%s, bias %s, [%ld, %ld], tanh %d, offset %d", format(c.type).name, format(c.bias_type).name, long(c.rows),
               long(c.cols), tanh, offset);
      DType a = acc(c.type);
      int64_t n = c.rows * c.cols;
      Buffer x(c.type, n, offset), dy(c.type, n, offset), bias(c.bias_type, c.cols, offset);
      x.fill(1), dy.fill(2), bias.fill(3);

      std::vector<Buffer> forward = on_every_pool([&](ParallelFor pool) {
        Buffer y(c.type, n, offset), workspace(a, mk::cpu::bias_gelu_forward_workspace(c.rows, c.cols), offset);
        mk::cpu::bias_gelu_forward({x.data(), bias.data(), y.data(), workspace.data(), c.rows, c.cols, tanh, c.type, c.bias_type},
                                   pool);
        return list(std::move(y));
      });
      std::vector<Buffer> backward = on_every_pool([&](ParallelFor pool) {
        Buffer dx(c.type, n, offset), dbias(c.bias_type, c.cols, offset);
        Buffer workspace(a, mk::cpu::bias_gelu_backward_workspace(c.rows, c.cols), offset);
        mk::cpu::bias_gelu_backward({dy.data(), x.data(), bias.data(), dx.data(), dbias.data(), workspace.data(), c.rows, c.cols,
                                     tanh, c.type, c.bias_type},
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

// y and dy/dx at one value in float.
std::vector<Buffer> at(float value, bool tanh) {
  Buffer x(DType::f32, 1, 0), bias(DType::f32, 1, 0), one(DType::f32, 1, 0), y(DType::f32, 1, 0), dx(DType::f32, 1, 0);
  Buffer dbias(DType::f32, 1, 0), workspace(DType::f32, mk::cpu::bias_gelu_backward_workspace(1, 1), 0);
  x.set(0, value), bias.set(0, 0), one.set(0, 1);
  mk::cpu::bias_gelu_forward({x.data(), bias.data(), y.data(), workspace.data(), 1, 1, tanh, DType::f32, DType::f32}, serial);
  mk::cpu::bias_gelu_backward(
      {one.data(), x.data(), bias.data(), dx.data(), dbias.data(), workspace.data(), 1, 1, tanh, DType::f32, DType::f32}, serial);
  return list(std::move(y), std::move(dx));
}

}  // namespace

TEST(every_width) {
  for (DType type : kTypes)
    for (int64_t cols : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1025}) check({type, type, 3, cols});
}

TEST(no_rows) {
  for (DType type : kTypes) check({type, type, 0, 5});
}

TEST(many_blocks_of_rows) {
  for (DType type : kTypes) check({type, type, 3001, 45});
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
    CHECK(at(INFINITY, tanh)[0][0] == INFINITY);
  }
}
