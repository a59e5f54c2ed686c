"""gelu(x + bias), and its backward with the bias gradient reduced in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend, reference


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """GeLU of `x + bias`.

    Args:
        x: [..., n], float32, float16, bfloat16 (float64 on CPU).
        bias: [n], of x's dtype or float32.
        approximate: "tanh", 0.5 v (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3))) as Megatron-LM's fused kernel, or "none",
            0.5 v (1 + erf(v / sqrt 2)). Formulas: Hendrycks and Gimpel, arXiv 1606.08415.

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError: approximate is neither.
        RuntimeError: a dtype, shape or device that does not fit; the message names the argument and the value.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"bias_gelu: approximate must be 'tanh' or 'none', got {approximate!r}")
    name = backend.choose("bias_gelu", x)
    if name == backend.REFERENCE:
        return reference.bias_gelu(x, bias, approximate)
    if not backend.gradient_wanted(x, bias):
        return backend.namespace(name).bias_gelu_forward(x, bias, approximate == "tanh")
    return _BiasGeLU.apply(x, bias, approximate == "tanh", name)


class _BiasGeLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, tanh, name):
        ctx.save_for_backward(x, bias)
        ctx.tanh, ctx.name = tanh, name
        return backend.namespace(name).bias_gelu_forward(x, bias, tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        dx, dbias = backend.namespace(ctx.name).bias_gelu_backward(dy, x, bias, ctx.tanh)
        return dx, dbias, None, None


@backend.register_fake("bias_gelu_forward")
def _(x, bias, tanh):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@backend.register_fake("bias_gelu_backward")
def _(dy, x, bias, tanh):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias, memory_format=torch.contiguous_format)
