"""softmax(scale * x) among unmasked positions, with its backward from the saved probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend, reference


def scaled_masked_softmax(x: Tensor, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False) -> Tensor:
    """Softmax of `scale * x` over the last dimension, among the positions that are not masked.

    Masked positions give exactly 0; a row with every position masked gives zeros and gets zero gradient. Whether a row is
    fully masked is decided by mask and causal, never by values: an unmasked row of -inf gives NaN, as torch.softmax does.

    Args:
        x: scores [..., sq, sk], float32, float16, bfloat16 (float64 on CPU). [sk] works too where causal is False.
        mask: bool, True = masked out, of any shape that broadcasts to x's; it is never expanded in memory.
        scale: multiplies x in float32 (float64 for float64), before the maximum is taken.
        causal: also mask k > q + (sk - sq), so that the last query sees every key.

    Returns:
        Probabilities of x's shape and dtype.

    Raises:
        RuntimeError: a dtype, shape or device that does not fit; the message names the argument and the value.
    """
    name = backend.choose("scaled_masked_softmax", x)
    if name == backend.REFERENCE:
        return reference.scaled_masked_softmax(x, mask, scale, causal)
    if not backend.gradient_wanted(x):
        return backend.namespace(name).scaled_masked_softmax_forward(x, mask, scale, causal)
    return _ScaledMaskedSoftmax.apply(x, mask, scale, causal, name)


class _ScaledMaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, scale, causal, name):
        y = backend.namespace(name).scaled_masked_softmax_forward(x, mask, scale, causal)
        ctx.save_for_backward(y)
        ctx.scale, ctx.causal, ctx.name = scale, causal, name
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dx = backend.namespace(ctx.name).scaled_masked_softmax_backward(dy, y, ctx.scale, ctx.causal)
        return dx, None, None, None, None


@backend.register_fake("scaled_masked_softmax_forward")
def _(x, mask, scale, causal):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@backend.register_fake("scaled_masked_softmax_backward")
def _(dy, y, scale, causal):
    return torch.empty_like(y, memory_format=torch.contiguous_format)
