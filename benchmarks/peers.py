"""The libraries that ops are measured beside: what each is called, which ops it has, and how it is called for a case.

An adapter takes a case and its inputs and gives a function with inputs in the layout that the library wants, weights in its
modules, all of it made off the clock. It may raise: NotApplicable where the library does not do what the case asks, anything else
where it fails; either is named, and the run goes on. A peer that overwrites its input gets a copy of its own.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case, Made

EPS = 1e-5  # of layer norm, the default of torch and of ours
Inputs = tuple[Tensor, ...]
Adapter = Callable[[Case, Inputs], Made]


class NotApplicable(Exception):
    """The library's op does not take these inputs."""


@dataclass(frozen=True)
class Peer:
    """Adapters by the titles of cases. `on_cpu` says why it is not compared on a CPU unless it is asked for, or at all."""

    name: str
    distribution: str
    module: str  # what is imported first
    adapters: Mapping[str, Adapter]
    on_cpu: str
    install: str = ""  # where it comes from, other than the distribution of that name
    runs_on_cpu: bool = False
    note: str = ""  # what a reader of its figures should know

    @property
    def version(self) -> str:
        """"" where it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def why_not(self, device: str) -> str:
        """Why it can't be compared on that kind of device, or nothing."""
        if device == "cpu" and not self.runs_on_cpu:
            return f"not applicable: {self.on_cpu}"
        if not self.version:
            return f"not installed ({self.install or f'pip install {self.distribution}'})"
        try:
            importlib.import_module(self.module)
        except (Exception, SystemExit) as error:  # what an import runs may fail in any way
            return f"cannot be imported: {reason(error)}"
        return ""

def reason(error: BaseException) -> str:
    """In one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, NotApplicable) else f"{type(error).__name__}: {first}"


def leaf(x: Tensor, like: Tensor) -> Tensor:
    """x as an input that wants a gradient if `like` does."""
    return x.detach().requires_grad_(like.requires_grad)


def own(inputs: Inputs) -> Inputs:
    """With a copy of the first input, for a peer that writes over it."""
    return leaf(inputs[0].detach().clone(), inputs[0]), *inputs[1:]


def sequence_first(inputs: Inputs, copy: bool = False) -> Inputs:
    """Logits [tokens, 1, vocabulary] and targets [tokens, 1], as [sequence, batch, ...]."""
    logits, target = own(inputs) if copy else inputs
    return leaf(logits.detach().unsqueeze(1), logits), target.unsqueeze(1)


def liger_softmax(case: Case, inputs: Inputs) -> Made:
    from liger_kernel.transformers.functional import liger_softmax
    return Made(liger_softmax, inputs)


def liger_layer_norm(case: Case, inputs: Inputs) -> Made:
    from liger_kernel.transformers.functional import liger_layer_norm
    return Made(lambda x, weight, bias: liger_layer_norm(x, weight, bias, EPS), inputs)


def liger_cross_entropy(case: Case, inputs: Inputs) -> Made:
    from liger_kernel.transformers.functional import liger_cross_entropy
    return Made(lambda logits, target: liger_cross_entropy(logits, target, reduction="none"), own(inputs))


def liger_vocab_parallel(case: Case, inputs: Inputs) -> Made:
    from liger_kernel.megatron import LigerMegatronCrossEntropy
    loss = LigerMegatronCrossEntropy()
    return Made(lambda logits, target: loss(logits, target), sequence_first(inputs))


def quack_softmax(case: Case, inputs: Inputs) -> Made:
    from quack.softmax import softmax
    return Made(softmax, inputs)


def quack_layer_norm(case: Case, inputs: Inputs) -> Made:
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class LayerNorm(torch.autograd.Function):
        """quack has both directions of it, but no function that autograd knows."""

        @staticmethod
        def forward(ctx, x, weight, bias):
            y, rstd, mean = layernorm_fwd(x, weight, bias, EPS, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, rstd, mean = ctx.saved_tensors
            return layernorm_bwd(x, weight, dy, rstd, mean)

    x, *parameters = inputs
    return Made(LayerNorm.apply, (x, *(leaf(p.detach().float(), p) for p in parameters)))  # it takes float32 parameters only


def quack_cross_entropy(case: Case, inputs: Inputs) -> Made:
    from quack.cross_entropy import cross_entropy
    return Made(lambda logits, target: cross_entropy(logits, target, reduction="none"), inputs)


def te_softmax(case: Case, inputs: Inputs) -> Made:
    from transformer_engine.pytorch.attention.dot_product_attention.softmax import FusedScaleMaskSoftmax
    from transformer_engine.pytorch.utils import attention_mask_func
    x, future = inputs
    if x.dtype == torch.float32:
        raise NotApplicable("its softmax takes 16 bits only")
    softmax, mask = FusedScaleMaskSoftmax(attention_mask_func), future[None, None]
    return Made(lambda x, future: softmax(x, mask, "arbitrary"), inputs)  # what it runs for "causal" too, with this mask


def te_bias_gelu(case: Case, inputs: Inputs) -> Made:
    from transformer_engine.pytorch.jit import bgrad_dgelu_fused, bias_gelu_fused

    class BiasGelu(torch.autograd.Function):
        """As its LayerNormMLP calls the two."""

        @staticmethod
        def forward(ctx, x, bias):
            ctx.save_for_backward(x, bias)
            return bias_gelu_fused(x, bias)

        @staticmethod
        def backward(ctx, dy):
            dbias, dx = bgrad_dgelu_fused(dy, *ctx.saved_tensors)
            return dx, dbias

    return Made(BiasGelu.apply, inputs)


def te_layer_norm(case: Case, inputs: Inputs) -> Made:
    from transformer_engine.pytorch import LayerNorm
    x = inputs[0]
    return in_module(LayerNorm(x.shape[-1], eps=EPS, device=x.device, dtype=x.dtype), inputs)


def in_module(module: torch.nn.Module, inputs: Inputs) -> Made:
    """The case's weight and bias become the module's, and gradients are asked for those."""
    x, weight, bias = inputs
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    parameters = tuple(p.requires_grad_(like.requires_grad) for p, like in ((module.weight, weight), (module.bias, bias)))
    return Made(lambda x, weight, bias: module(x), (x, *parameters))


def te_cross_entropy(case: Case, inputs: Inputs) -> Made:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy
    return Made(parallel_cross_entropy, sequence_first(inputs))


def apex_layer_norm(case: Case, inputs: Inputs) -> Made:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    shape = inputs[0].shape[-1:]
    return Made(lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, shape, EPS), inputs)


def apex_fast_layer_norm(case: Case, inputs: Inputs) -> Made:
    from apex.contrib.layer_norm.layer_norm import FastLayerNormFN
    return Made(lambda x, weight, bias: FastLayerNormFN.apply(x, weight, bias, EPS), inputs)


def apex_cross_entropy(case: Case, inputs: Inputs) -> Made:
    from apex.contrib.xentropy.softmax_xentropy import SoftmaxCrossEntropyLoss
    sixteen_bits = inputs[0].dtype != torch.float32  # of which it makes a loss in float32 when told to
    return Made(lambda logits, target: SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100, sixteen_bits), inputs)


def flash_layer_norm(case: Case, inputs: Inputs) -> Made:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn
    return Made(lambda x, weight, bias: layer_norm_fn(x, weight, bias, eps=EPS), inputs)


def flash_cross_entropy(case: Case, inputs: Inputs) -> Made:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    return Made(lambda logits, target: cross_entropy_loss(logits, target)[0], inputs)


def one_rank(device: torch.device) -> torch.distributed.ProcessGroup:
    """Megatron-core's tensor-parallel group, of this process alone; made where there is none yet."""
    from megatron.core import parallel_state
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", store=torch.distributed.HashStore(),
                                             rank=0, world_size=1)
        atexit.register(alone_no_more)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1)
    return parallel_state.get_tensor_model_parallel_group()


def alone_no_more() -> None:
    """Takes back what `one_rank` made."""
    from megatron.core import parallel_state
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def megatron_cross_entropy(case: Case, inputs: Inputs) -> Made:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    one_rank(inputs[0].device)
    return Made(vocab_parallel_cross_entropy, sequence_first(inputs, copy=True))


def megatron_fused_cross_entropy(case: Case, inputs: Inputs) -> Made:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    group = one_rank(inputs[0].device)
    return Made(lambda logits, target: fused_vocab_parallel_cross_entropy(logits, target, group), sequence_first(inputs, copy=True))


def _megatron_softmax(inputs: Inputs, fusion: bool) -> tuple[torch.nn.Module, Tensor, Inputs]:
    """Its module; in float32 with a scale, as the module masks in place what has none, which a leaf of autograd does not allow."""
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func
    x, future = inputs
    module = FusedScaleMaskSoftmax(x.dtype == torch.float16, x.dtype == torch.bfloat16, AttnMaskType.causal, fusion,
                                   attention_mask_func, True, 1.0 if x.dtype == torch.float32 else None)
    return module, future[None, None], inputs


def megatron_softmax(case: Case, inputs: Inputs) -> Made:
    module, mask, inputs = _megatron_softmax(inputs, fusion=False)
    return Made(lambda x, future: module(x, mask), inputs)


def megatron_fused_softmax(case: Case, inputs: Inputs) -> Made:
    module, mask, inputs = _megatron_softmax(inputs, fusion=True)
    if not module.is_kernel_available(mask, *inputs[0].shape):
        raise NotApplicable("its fused softmax does not take this shape or dtype")
    return Made(lambda x, future: module(x, mask), inputs)


def megatron_bias_gelu(case: Case, inputs: Inputs) -> Made:
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
    return Made(bias_gelu_impl, inputs)


def megatron_layer_norm(case: Case, inputs: Inputs) -> Made:
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.transformer import TransformerConfig
    columns = inputs[0].shape[-1]
    config = TransformerConfig(num_layers=1, hidden_size=columns, num_attention_heads=1, persist_layer_norm=True)
    return in_module(FusedLayerNorm(config, columns, eps=EPS).to(inputs[0]), inputs)


def transformers_softmax(case: Case, inputs: Inputs) -> Made:
    """What its eager attention of GPT-2 does between its two products, with the additive mask that the model makes."""
    x, future = inputs
    mask = torch.zeros(future.shape, dtype=x.dtype, device=x.device).masked_fill_(future, torch.finfo(x.dtype).min)[None, None]
    return Made(lambda x, future: F.softmax(x + mask, dim=-1).type(x.dtype), inputs)


def transformers_bias_gelu(case: Case, inputs: Inputs) -> Made:
    from transformers.activations import NewGELUActivation
    gelu = NewGELUActivation()
    return Made(lambda x, bias: gelu(x + bias), inputs)


IN_FORWARD = "its cross-entropy makes the gradient in the forward: compare forward and backward together"
TRITON, CUDA = "its kernels are Triton's, for GPUs", "its kernels are for GPUs"
PLAIN = "here it is plain PyTorch, like eager and compile; --peers {} measures it all the same"
PEERS = (
    Peer("liger", "liger-kernel", "liger_kernel.transformers.functional",
         {"softmax": liger_softmax, "layer norm": liger_layer_norm, "cross-entropy": liger_cross_entropy}, TRITON, note=IN_FORWARD),
    Peer("liger-vocab-parallel", "liger-kernel", "liger_kernel.megatron", {"cross-entropy": liger_vocab_parallel}, TRITON),
    Peer("quack", "quack-kernels", "quack",
         {"softmax": quack_softmax, "layer norm": quack_layer_norm, "cross-entropy": quack_cross_entropy},
         "its kernels are CuTe's, for Hopper and later GPUs"),
    Peer("te", "transformer-engine", "transformer_engine.pytorch",
         {"causal softmax": te_softmax, "bias-GeLU": te_bias_gelu, "layer norm": te_layer_norm, "cross-entropy": te_cross_entropy},
         CUDA, "pip install transformer-engine[pytorch]", note=IN_FORWARD),
    Peer("apex", "apex", "apex.normalization", {"layer norm": apex_layer_norm, "cross-entropy": apex_cross_entropy}, CUDA,
         "from github.com/NVIDIA/apex; the package of that name on PyPI is another"),
    Peer("apex-fast", "apex", "apex.contrib.layer_norm", {"layer norm": apex_fast_layer_norm}, CUDA,
         "from github.com/NVIDIA/apex, with --fast_layer_norm"),
    Peer("flash-attn", "flash-attn", "flash_attn.ops.triton",
         {"layer norm": flash_layer_norm, "cross-entropy": flash_cross_entropy}, TRITON),
    Peer("megatron-fused", "megatron-core", "megatron.core",
         {"causal softmax": megatron_fused_softmax, "bias-GeLU": megatron_bias_gelu, "layer norm": megatron_layer_norm,
          "cross-entropy": megatron_fused_cross_entropy}, PLAIN.format("megatron-fused"), runs_on_cpu=True),
    Peer("megatron-unfused", "megatron-core", "megatron.core",
         {"causal softmax": megatron_softmax, "cross-entropy": megatron_cross_entropy},
         PLAIN.format("megatron-unfused"), runs_on_cpu=True),
    Peer("transformers", "transformers", "transformers",
         {"causal softmax": transformers_softmax, "bias-GeLU": transformers_bias_gelu}, PLAIN.format("transformers"),
         runs_on_cpu=True, note="its layer norm and its loss are PyTorch's: eager"),
)
BY_NAME = {peer.name: peer for peer in PEERS}
NAMES = ("eager", "compile", *BY_NAME)


def has(name: str, case: Case) -> bool:
    """PyTorch has everything."""
    return name in NAMES[:2] or case.title in BY_NAME[name].adapters


def make(name: str, case: Case, inputs: Inputs) -> Made:
    return BY_NAME[name].adapters[case.title](case, inputs)


def by_default(device: str) -> tuple[str, ...]:
    """On a CPU what PyTorch itself offers; the others are listed with the reason."""
    return NAMES if device == "cuda" else ("eager", "compile")


def status(wanted: Sequence[str], device: str) -> dict[str, dict[str, str]]:
    """For every peer its version, and why it is not compared on this device, or nothing."""
    found = {name: {"version": torch.__version__, "why_not": "" if name in wanted else "not asked for"} for name in NAMES[:2]}
    for peer in PEERS:
        if peer.name in wanted:
            why = peer.why_not(device)
        elif device == "cpu":
            why = f"not applicable: {peer.on_cpu}"
        else:
            why = "not asked for"
        found[peer.name] = {"version": peer.version, "why_not": why, **({"note": peer.note} if peer.note else {})}
    return found
