"""Modules around the ops: they hold parameters and options, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops


class ScaledMaskedSoftmax(nn.Module):
    """`megatron_kernels.scaled_masked_softmax` with a fixed scale and causality; forward(x, mask=None)."""

    def __init__(self, scale: float = 1.0, causal: bool = False):
        super().__init__()
        self.scale, self.causal = scale, causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return ops.scaled_masked_softmax(x, mask, self.scale, self.causal)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, causal={self.causal}"


class BiasGeLU(nn.Module):
    """`megatron_kernels.bias_gelu` with a learned bias [features], zero at first; forward(x [..., features])."""

    def __init__(self, features: int, approximate: str = "tanh", device=None, dtype=None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return ops.bias_gelu(x, self.bias, self.approximate)

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, approximate={self.approximate!r}"


class LayerNorm(nn.Module):
    """`megatron_kernels.layer_norm` over the last dimension; the parameters are those of torch.nn.LayerNorm.

    Args:
        normalized_shape: the size of the last dimension, or a sequence that holds it alone.
        eps: added to the variance.
        elementwise_affine, bias: whether weight, and bias beside it, are learned.
    """

    def __init__(self, normalized_shape: int | tuple[int, ...] | list[int], eps: float = 1e-5, elementwise_affine: bool = True,
                 bias: bool = True, device=None, dtype=None):
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1:
            raise ValueError(f"LayerNorm: normalized_shape must name the last dimension alone, got {shape}")
        self.normalized_shape, self.eps, self.elementwise_affine = shape, eps, elementwise_affine
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) if elementwise_affine and bias else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.normalized_shape:
            raise ValueError(f"LayerNorm: the last dimension must be {self.normalized_shape[0]}, got shape {tuple(x.shape)}")
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class CrossEntropyLoss(nn.Module):
    """`megatron_kernels.cross_entropy` with fixed options; forward(logits [..., V], target [...])."""

    def __init__(self, *, vocab_size: int | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
                 z_loss: float = 0.0, reduction: str = "mean", inplace_backward: bool = False):
        super().__init__()
        self.options: dict[str, Any] = {"vocab_size": vocab_size, "ignore_index": ignore_index, "label_smoothing": label_smoothing,
                                        "z_loss": z_loss, "reduction": reduction, "inplace_backward": inplace_backward}

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return ops.cross_entropy(logits, target, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
