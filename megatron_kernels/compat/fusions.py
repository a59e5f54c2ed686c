"""bias_gelu and bias_dropout_add under Megatron-LM's names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """gelu(input + bias), tanh approximation: input [..., n], bias [n]; the result has input's dtype."""
    if bias.dtype not in (input.dtype, torch.float32):
        bias = bias.float()
    return ops.bias_gelu(input, bias, "tanh")


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, prob: float, training: bool) -> Tensor:
    """residual + dropout(x + bias), in residual's dtype. Plain PyTorch, not fused; no argument is written to."""
    if x.dtype != residual.dtype:
        x, bias = x.to(residual.dtype), None if bias is None else bias.to(residual.dtype)
    return residual + torch.nn.functional.dropout(x if bias is None else x + bias, p=prob, training=training)


def get_bias_dropout_add(training: bool, fused: bool = True) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """Megatron-core's: f((x, bias), residual, prob). `fused` changes nothing."""
    def of_pair(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        return bias_dropout_add(*x_with_bias, residual, prob, training)

    return of_pair
