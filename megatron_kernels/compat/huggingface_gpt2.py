"""The parts that `patch` puts into a Hugging Face GPT-2. Imports transformers, so it is itself imported when a model is patched.

Modules change their class, to a subclass of their own: nothing enters their __dict__, hooks and isinstance go on working, copies
and pickles keep the fused code. Each part decides at call time whether it may answer, and otherwise calls its superclass: a
c_fc that an adapter wraps after patching, or a tensor on a device without kernels, needs no second patch.

The softmax needs to know what an additive mask says. Hugging Face makes it from the arguments of GPT2Model.forward, so a pre-hook
there says what they were, in a keyword that travels with the others down to the attention function. That works under
torch.compile, where values can't be looked at, and in the second forward of gradient checkpointing. Masks of unknown origin are
looked at, once per mask, and left to Hugging Face's code where that can't be done.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..parallel.linear_cross_entropy import vocab_parallel_linear_cross_entropy

APPROXIMATE = {NewGELUActivation: "tanh", GELUActivation: "none"}
ORIGIN = "megatron_kernels_mask"  # the keyword: "causal", "packed" or "padding"


def parameters(function: Any) -> tuple[str, ...]:
    """The names of a method's parameters without self; what **kwargs collects is not among them."""
    named = list(inspect.signature(function).parameters.values())[1:]
    return tuple(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD)


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether calling the module is calling kind.forward: no subclass or wrapper, no hooks, no forward of its own."""
    return type(module) is kind and "forward" not in module.__dict__ and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def has_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" or (x.device.type == "cuda" and x.dtype is not torch.float64)


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose forward is `megatron_kernels.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.weight is not None and self.weight.dtype not in (x.dtype, torch.float32)
        if not has_kernels(x) or mixed or x.shape[-1:] != self.normalized_shape:
            return super().forward(x)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class FusedMLP(GPT2MLP):
    """GPT2MLP that takes the bias of a plain c_fc out of its product and into `megatron_kernels.bias_gelu`."""

    def forward(self, hidden_states: Any) -> Tensor:
        approximate = APPROXIMATE.get(type(self.act))
        if approximate is None or not is_plain(self.c_fc, Conv1D) or not has_kernels(hidden_states):
            return super().forward(hidden_states)
        product = hidden_states @ self.c_fc.weight
        return self.dropout(self.c_proj(ops.bias_gelu(product, self.c_fc.bias, approximate)))


class FusedAttention(GPT2Attention):
    """GPT2Attention for which the eager attention function is `eager_attention` below."""

    def __setstate__(self, state: dict) -> None:  # copies and pickles arrive here without passing through patch
        super().__setstate__(state)
        attach(self)


_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_their_attention = modeling_gpt2.eager_attention_forward


def attach(attention: nn.Module) -> None:
    """Give an attention module its fused softmax. GPT2Attention finds the eager function as a global of its module; the one put
    there hands every other model's attention on to the original, which comes back when the last module is detached."""
    global _their_attention
    attention.__class__ = FusedAttention
    _attached.add(attention)
    if modeling_gpt2.eager_attention_forward is not eager_attention:
        _their_attention = modeling_gpt2.eager_attention_forward
        modeling_gpt2.eager_attention_forward = eager_attention


def detach(attention: nn.Module) -> None:
    attention.__class__ = GPT2Attention
    _attached.discard(attention)
    if not _attached and modeling_gpt2.eager_attention_forward is eager_attention:
        modeling_gpt2.eager_attention_forward = _their_attention


def eager_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any,
                    **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Hugging Face's eager attention with the scale, the mask and the softmax in one kernel.

    query [b, h, sq, d], key and value [b, h, sk, d], attention_mask additive or None; returns [b, sq, h, d] and the probabilities.
    """
    origin = kwargs.pop(ORIGIN, None)
    mask = None
    if isinstance(module, FusedAttention) and has_kernels(query) and not args and kwargs.get("head_mask") is None:
        mask = _read_mask(module, query, key, attention_mask, origin)
    if mask is None:
        return _their_attention(module, query, key, value, attention_mask, *args, **kwargs)
    scale = _scale(module, query, kwargs.get("scaling"))
    weights = ops.scaled_masked_softmax(query @ key.mT, mask.masked, scale, mask.causal).type(value.dtype)
    weights = nn.functional.dropout(weights, kwargs.get("dropout", module.attn_dropout.p), module.training)
    output = weights @ value
    if mask.dead is not None:
        output = torch.where(mask.dead, _attend_to_all(query, key, value, scale), output)
    return output.transpose(1, 2), weights


def _scale(module: Any, query: Tensor, scaling: float | None) -> float:
    if scaling is not None:
        return scaling
    scale = query.shape[-1] ** -0.5 if module.scale_attn_weights else 1.0
    return scale / (module.layer_idx + 1) if module.scale_attn_by_inverse_layer_idx else scale


def _attend_to_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What Hugging Face computes for a query with every key masked: adding the dtype's minimum makes all scores equal.

    The output is the mean of the values. Its gradient passes the scores all the same, as if they were equal by chance: with
    p = 1/sk that is the gradient of scale * query . sum_j p key_j (value_j - mean), a term that is given the value 0. A training
    step sees it: with padding on the left, the first token's label is scored at the last padding position.
    """
    mean = value.mean(-2, keepdim=True)
    if not torch.is_grad_enabled():
        return mean
    slope = query @ (key.mT @ (value - mean).detach()) * (scale / key.shape[-2])
    return mean + (slope - slope.detach())


class Mask(NamedTuple):
    """An additive mask in the terms of `megatron_kernels.scaled_masked_softmax`.

    masked: bool, True = masked out, broadcasts to [b, h, sq, sk]. dead: [b, 1, sq, 1], True where Hugging Face attends to all
    keys because every one is masked; None where there is no such row.
    """

    masked: Tensor | None
    causal: bool
    dead: Tensor | None


def note_origin(model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of GPT2Model: say what the mask will be made of, where Hugging Face makes it."""
    if not _KEYWORDS_TRAVEL or model.config._attn_implementation != "eager":
        return None
    given = dict(zip(_MODEL_PARAMETERS, args)) | kwargs  # noqa: B905, args may be fewer
    causal = given.get("is_causal")
    if not (getattr(model.config, "is_causal", True) if causal is None else causal):
        return None
    mask = given.get("attention_mask")
    if mask is None:
        origin = "causal" if given.get("position_ids") is None else "packed"
    elif isinstance(mask, Tensor) and mask.dim() < 4:
        origin = "padding"
    else:
        return None
    return args, kwargs | {ORIGIN: origin}


_MODEL_PARAMETERS = parameters(GPT2Model.forward)
_KEYWORDS_TRAVEL = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(GPT2Model.forward).parameters.values())
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # additive mask -> (version, origin, causal, Mask or None)


def _read_mask(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, origin: str | None) -> Mask | None:
    """The mask, or None where Hugging Face's own code has to run. In eager mode each mask tensor is read once."""
    # Up to transformers 5.0 the attention is causal by a buffer of its own, whatever the mask says; later by the mask alone.
    causal = "bias" in module._buffers and not module.is_cross_attention
    origin = None if module.is_cross_attention else origin
    sq, sk = query.shape[-2], key.shape[-2]
    if mask is None:
        return Mask(None, causal, None)
    if torch.compiler.is_compiling() or mask.is_inference():
        return _convert(mask, sq, sk, causal, origin)
    asked = (mask._version, sq, sk, causal, origin)
    found = _read.get(mask)
    if found is None or found[0] != asked:
        found = _read[mask] = asked, _convert(mask, sq, sk, causal, origin)
    return found[1]


def _convert(mask: Tensor, sq: int, sk: int, causal: bool, origin: str | None) -> Mask | None:
    mask = mask[..., :sk]
    if origin == "causal" and sq == sk:
        return Mask(None, True, None)
    if origin in ("causal", "packed"):  # every token sees itself
        return Mask(mask < 0, causal or sq == sk, None)
    if origin == "padding" and not causal:
        if sq == sk:  # the last query is kept from padding only; a row is dead when all up to the diagonal is padding
            masked = mask[..., -1:, :] < 0
            dead: Tensor | None = (masked.logical_not().cumsum(-1) == 0).mT
        else:
            masked = mask < 0
            dead = masked.all(-1, keepdim=True)
        # Looking spares the CPU some work; on a GPU it would make the processor wait.
        if not torch.compiler.is_compiling() and type(dead) is Tensor and dead.is_cpu and not dead.any():
            dead = None
        return Mask(masked, sq == sk, dead)
    return None if torch.compiler.is_compiling() else _look(mask, sq, sk, causal)


def _look(mask: Tensor, sq: int, sk: int, causal: bool) -> Mask | None:
    """Read a mask of unknown origin; None where it holds anything but 0 and the minimum or -inf, or masks a whole row."""
    if type(mask) is not Tensor or not mask.is_floating_point() or mask.requires_grad:
        return None
    masked = mask <= torch.finfo(mask.dtype).min
    hidden = masked
    if causal:
        hidden = masked | torch.ones(sq, sk, dtype=torch.bool, device=mask.device).triu(sk - sq + 1)
    fine = (masked | (mask == 0)).all() & ~hidden.all(-1).any()
    return Mask(masked, causal, None) if fine else None


def causal_lm_loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, ignore_index: int = -100,
                   shift_labels: Tensor | None = None, **kwargs: Any) -> Tensor:
    """transformers' ForCausalLMLoss, by `megatron_kernels.cross_entropy`: no float32 copy, no softmax kept."""
    logits = logits.float() if logits.dtype is torch.float64 else logits
    if not has_kernels(logits):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    target = _target(labels, ignore_index, shift_labels, logits.device)
    total = ops.cross_entropy(logits.view(-1, vocab_size), target.view(-1), ignore_index=ignore_index, reduction="sum")
    return total / _items((target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch, total)


def _target(labels: Tensor, ignore_index: int, shift_labels: Tensor | None, device: torch.device) -> Tensor:
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.to(device).contiguous()


def _items(number: Any, loss: Tensor) -> Any:
    return number.to(loss.device) if isinstance(number, Tensor) else number


@functools.wraps(GPT2LMHeadModel.forward)
def linear_loss_forward(self, *args: Any, **kwargs: Any) -> Any:
    """GPT2LMHeadModel.forward with the loss straight from the hidden states where labels are given; logits are None then."""
    kwargs.update(zip(_LM_HEAD_PARAMETERS, args))  # noqa: B905, args may be fewer
    keep = kwargs.get("logits_to_keep", 0)
    table = self.lm_head
    if kwargs.get("labels") is None or isinstance(keep, Tensor) or keep or not is_plain(table, nn.Linear) or \
            table.bias is not None or table.weight.shape[0] != self.config.vocab_size or not has_kernels(table.weight):
        return type(self).forward(self, **kwargs)
    passed_on = {name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep", "return_dict")
                 and (_KEYWORDS_TRAVEL or name in _MODEL_PARAMETERS)}
    output = self.transformer(**passed_on, return_dict=True)
    hidden = output.last_hidden_state
    ignore_index, items = kwargs.get("ignore_index", -100), kwargs.get("num_items_in_batch")
    target = _target(kwargs["labels"], ignore_index, kwargs.get("shift_labels"), hidden.device)
    loss = vocab_parallel_linear_cross_entropy(hidden, table.weight, target.view(hidden.shape[:-1]), ignore_index=ignore_index)
    scored = (target != ignore_index).sum()  # the mean rather than the sum: its gradients in float16 don't overflow
    loss = loss / (scored > 0) if items is None else loss * scored / _items(items, loss)
    rest = {name: value for name, value in output.items() if name != "last_hidden_state"}
    return _returned(self, CausalLMOutputWithCrossAttentions(loss=loss, **rest), kwargs.get("return_dict"))


@functools.wraps(GPT2DoubleHeadsModel.forward)
def double_heads_forward(self, *args: Any, **kwargs: Any) -> Any:
    """GPT2DoubleHeadsModel.forward with our language-model loss; theirs is written out in it, and knows no keywords."""
    kwargs.update(zip(_DOUBLE_HEADS_PARAMETERS, args))  # noqa: B905, args may be fewer
    labels = kwargs.pop("labels", None)
    if labels is None:
        return type(self).forward(self, **kwargs)
    wanted = kwargs.pop("return_dict", None)
    output = type(self).forward(self, **kwargs, return_dict=True)
    loss = causal_lm_loss(output.logits, labels, output.logits.shape[-1]).to(output.logits.dtype)
    return _returned(self, type(output)(loss=loss, **output), wanted)


_LM_HEAD_PARAMETERS, _DOUBLE_HEADS_PARAMETERS = parameters(GPT2LMHeadModel.forward), parameters(GPT2DoubleHeadsModel.forward)


def _returned(model: Any, output: Any, return_dict: bool | None) -> Any:
    return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
