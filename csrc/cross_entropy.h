// Contract of cross_entropy on the columns [vocab_start, vocab_start + cols) of a vocabulary of vocab_size classes; one process
// that holds the whole vocabulary has vocab_start 0. Columns at or beyond vocab_size are padding: no part in the loss, gradient 0.
//   loss = lse - (1 - a) x_target - a/K sum(x) + z lse^2,   a = label_smoothing, K = vocab_size, z = z_loss
#pragma once
#include "dtype.h"
#include "parallel_for.h"
#include "stream.h"

namespace mk {

struct CrossEntropyForward {
  const void* logits;     // [rows, cols]
  const int64_t* target;  // [rows]
  void *loss, *lse;       // [rows], float (double for f64); null where partial is given
  void* partial;          // [rows, 3] or null: max, sum of exp(x - max), (1 - a) x_target + a/K sum(x) of these columns
  int64_t* bad_row;       // lowered to the first row whose target is neither ignore_index nor a class; on CPU only
  int64_t rows, cols, vocab_start, vocab_size, ignore_index;
  double label_smoothing, z_loss;
  DType dtype;
};

struct CrossEntropyBackward {
  const void* dloss;  // [rows], float (double for f64)
  const void* logits;
  const int64_t* target;
  const void* lse;  // [rows], over the whole vocabulary
  void* dlogits;    // [rows, cols]; may be logits
  int64_t rows, cols, vocab_start, vocab_size, ignore_index;
  double label_smoothing, z_loss;
  DType dtype;
};

namespace cpu {
void cross_entropy_forward(const CrossEntropyForward&, ParallelFor);
void cross_entropy_backward(const CrossEntropyBackward&, ParallelFor);
}  // namespace cpu

namespace cuda {
Error cross_entropy_forward(const CrossEntropyForward&, Stream);
Error cross_entropy_backward(const CrossEntropyBackward&, Stream);
}  // namespace cuda

}  // namespace mk
