"""`patch` and `unpatch`: the fused ops in a Hugging Face GPT-2, in place and reversibly. See docs/huggingface.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn


@dataclass
class Report:
    """What `patch` did: names of modules with what was replaced there, and with why something was not. str() sums it up."""

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        def lines(title: str, entries: dict[str, str]) -> Iterator[str]:
            for text in dict.fromkeys(entries.values()):
                names = [name or "the model" for name, given in entries.items() if given == text]
                shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
                yield f"{title} {text}: {shown}"
        return "\n".join([*lines("replaced", self.replaced), *lines("kept", self.kept)])


def patch(model: nn.Module, *, fuse_linear_loss: bool = False) -> Report:
    """Put the fused ops into a Hugging Face GPT-2, in place. `unpatch` takes them out again.

    Replaces every layer norm; bias and GeLU after a plain Conv1D c_fc (activation gelu_new or gelu); scale, mask and softmax
    where attention is eager; the language-model loss. Parameters, their names, state_dict and the class of the model stay what
    they are. What can't be replaced keeps its own code and is named in the report. Patching again starts from an unpatched model.

    Args:
        model: GPT2Model or a model with one inside: the GPT-2 heads, a PEFT model around them, an encoder-decoder, DDP.
        fuse_linear_loss: GPT2LMHeadModel computes the loss from the hidden states, without ever holding the logits: its output
            has logits=None when labels are given.

    Raises:
        ImportError: transformers is not installed.
        TypeError: there is no GPT2Model in it.
    """
    parts = _parts("patch", model)
    unpatch(model)
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, parts.GPT2Model):
            module.register_forward_pre_hook(parts.note_origin, with_kwargs=True)
            for path, inner in module.named_modules(prefix=name):
                _replace(path, inner, parts, report)
        elif isinstance(module, parts.GPT2LMHeadModel):
            _replace_loss(name, module, parts, report)
            if fuse_linear_loss and name not in report.kept:
                _replace_forward(name, module, parts.GPT2LMHeadModel, parts.linear_loss_forward, "output layer and loss", report)
        elif isinstance(module, parts.GPT2DoubleHeadsModel):
            _replace_forward(name, module, parts.GPT2DoubleHeadsModel, parts.double_heads_forward, "loss", report)
        elif isinstance(module, parts.modeling_gpt2.GPT2PreTrainedModel):
            report.kept[name] = "loss over a few classes"
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the model has its own code again and computes what it computed before, bit for bit. Harmless on others.

    Raises:
        RuntimeError: a forward that `patch` set was wrapped since (by accelerate, say), and can't be taken out from below.
    """
    if importlib.util.find_spec("transformers") is None:
        return
    from . import huggingface_gpt2 as parts
    ours = (parts.linear_loss_forward, parts.double_heads_forward)
    for name, module in model.named_modules():
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        if forward in ours:
            continue
        while (forward := getattr(forward, "__wrapped__", None)) is not None:
            if forward in ours:
                raise RuntimeError(f"unpatch: the forward of {name or type(module).__name__} was wrapped after patch; "
                                   "undo that first")
    for module in model.modules():
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        unpickled = isinstance(module, parts.modeling_gpt2.GPT2PreTrainedModel) and forward is type(module).forward
        if forward in ours or unpickled:  # a pickle holds a method by its name alone
            del module.__dict__["forward"]
        if module.__dict__.get("_loss_function") is parts.causal_lm_loss:
            del module.__dict__["_loss_function"]
        if type(module) is parts.FusedAttention:
            parts.detach(module)
        elif type(module) in (parts.FusedLayerNorm, parts.FusedMLP):
            module.__class__ = type(module).__bases__[0]  # type: ignore[assignment]
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is parts.note_origin]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _parts(name: str, model: Any) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"{name}: transformers is not installed")
    from . import huggingface_gpt2 as parts
    if not isinstance(model, nn.Module) or not any(isinstance(module, parts.GPT2Model) for module in model.modules()):
        raise TypeError(f"{name}: model must be a Hugging Face GPT-2 or hold a GPT2Model, got {type(model).__name__}")
    return parts


def _replace(name: str, module: nn.Module, parts: Any, report: Report) -> None:
    """Give a module inside a GPT2Model its fused class, or say why not."""
    kinds: tuple[Any, ...] = (nn.LayerNorm, parts.GPT2MLP, parts.GPT2Attention)
    kind: Any = next((kind for kind in kinds if isinstance(module, kind)), None)
    if kind is None:
        return
    if type(module) is not kind:
        report.kept[name] = f"{kind.__name__} that is a {_class(module)}"
    elif "forward" in module.__dict__:
        report.kept[name] = f"{kind.__name__} whose forward was replaced"
    elif kind is nn.LayerNorm:
        module.__class__ = parts.FusedLayerNorm
        report.replaced[name] = "layer norm"
    elif kind is parts.GPT2MLP:
        _replace_mlp(name, module, parts, report)
    else:
        _replace_attention(name, module, parts, report)


def _replace_mlp(name: str, module: Any, parts: Any, report: Report) -> None:
    module.__class__ = parts.FusedMLP  # in every case: the class decides at each call, and an adapter may be taken off
    if type(module.act) not in parts.APPROXIMATE:
        report.kept[name] = f"activation {_class(module.act)}"
    elif parts.is_plain(module.c_fc, parts.Conv1D):
        report.replaced[name] = "bias and GeLU"
    else:
        report.kept[f"{name}.c_fc"] = f"product, bias and GeLU ({_not_plain(module.c_fc, parts)})"
    _report_wrapped(name, module, ("c_proj",), parts, report)


def _replace_attention(name: str, module: Any, parts: Any, report: Report) -> None:
    parts.attach(module)
    implementation = module.config._attn_implementation
    if implementation != "eager":
        report.kept[name] = f"attention {implementation!r}, which has no softmax of its own (eager would be replaced)"
    elif module.reorder_and_upcast_attn:
        report.kept[name] = "softmax of reorder_and_upcast_attn"
    else:
        report.replaced[name] = "scale, mask and softmax"
    _report_wrapped(name, module, ("c_attn", "q_attn", "c_proj"), parts, report)


def _report_wrapped(name: str, module: nn.Module, children: tuple[str, ...], parts: Any, report: Report) -> None:
    for child in children:
        if hasattr(module, child) and not parts.is_plain(getattr(module, child), parts.Conv1D):
            report.kept[f"{name}.{child}"] = f"product and bias ({_not_plain(getattr(module, child), parts)})"


def _replace_loss(name: str, module: Any, parts: Any, report: Report) -> None:
    if module.loss_function is not parts.ForCausalLMLoss:
        report.kept[name] = f"loss {getattr(module.loss_function, '__name__', module.loss_function)}"
        return
    module.loss_function = parts.causal_lm_loss
    report.replaced[name] = "loss"


def _replace_forward(name: str, module: Any, kind: Any, forward: Any, what: str, report: Report) -> None:
    if type(module).forward is kind.forward and "forward" not in module.__dict__:
        module.forward = MethodType(forward, module)
        report.replaced[name] = what
    else:
        report.kept[name] = f"{what} (the model has a forward of its own)"


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _not_plain(module: nn.Module, parts: Any) -> str:
    return "Conv1D with hooks" if type(module) is parts.Conv1D else f"{_class(module)}, not Conv1D"
