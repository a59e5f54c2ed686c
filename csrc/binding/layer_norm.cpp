// Checks, allocates, and fills the contract of layer_norm.
#include "../layer_norm.h"

#include "tensor.h"

namespace mk::binding {
namespace {

constexpr const char* kOp = "layer_norm";

// A weight or bias that may be absent, made contiguous.
struct Parameter {
  std::optional<Tensor> tensor;
  DType type;
  const void* data() const { return tensor ? tensor->const_data_ptr() : nullptr; }
};

Parameter parameter(const char* argument, const std::optional<Tensor>& t, const Tensor& x, int64_t cols) {
  if (!t) return {std::nullopt, DType::f32};
  DType type = parameter_dtype(kOp, argument, *t, x, cols);
  return {dense(*t), type};
}

std::vector<int64_t> row_shape(const Tensor& x) {
  std::vector<int64_t> size = sizes(x);
  size.pop_back();
  return size;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  DType type = dtype(kOp, "x", x);
  auto [rows, cols] = rows_of(kOp, "x", x);
  Parameter w = parameter("weight", weight, x, cols), b = parameter("bias", bias, x, cols);
  Tensor xc = dense(x), y = new_like(x);
  Tensor mean = new_tensor(x, row_shape(x), accumulate_type(type)), rstd = new_tensor(x, row_shape(x), accumulate_type(type));
  Device device(x);
  Workspace workspace(x, device.elements(kernels::layer_norm_forward_workspace, rows, cols), accumulate_type(type));
  LayerNormForward call{xc.const_data_ptr(),
                        w.data(),
                        b.data(),
                        y.mutable_data_ptr(),
                        mean.mutable_data_ptr(),
                        rstd.mutable_data_ptr(),
                        workspace.data(),
                        rows,
                        cols,
                        eps,
                        type,
                        w.type,
                        b.type};
  run(kOp, device, kernels::layer_norm_forward, call);
  return {y, mean, rstd};
}

// dweight and dbias are empty [0] where there is no such parameter.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                            Tensor mean, Tensor rstd) {
  DType type = dtype(kOp, "x", x);
  check_same(kOp, "dy", dy, "x", x);
  auto [rows, cols] = rows_of(kOp, "x", x);
  check_row_values(kOp, "mean", mean, rows, accumulate_type(type), "x", x);
  check_row_values(kOp, "rstd", rstd, rows, accumulate_type(type), "x", x);
  Parameter w = parameter("weight", weight, x, cols), b = parameter("bias", bias, x, cols);
  auto gradient = [&](const Parameter& p) { return p.tensor ? new_like(*p.tensor) : new_tensor(x, {0}, x.scalar_type()); };
  Tensor dyc = dense(dy), xc = dense(x), mc = dense(mean), rc = dense(rstd);
  Tensor dx = new_like(x), dweight = gradient(w), dbias = gradient(b);
  Device device(x);
  Workspace workspace(x, device.elements(kernels::layer_norm_backward_workspace, rows, cols), accumulate_type(type));
  LayerNormBackward call{dyc.const_data_ptr(),
                         xc.const_data_ptr(),
                         w.data(),
                         mc.const_data_ptr(),
                         rc.const_data_ptr(),
                         dx.mutable_data_ptr(),
                         w.tensor ? dweight.mutable_data_ptr() : nullptr,
                         b.tensor ? dbias.mutable_data_ptr() : nullptr,
                         workspace.data(),
                         rows,
                         cols,
                         type,
                         w.type,
                         b.type};
  run(kOp, device, kernels::layer_norm_backward, call);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace mk::binding

STABLE_TORCH_LIBRARY_IMPL(MK_NAMESPACE, MK_KEY, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&mk::binding::forward));
  m.impl("layer_norm_backward", TORCH_BOX(&mk::binding::backward));
}
