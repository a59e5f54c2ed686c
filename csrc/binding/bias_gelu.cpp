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
  Device device(x);
  Workspace workspace(x, device.elements(kernels::bias_gelu_forward_workspace, rows, cols), accumulate_type(type));
  BiasGeluForward call{
      xc.const_data_ptr(), bc.const_data_ptr(), y.mutable_data_ptr(), workspace.data(), rows, cols, tanh, type, bias_type};
  run(kOp, device, kernels::bias_gelu_forward, call);
  return y;
}

std::tuple<Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor bias, bool tanh) {
  DType type = dtype(kOp, "x", x);
  check_same(kOp, "dy", dy, "x", x);
  auto [rows, cols] = rows_of(kOp, "x", x);
  DType bias_type = parameter_dtype(kOp, "bias", bias, x, cols);
  Tensor dyc = dense(dy), xc = dense(x), bc = dense(bias), dx = new_like(x), dbias = new_like(bias);
  Device device(x);
  Workspace workspace(x, device.elements(kernels::bias_gelu_backward_workspace, rows, cols), accumulate_type(type));
  BiasGeluBackward call{dyc.const_data_ptr(),
                        xc.const_data_ptr(),
                        bc.const_data_ptr(),
                        dx.mutable_data_ptr(),
                        dbias.mutable_data_ptr(),
                        workspace.data(),
                        rows,
                        cols,
                        tanh,
                        type,
                        bias_type};
  run(kOp, device, kernels::bias_gelu_backward, call);
  return {dx, dbias};
}

}  // namespace
}  // namespace mk::binding

STABLE_TORCH_LIBRARY_IMPL(MK_NAMESPACE, MK_KEY, m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&mk::binding::forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&mk::binding::backward));
}
