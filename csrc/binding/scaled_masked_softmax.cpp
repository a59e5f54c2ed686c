// Checks, allocates, and fills the contract of scaled_masked_softmax.
#include "../scaled_masked_softmax.h"

#include "tensor.h"

namespace mk::binding {
namespace {

constexpr const char* kOp = "scaled_masked_softmax";

// The strides with which `mask` broadcasts over x, neighbouring dimensions merged where one stride serves both.
RowMask row_mask(const Tensor& x, const Tensor& mask) {
  check(mask.scalar_type() == ScalarType::Bool, kOp, "mask must be bool (True = masked out), got ", name(mask.scalar_type()));
  check_device(kOp, "mask", mask, "x", x);
  int64_t dims = x.dim(), offset = dims - mask.dim();
  auto fits = [&](int64_t d) { return mask.size(d) == 1 || mask.size(d) == x.size(d + offset); };
  bool ok = offset >= 0;
  for (int64_t d = 0; ok && d < mask.dim(); ++d) ok = fits(d);
  check(ok, kOp, "mask must broadcast to x's shape ", shape(x), ", got ", shape(mask));

  auto stride = [&](int64_t d) { return d < offset || mask.size(d - offset) == 1 ? 0 : mask.stride(d - offset); };
  RowMask out{static_cast<const uint8_t*>(mask.const_data_ptr()), 0, {}, {}, stride(dims - 1)};
  for (int64_t d = 0; d < dims - 1; ++d) {
    if (x.size(d) == 1) continue;
    int last = out.ndim - 1;
    if (out.ndim && out.stride[last] == stride(d) * x.size(d)) {
      out.size[last] *= x.size(d);
      out.stride[last] = stride(d);
      continue;
    }
    check(out.ndim < RowMask::kMaxDims, kOp, "mask needs more than ", RowMask::kMaxDims, " separate dimensions, got shape ",
          shape(mask), " for x of shape ", shape(x));
    out.size[out.ndim] = x.size(d);
    out.stride[out.ndim++] = stride(d);
  }
  return out;
}

// A mask whose rows have their bytes side by side, or one byte for all columns; an expanded mask stays as it is.
Tensor columns_together(const Tensor& mask) {
  int64_t last = mask.dim() - 1;
  return last < 0 || mask.size(last) == 1 || mask.stride(last) <= 1 ? mask : dense(mask);
}

int64_t queries(const Tensor& x, bool causal) {
  check(!causal || x.dim() >= 2, kOp, "causal=True needs x of at least two dimensions [..., sq, sk], got shape ", shape(x));
  return causal ? x.size(x.dim() - 2) : 1;
}

Tensor forward(Tensor x, std::optional<Tensor> mask, double scale, bool causal) {
  DType type = dtype(kOp, "x", x);
  auto [rows, cols] = rows_of(kOp, "x", x);
  int64_t sq = queries(x, causal);
  std::optional<Tensor> bytes;
  if (mask) bytes = columns_together(*mask);
  Tensor xc = dense(x), y = new_like(x);
  SoftmaxForward call{
      xc.const_data_ptr(), bytes ? row_mask(x, *bytes) : RowMask{}, y.mutable_data_ptr(), rows, cols, sq, scale, causal, type};
  run(kOp, Device(x), kernels::scaled_masked_softmax_forward, call);
  return y;
}

Tensor backward(Tensor dy, Tensor y, double scale, bool causal) {
  DType type = dtype(kOp, "y", y);
  check_same(kOp, "dy", dy, "y", y);
  auto [rows, cols] = rows_of(kOp, "y", y);
  Tensor dyc = dense(dy), yc = dense(y), dx = new_like(y);
  SoftmaxBackward call{
      dyc.const_data_ptr(), yc.const_data_ptr(), dx.mutable_data_ptr(), rows, cols, queries(y, causal), scale, causal, type};
  run(kOp, Device(y), kernels::scaled_masked_softmax_backward, call);
  return dx;
}

}  // namespace
}  // namespace mk::binding

STABLE_TORCH_LIBRARY_IMPL(MK_NAMESPACE, MK_KEY, m) {
  m.impl("scaled_masked_softmax_forward", TORCH_BOX(&mk::binding::forward));
  m.impl("scaled_masked_softmax_backward", TORCH_BOX(&mk::binding::backward));
}
