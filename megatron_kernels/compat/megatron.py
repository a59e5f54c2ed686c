"""Our functions and classes in an installed Megatron-core, under the names that its own code uses."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import cross_entropy, fusions, softmax
from .arguments import UpstreamError
from .norms import layer_norm


class FusedLayerNorm(nn.Module):
    """megatron.core.fusions.fused_layer_norm.FusedLayerNorm, for any hidden size and without apex.

    The config decides: layernorm_zero_centered_gamma (the weight is stored minus 1), memory_efficient_layer_norm (plain PyTorch in
    the backward), sequence_parallel (an attribute set on the parameters). persist_layer_norm chose a kernel; there is one here.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, persist_layer_norm: bool = True,
                 zero_centered_gamma: bool = False, normalization: str = "LayerNorm"):
        super().__init__()
        if config.normalization != "LayerNorm":
            raise UpstreamError(f"FusedLayerNorm: config.normalization must be 'LayerNorm', got {config.normalization!r}")
        self.config, self.eps = config, eps
        self.hidden_size = torch.Size((hidden_size,) if isinstance(hidden_size, int) else hidden_size)
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.memory_efficient = config.memory_efficient_layer_norm
        self.sequence_parallel = config.sequence_parallel
        self.weight, self.bias = nn.Parameter(torch.empty(self.hidden_size)), nn.Parameter(torch.empty(self.hidden_size))
        self.reset_parameters()
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return layer_norm(input, weight, self.bias, self.hidden_size, self.eps, self.memory_efficient)


class WrappedTorchNorm:
    """What Megatron-core uses where apex is not installed: a FusedLayerNorm where layer norm is meant, else Megatron's own."""

    upstream: Any = None

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, *args, **kwargs):
        if config.normalization == "LayerNorm":
            return FusedLayerNorm(config, hidden_size, eps)
        return cls.upstream(config, hidden_size, eps, *args, **kwargs)


_REPLACEMENTS: dict[str, dict[str, Any]] = {
    "fusions.fused_softmax": {name: getattr(softmax, name) for name in (
        "FusedScaleMaskSoftmax", "ScaledUpperTriangMaskedSoftmax", "ScaledMaskedSoftmax", "ScaledSoftmax")},
    "fusions.fused_layer_norm": {"FusedLayerNorm": FusedLayerNorm},
    "fusions.fused_bias_gelu": {"bias_gelu_impl": fusions.bias_gelu_impl},
    "fusions.fused_cross_entropy": {"fused_vocab_parallel_cross_entropy": cross_entropy.fused_vocab_parallel_cross_entropy},
    "tensor_parallel.cross_entropy": {"vocab_parallel_cross_entropy": cross_entropy.vocab_parallel_cross_entropy},
    "transformer.torch_norm": {"WrappedTorchNorm": WrappedTorchNorm},
}
_originals: dict[str, tuple[Any, Any]] = {}  # "module.name" -> (Megatron's, ours), while patched


def _references(owner: Any, path: str) -> Iterator[tuple[Any, str, Any, str]]:
    """(owner, attribute, value, path) of what a module or a layer specification refers to, specifications inside it included."""
    for name, value in list(vars(owner).items()):
        yield owner, name, value, f"{path}.{name}"
        kind = type(value)
        if is_dataclass(kind) and (kind.__name__ == "ModuleSpec" or kind.__name__.endswith("Submodules")):
            yield from _references(value, f"{path}.{name}")


def _swap(pairs: list[tuple[Any, Any]]) -> list[str]:
    """Replace the first of each pair by the second wherever a module of Megatron-LM, or a specification in it, refers to it."""
    new = {id(old): (old, ours) for old, ours in pairs}
    done = []
    for name, module in list(sys.modules.items()):
        if module is None or not (name == "megatron" or name.startswith("megatron.")):
            continue
        for owner, attribute, value, path in list(_references(module, name)):
            if id(value) in new:
                setattr(owner, attribute, new[id(value)][1])
                done.append(path)
    return sorted(done)


def patch_megatron() -> list[str]:
    """Put our classes and functions into the installed megatron.core. Models that are built afterwards use them.

    Replaced are FusedScaleMaskSoftmax and the softmax functions beside it, FusedLayerNorm and WrappedTorchNorm, bias_gelu_impl,
    vocab_parallel_cross_entropy and fused_vocab_parallel_cross_entropy: where they are defined and in every module of Megatron-LM
    that has imported them. Which of them a model uses is still its config's choice (masked_softmax_fusion,
    bias_activation_fusion, cross_entropy_loss_fusion with the "native" implementation). Does nothing the second time.

    Returns:
        The names that were rebound.

    Raises:
        ModuleNotFoundError: megatron.core is not installed.
    """
    if _originals:
        return []
    found = {}
    for module_name, replacements in _REPLACEMENTS.items():
        try:
            module = importlib.import_module(f"megatron.core.{module_name}")
        except ModuleNotFoundError as error:
            if importlib.util.find_spec("megatron") is None or (error.name or "").startswith("megatron"):
                raise ModuleNotFoundError(f"patch_megatron: needs an installed megatron.core ({error}); pip install megatron-core",
                                          name=error.name) from error
            raise
        found.update({f"{module_name}.{name}": (getattr(module, name), ours) for name, ours in replacements.items()})
    _originals.update(found)
    WrappedTorchNorm.upstream = found["transformer.torch_norm.WrappedTorchNorm"][0]
    return _swap(list(found.values()))


def unpatch_megatron() -> list[str]:
    """Take out what `patch_megatron` put in, also from modules imported since. Models built in between keep what they have.

    Returns the names that were rebound.
    """
    names = _swap([(ours, upstream) for upstream, ours in _originals.values()])
    _originals.clear()
    return names
