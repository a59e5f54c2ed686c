// Checks, allocates, and fills the contract of cross_entropy.
#include "../cross_entropy.h"

#include "tensor.h"

namespace mk::binding {
namespace {

constexpr const char* kOp = "cross_entropy";

struct Problem {
  DType type;
  int64_t rows, cols;
  Tensor target;
};

Problem problem(const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t vocab_size, double label_smoothing) {
  DType type = dtype(kOp, "logits", logits);
  auto [rows, cols] = rows_of(kOp, "logits", logits);
  check(target.scalar_type() == ScalarType::Long, kOp, "target must be int64, got ", name(target.scalar_type()));
  std::vector<int64_t> want = sizes(logits);
  want.pop_back();
  check(sizes(target) == want, kOp, "target must have the shape of logits ", shape(logits), " without the last dimension, got ",
        shape(target));
  check_device(kOp, "target", target, "logits", logits);
  check(vocab_start >= 0, kOp, "vocab_start must be at least 0, got ", vocab_start);
  check(vocab_size >= 1, kOp, "vocab_size must be at least 1, got ", vocab_size);
  check(label_smoothing >= 0 && label_smoothing <= 1, kOp, "label_smoothing must be in [0, 1], got ", label_smoothing);
  return {type, rows, cols, dense(target)};
}

// Runs the forward and refuses a target that is no class, where the kernel tells: a GPU's would have to be waited for.
void run_forward(const Tensor& logits, const CrossEntropyForward& args) {
  int64_t bad_row = args.rows;
  CrossEntropyForward a = args;
  a.bad_row = &bad_row;
  run(kOp, Device(logits), kernels::cross_entropy_forward, a);
  check(bad_row == args.rows, kOp, "target ", bad_row < args.rows ? args.target[bad_row] : 0, " at row ", bad_row,
        " is neither ignore_index (", args.ignore_index, ") nor in [0, ", args.vocab_size, ")");
}

std::tuple<Tensor, Tensor> forward(Tensor logits, Tensor target, int64_t vocab_size, int64_t ignore_index, double label_smoothing,
                                   double z_loss) {
  Problem p = problem(logits, target, 0, vocab_size, label_smoothing);
  check(vocab_size <= p.cols, kOp, "vocab_size must be at most the ", p.cols, " columns of logits, got ", vocab_size);
  Tensor x = dense(logits);
  Tensor loss = new_tensor(logits, sizes(target), accumulate_type(p.type)),
         lse = new_tensor(logits, sizes(target), accumulate_type(p.type));
  run_forward(logits, {x.const_data_ptr(), static_cast<const int64_t*>(p.target.const_data_ptr()), loss.mutable_data_ptr(),
                       lse.mutable_data_ptr(), nullptr, nullptr, p.rows, p.cols, 0, vocab_size, ignore_index, label_smoothing,
                       z_loss, p.type});
  return {loss, lse};
}

Tensor partial(Tensor logits, Tensor target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
               double label_smoothing) {
  Problem p = problem(logits, target, vocab_start, vocab_size, label_smoothing);
  std::vector<int64_t> size = sizes(target);
  size.push_back(3);
  Tensor x = dense(logits), out = new_tensor(logits, size, accumulate_type(p.type));
  run_forward(logits,
              {x.const_data_ptr(), static_cast<const int64_t*>(p.target.const_data_ptr()), nullptr, nullptr, out.mutable_data_ptr(),
               nullptr, p.rows, p.cols, vocab_start, vocab_size, ignore_index, label_smoothing, 0, p.type});
  return out;
}

void backward_into(const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse, const Tensor& dlogits,
                   int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, double label_smoothing, double z_loss) {
  Problem p = problem(logits, target, vocab_start, vocab_size, label_smoothing);
  check_row_values(kOp, "dloss", dloss, p.rows, accumulate_type(p.type), "logits", logits);
  check_row_values(kOp, "lse", lse, p.rows, accumulate_type(p.type), "logits", logits);
  Tensor dl = dense(dloss), ls = dense(lse), x = dense(logits);
  CrossEntropyBackward call{dl.const_data_ptr(),
                            x.const_data_ptr(),
                            static_cast<const int64_t*>(p.target.const_data_ptr()),
                            ls.const_data_ptr(),
                            dlogits.mutable_data_ptr(),
                            p.rows,
                            p.cols,
                            vocab_start,
                            vocab_size,
                            ignore_index,
                            label_smoothing,
                            z_loss,
                            p.type};
  run(kOp, Device(logits), kernels::cross_entropy_backward, call);
}

Tensor backward(Tensor dloss, Tensor logits, Tensor target, Tensor lse, int64_t vocab_start, int64_t vocab_size,
                int64_t ignore_index, double label_smoothing, double z_loss) {
  Tensor dlogits = new_like(logits);
  backward_into(dloss, logits, target, lse, dlogits, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss);
  return dlogits;
}

void backward_inplace(Tensor dloss, Tensor logits, Tensor target, Tensor lse, int64_t vocab_start, int64_t vocab_size,
                      int64_t ignore_index, double label_smoothing, double z_loss) {
  check(logits.is_contiguous(), kOp, "logits to be overwritten must be contiguous, got shape ", shape(logits));
  backward_into(dloss, logits, target, lse, logits, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss);
}

}  // namespace
}  // namespace mk::binding

STABLE_TORCH_LIBRARY_IMPL(MK_NAMESPACE, MK_KEY, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&mk::binding::forward));
  m.impl("cross_entropy_partial", TORCH_BOX(&mk::binding::partial));
  m.impl("cross_entropy_backward", TORCH_BOX(&mk::binding::backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&mk::binding::backward_inplace));
}
