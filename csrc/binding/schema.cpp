// The table of contents: every op, with its arguments. Implementations for a device register in the files beside this one.
#if !defined(MK_BINDING_SIMT)
#include "../cpu/isa.h"
#endif
#include "tensor.h"

STABLE_TORCH_LIBRARY(MK_NAMESPACE, m) {
  m.def("scaled_masked_softmax_forward(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor");
  m.def("scaled_masked_softmax_backward(Tensor dy, Tensor y, float scale, bool causal) -> Tensor");
  m.def("bias_gelu_forward(Tensor x, Tensor bias, bool tanh) -> Tensor");
  m.def("bias_gelu_backward(Tensor dy, Tensor x, Tensor bias, bool tanh) -> (Tensor, Tensor)");
  m.def("layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, int vocab_size, int ignore_index, float label_smoothing, float z_loss) "
      "-> (Tensor, Tensor)");
  m.def(
      "cross_entropy_partial(Tensor logits, Tensor target, int vocab_start, int vocab_size, int ignore_index, "
      "float label_smoothing) -> Tensor");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor lse, int vocab_start, int vocab_size, "
      "int ignore_index, float label_smoothing, float z_loss) -> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor dloss, Tensor(a!) logits, Tensor target, Tensor lse, int vocab_start, int vocab_size, "
      "int ignore_index, float label_smoothing, float z_loss) -> ()");
#if !defined(MK_BINDING_SIMT)
  m.def("_isa() -> str");
  m.def("_set_isa(str name) -> ()");
#endif
}

#if !defined(MK_BINDING_SIMT)

namespace {

std::string isa() { return mk::cpu::isa(); }

void set_isa(std::string name) {
  mk::binding::check(mk::cpu::set_isa(name.c_str()), "_set_isa", "this processor has no build named '", name, "'");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_kernels, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_set_isa", TORCH_BOX(&set_isa));
}
#endif
