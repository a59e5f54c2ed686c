// Contract of bias_gelu: y = gelu(x + bias).
#pragma once
#include "dtype.h"
#include "parallel_for.h"
#include "stream.h"

namespace mk {

struct BiasGeluForward {
  const void* x;     // [rows, cols]
  const void* bias;  // [cols]
  void* y;           // [rows, cols]
  void* workspace;   // see below
  int64_t rows, cols;
  bool tanh;  // tanh approximation, else erf
  DType dtype, bias_dtype;
};

struct BiasGeluBackward {
  const void *dy, *x, *bias;
  void* dx;     // [rows, cols]; dy * gelu'(x + bias)
  void* dbias;  // [cols], of bias_dtype; the sum of dx over rows, taken before dx is rounded
  void* workspace;
  int64_t rows, cols;
  bool tanh;
  DType dtype, bias_dtype;
};

namespace cpu {
// Elements (float, or double for f64) of workspace that a call needs.
int64_t bias_gelu_forward_workspace(int64_t rows, int64_t cols);
int64_t bias_gelu_backward_workspace(int64_t rows, int64_t cols);
void bias_gelu_forward(const BiasGeluForward&, ParallelFor);
void bias_gelu_backward(const BiasGeluBackward&, ParallelFor);
}  // namespace cpu

namespace cuda {
int64_t bias_gelu_forward_workspace(int64_t rows, int64_t cols, Stream);
int64_t bias_gelu_backward_workspace(int64_t rows, int64_t cols, Stream);
Error bias_gelu_forward(const BiasGeluForward&, Stream);
Error bias_gelu_backward(const BiasGeluBackward&, Stream);
}  // namespace cuda

}  // namespace mk
