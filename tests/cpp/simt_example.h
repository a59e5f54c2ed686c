// Launchers of the example kernels; simt_example.cu is compiled by g++ for the tests and by nvcc for a look at its machine code.
#pragma once
#include <stdint.h>

#include "../../csrc/dtype.h"

namespace mk::example {

using Error = const char*;

// y = x / sum(x), row by row: a few lanes, a block with the row in registers. Rows of at most 32 and 4096 elements.
template <class T>
Error normalise_short(const T* x, T* y, int64_t rows, int64_t cols);
template <class T>
Error normalise(const T* x, T* y, int64_t rows, int64_t cols);
// Softmax of rows of any length; reads x twice.
template <class T>
Error softmax_long(const T* x, T* y, int64_t rows, int64_t cols);
// y = gelu(x + bias) where the mask, a byte per element, is 0, else 0.
template <class T>
Error masked_gelu(const T* x, const T* bias, const uint8_t* mask, T* y, int64_t rows, int64_t cols, bool tanh);
// out[j] = sum over rows of x[index[row], j]; partials has column_sum_blocks() * cols floats. At most 4096 columns.
int64_t column_sum_blocks(int64_t rows);
template <class T>
Error column_sums(const T* x, const int64_t* index, float* partials, T* out, int64_t rows, int64_t cols);

}  // namespace mk::example
