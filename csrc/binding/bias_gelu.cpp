// Checks, allocates, and fills the contract of bias_gelu.
#include "../bias_gelu.h"

#include "tensor.h"

namespace mk::binding {
namespace {

constexpr const char* kOp = "bias_gelu";

Tensor forward(Tensor x, Tensor bias, bool tanh) {
  DType type = dtype(kOp, "x", x);
  auto [rows, cols] = rows_of(kOp, "x", x);
  DType bias_type = parameter_dtype(kOp, "bias", bias, x, cols);
  Tensor xc = dense(x), bc = dense(bias), y = new_like(x);
  Tensor workspace = new_tensor(x, {cpu::bias_gelu_forward_workspace(rows, cols)}, accumulate_type(type));
  cpu::bias_gelu_forward({xc.const_data_ptr(), bc.const_data_ptr(), y.mutable_data_ptr(), workspace.mutable_data_ptr(), rows, cols,
                          tanh, type, bias_type},
                         parallel_for);
  return y;
}

std::tuple<Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor bias, bool tanh) {
  DType type = dtype(kOp, "x", x);
  check_same(kOp, "dy", dy, "x", x);
  auto [rows, cols] = rows_of(kOp, "x", x);
  DType bias_type = parameter_dtype(kOp, "bias", bias, x, cols);
  Tensor dyc = dense(dy), xc = dense(x), bc = dense(bias), dx = new_like(x), dbias = new_like(bias);
  Tensor workspace = new_tensor(x, {cpu::bias_gelu_backward_workspace(rows, cols)}, accumulate_type(type));
  cpu::bias_gelu_backward({dyc.const_data_ptr(), xc.const_data_ptr(), bc.const_data_ptr(), dx.mutable_data_ptr(),
                           dbias.mutable_data_ptr(), workspace.mutable_data_ptr(), rows, cols, tanh, type, bias_type},
                          parallel_for);
  return {dx, dbias};
}

}  // namespace
}  // namespace mk::binding

STABLE_TORCH_LIBRARY_IMPL(megatron_kernels, CPU, m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&mk::binding::forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&mk::binding::backward));
}
