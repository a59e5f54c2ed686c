// Contract of layer_norm: y = (x - mean) * rstd * weight + bias per row, rstd = 1 / sqrt(biased variance + eps).
#pragma once
#include "dtype.h"
#include "parallel_for.h"
#include "stream.h"

namespace mk {

struct LayerNormForward {
  const void* x;              // [rows, cols]
  const void *weight, *bias;  // [cols] or null
  void* y;                    // [rows, cols]
  void *mean, *rstd;          // [rows], float (double for f64)
  void* workspace;            // see below
  int64_t rows, cols;
  double eps;
  DType dtype, weight_dtype, bias_dtype;
};

struct LayerNormBackward {
  const void *dy, *x;       // [rows, cols]
  const void* weight;       // [cols] or null
  const void *mean, *rstd;  // [rows]
  void* dx;                 // [rows, cols]
  void *dweight, *dbias;    // [cols], of weight_dtype and bias_dtype, or null
  void* workspace;
  int64_t rows, cols;
  DType dtype, weight_dtype, bias_dtype;
};

namespace cpu {
// Elements (float, or double for f64) of workspace that a call needs.
int64_t layer_norm_forward_workspace(int64_t rows, int64_t cols);
int64_t layer_norm_backward_workspace(int64_t rows, int64_t cols);
void layer_norm_forward(const LayerNormForward&, ParallelFor);
void layer_norm_backward(const LayerNormBackward&, ParallelFor);
}  // namespace cpu

namespace cuda {
int64_t layer_norm_forward_workspace(int64_t rows, int64_t cols, Stream);
int64_t layer_norm_backward_workspace(int64_t rows, int64_t cols, Stream);
Error layer_norm_forward(const LayerNormForward&, Stream);
Error layer_norm_backward(const LayerNormBackward&, Stream);
}  // namespace cuda

}  // namespace mk
