// What every binding needs: checks with one wording, dtypes, contiguous inputs, workspaces, and the call itself.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../dtype.h"
#include "device.h"

namespace mk::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws "<op>: <message>". The message names the argument and the value seen.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline DType dtype(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double:
      if (kHasFloat64) return DType::f64;
      fail(op, argument, " must be float32, float16 or bfloat16 on a GPU, got float64 (use('reference') computes it)");
    default: fail(op, argument, " must be float32, float16, bfloat16 or float64, got ", name(t.scalar_type()));
  }
}

// The dtype of statistics, losses and partial sums beside elements of this dtype.
inline ScalarType accumulate_type(DType type) { return type == DType::f64 ? ScalarType::Double : ScalarType::Float; }

inline std::string device(const Tensor& t) {
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return t.is_cpu() ? "cpu" : "another device";
}

inline void check_device(const char* op, const char* argument, const Tensor& t, const char* other, const Tensor& like) {
  check(t.is_cuda() == like.is_cuda() && t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op,
        argument, " must be on the device of ", other, " ", device(like), ", got ", device(t));
}

inline void check_same(const char* op, const char* argument, const Tensor& t, const char* other, const Tensor& like) {
  check(sizes(t) == sizes(like), op, argument, " must have the shape of ", other, " ", shape(like), ", got ", shape(t));
  check(t.scalar_type() == like.scalar_type(), op, argument, " must have the dtype of ", other, " ", name(like.scalar_type()),
        ", got ", name(t.scalar_type()));
  check_device(op, argument, t, other, like);
}

// A parameter vector [n] of x's dtype or float32.
inline DType parameter_dtype(const char* op, const char* argument, const Tensor& t, const Tensor& x, int64_t n) {
  check(t.dim() == 1 && t.size(0) == n, op, argument, " must have shape [", n, "], got ", shape(t));
  check(t.scalar_type() == x.scalar_type() || (t.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double), op,
        argument, " must be ", name(x.scalar_type()), " (x's dtype) or float32, got ", name(t.scalar_type()));
  check_device(op, argument, t, "x", x);
  return dtype(op, argument, t);
}

// One value per row of x, in the accumulation dtype.
inline void check_row_values(const char* op, const char* argument, const Tensor& t, int64_t rows, ScalarType type,
                             const char* other, const Tensor& x) {
  check(t.numel() == rows, op, argument, " must have one value per row (", rows, "), got shape ", shape(t));
  check(t.scalar_type() == type, op, argument, " must be ", name(type), ", got ", name(t.scalar_type()));
  check_device(op, argument, t, other, x);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}
inline Tensor new_like(const Tensor& like) { return new_tensor(like, sizes(like), like.scalar_type()); }

struct Rows {
  int64_t rows, cols;
};
inline Rows rows_of(const char* op, const char* argument, const Tensor& t) {
  check(t.dim() >= 1 && t.size(t.dim() - 1) >= 1, op, argument, " must have a last dimension of at least 1, got shape ", shape(t));
  int64_t cols = t.size(t.dim() - 1);
  return {t.numel() / cols, cols};
}

// Memory for what a kernel computes on its way, in the accumulation dtype; null where it needs none.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t elements, ScalarType type) {
    if (elements) tensor_ = new_tensor(like, {elements}, type);
  }
  void* data() { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

// Calls a function of the contract.
template <class Result, class Arguments>
void run(const char* op, const Device& device, Result (*kernel)(const Arguments&, Place), const Arguments& arguments) {
  if (Error error = device.run(kernel, arguments)) fail(op, "the kernel was not started: ", error);
}

}  // namespace mk::binding
