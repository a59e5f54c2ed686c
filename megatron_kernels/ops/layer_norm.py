"""Layer norm over the last dimension; its backward gives dx, dweight and dbias from one read of x and dy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend, reference


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, with the biased variance.

    Mean and variance are taken in two passes over the row in float32 (float64 for float64).

    Args:
        x: [..., n], float32, float16, bfloat16 (float64 on CPU).
        weight, bias: [n], of x's dtype or float32; either may be None.
        eps: added to the variance.

    Returns:
        [..., n] in x's dtype.

    Raises:
        RuntimeError: a dtype, shape or device that does not fit; the message names the argument and the value.
    """
    name = backend.choose("layer_norm", x)
    if name == backend.REFERENCE:
        return reference.layer_norm(x, weight, bias, eps)
    if not backend.gradient_wanted(x, weight, bias):
        return backend.namespace(name).layer_norm_forward(x, weight, bias, eps)[0]
    return _LayerNorm.apply(x, weight, bias, eps, name)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, name):
        y, mean, rstd = backend.namespace(name).layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.name = name
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = backend.namespace(ctx.name).layer_norm_backward(dy, x, weight, bias, mean, rstd)
        return dx, None if weight is None else dweight, None if bias is None else dbias, None, None


def _stats(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _like(parameter: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if parameter is None else torch.empty_like(parameter, memory_format=torch.contiguous_format)


@backend.register_fake("layer_norm_forward")
def _(x, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _stats(x), _stats(x)


@backend.register_fake("layer_norm_backward")
def _(dy, x, weight, bias, mean, rstd):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _like(weight, x), _like(bias, x)
