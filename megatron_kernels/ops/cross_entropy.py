"""Cross-entropy from logits in one pass; keeps the logits and one log-sum-exp per row, never a softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend, reference


def cross_entropy(logits: Tensor, target: Tensor, *, vocab_size: int | None = None, ignore_index: int = -100,
                  label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
                  inplace_backward: bool = False) -> Tensor:
    """lse - (1 - a) x_t - a/K sum(x) + z lse^2 per row, lse being log sum exp over the K classes.

    Args:
        logits: [..., V], float32, float16, bfloat16 (float64 on CPU).
        target: [...], integer class numbers in [0, K) or ignore_index.
        vocab_size: K; columns at or beyond it are padding, take no part and get gradient exactly 0. None: K = V.
        ignore_index: rows with this target give 0 loss and 0 gradient.
        label_smoothing: a in [0, 1], as in torch.nn.functional.cross_entropy.
        z_loss: z, the weight of lse^2 (PaLM, arXiv 2204.02311, section 5).
        reduction: "mean" over the rows that are not ignored, "sum" or "none".
        inplace_backward: the backward writes the gradient over the logits, so that no second [..., V] tensor is held. The
            logits' version is advanced: whoever else needs them in a backward gets an error instead of a wrong gradient.

    Returns:
        The loss in float32 (float64 for float64): a scalar, or [...] for "none". With every row ignored "mean" is 0, where
        torch.nn.functional.cross_entropy gives NaN.

    Raises:
        ValueError: reduction, or logits that can't be written in place (a leaf that needs grad, expanded, non-contiguous).
        RuntimeError: a dtype, shape or device that does not fit, or a target that is neither ignore_index nor a class.
    """
    check_reduction("cross_entropy", reduction)
    if target.dtype is not torch.int64 and not target.is_floating_point() and target.dtype is not torch.bool:
        target = target.long()
    if inplace_backward:
        check_writable("cross_entropy", logits)
    name = backend.choose("cross_entropy", logits)
    if name == backend.REFERENCE:
        return reference.cross_entropy(logits, target, vocab_size=vocab_size, ignore_index=ignore_index,
                                       label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction)
    classes = logits.shape[-1] if vocab_size is None else vocab_size
    if backend.gradient_wanted(logits):
        loss = _CrossEntropy.apply(logits, target, classes, ignore_index, label_smoothing, z_loss, inplace_backward, name)
    else:
        loss, _ = backend.namespace(name).cross_entropy_forward(logits, target, classes, ignore_index, label_smoothing, z_loss)
    return reduced(loss, target, ignore_index, reduction)


def check_reduction(what: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{what}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_writable(what: str, logits: Tensor) -> None:
    """Raise ValueError for logits over which the backward can't write their gradient."""
    if logits.requires_grad:
        if logits.is_leaf:
            raise ValueError(f"{what}: inplace_backward=True needs logits that are the result of an operation, got a leaf")
        if not logits.is_contiguous():
            raise ValueError(f"{what}: inplace_backward=True needs contiguous logits, got shape {tuple(logits.shape)} with strides "
                             f"{logits.stride()}")


def reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """[...] losses, their sum, or their mean over the rows that are not ignored, 0 when there are none."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum().clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, vocab_size, ignore_index, label_smoothing, z_loss, inplace, name):
        loss, lse = backend.namespace(name).cross_entropy_forward(logits, target, vocab_size, ignore_index, label_smoothing, z_loss)
        ctx.save_for_backward(logits, target, lse)
        ctx.rest = (0, vocab_size, ignore_index, label_smoothing, z_loss)
        ctx.inplace, ctx.name = inplace, name
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, target, lse = ctx.saved_tensors
        ops = backend.namespace(ctx.name)
        if not ctx.inplace:
            return ops.cross_entropy_backward(dloss, logits, target, lse, *ctx.rest), *[None] * 7
        dlogits = logits.detach()
        ops.cross_entropy_backward_(dloss, dlogits, target, lse, *ctx.rest)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(logits)  # C++ ops don't
        return dlogits, *[None] * 7


def _row_stat(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


@backend.register_fake("cross_entropy_forward")
def _(logits, target, vocab_size, ignore_index, label_smoothing, z_loss):
    return _row_stat(logits), _row_stat(logits)


@backend.register_fake("cross_entropy_partial")
def _(logits, target, vocab_start, vocab_size, ignore_index, label_smoothing):
    return _row_stat(logits.unsqueeze(-2).expand(*logits.shape[:-1], 3, logits.shape[-1]))


@backend.register_fake("cross_entropy_backward")
def _(dloss, logits, target, lse, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@backend.register_fake("cross_entropy_backward_")
def _(dloss, logits, target, lse, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss):
    return None
