// Contract of scaled_masked_softmax: y = softmax(scale * x) over the last dimension among unmasked positions.
#pragma once
#include "dtype.h"
#include "parallel_for.h"
#include "stream.h"

namespace mk {

// A bool tensor broadcast over rows by strides. Rows are numbered through the `ndim` leading dimensions, the last one varying
// fastest; a row's bytes lie col_stride apart (1, or 0 where one byte masks the whole row).
struct RowMask {
  static constexpr int kMaxDims = 8;
  const uint8_t* data;  // null: nothing masked
  int ndim;
  int64_t size[kMaxDims], stride[kMaxDims];
  int64_t col_stride;
};

struct SoftmaxForward {
  const void* x;  // [rows, cols]
  RowMask mask;
  void* y;  // [rows, cols]
  int64_t rows, cols;
  int64_t queries;  // rows are numbered query-fastest; used where causal
  double scale;
  bool causal;  // mask k > q + (cols - queries)
  DType dtype;
};

struct SoftmaxBackward {
  const void *dy, *y;  // [rows, cols]
  void* dx;            // [rows, cols]; scale * y * (dy - sum(y * dy))
  int64_t rows, cols, queries;
  double scale;
  bool causal;  // columns right of the diagonal are not read
  DType dtype;
};

namespace cpu {
void scaled_masked_softmax_forward(const SoftmaxForward&, ParallelFor);
void scaled_masked_softmax_backward(const SoftmaxBackward&, ParallelFor);
}  // namespace cpu

namespace cuda {
Error scaled_masked_softmax_forward(const SoftmaxForward&, Stream);
Error scaled_masked_softmax_backward(const SoftmaxBackward&, Stream);
}  // namespace cuda

}  // namespace mk
