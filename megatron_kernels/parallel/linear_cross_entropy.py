"""Output layer and cross-entropy in one, for a vocabulary spread over a group: the logits of all tokens never exist.

"mean" and "sum" know what each token's loss weighs before the backward, so every chunk of tokens is finished at once: logits, their
gradient written over them, its two products, and the memory serves the next chunk; the backward multiplies by the incoming scalar.
"none" does not, and its backward forms the logits again, in blocks of the vocabulary over all tokens, from the saved log-sum-exp:
four products instead of three, but one all-gather in all instead of one per chunk, and each block of the weight's gradient is
written once. A second backward over the graph of a "mean" does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import backend
from ..linear import add_product, logits_of, product
from ..ops.cross_entropy import reduced
from .cross_entropy import (
    Shard,
    check_classes,
    checked_target,
    gather,
    loss_of,
    merge,
    raw,
    refuse,
    shard_of,
    vocab_parallel_cross_entropy,
)
from .group import Group, group_of

WHAT = "vocab_parallel_linear_cross_entropy"
_PIECES = 12  # float32 logits of one chunk are so small a part of all tokens'; the rest of a tenth is for temporaries
_FEWEST = 128  # tokens of a chunk, columns of a block: with fewer a GPU's products are slow


class _Task(NamedTuple):
    """What a call is, beside its tensors. `wanted`: whether the gradients of hidden and weight are."""

    group: Group
    shard: Shard
    reduction: str
    dtype: torch.dtype  # of the products
    wanted: tuple[bool, bool]
    name: str


def vocab_parallel_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, group: Any = None, *,
                                        vocab_start: int | None = None, vocab_size: int | None = None, ignore_index: int = -100,
                                        label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean") -> Tensor:
    """`vocab_parallel_cross_entropy(hidden @ weight.T, target, ...)` without ever holding the logits of all tokens.

    Beyond inputs and returned gradients it holds at most a tenth of what the float32 logits of all tokens would take, as long as
    the tokens are some thousand (a chunk has at least 128 of them) and the columns several times the hidden size.

    The gradient of hidden is this rank's part alone: the sum over the group is whole, and f (`copy_to_group` on hidden, or the
    sequence-parallel `gather_sequence`) takes it. The gradient of weight is whole.

    Args:
        hidden: [..., h], the same on every rank, float32, float16, bfloat16 (float64 on CPU).
        weight: [this rank's rows, h], the output table, of hidden's dtype. Under autocast both are cast to its dtype, so that a
            copy of weight is held as for any linear layer; the gradients have the dtypes given.
        target, group, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss: as in `vocab_parallel_cross_entropy`; rows of
            weight are columns there.
        reduction: "mean" over the rows that are not ignored (0 when there are none) and "sum": gradients are formed in the forward,
            those that are wanted alone, with one all-gather per chunk of tokens. "none": one all-gather in all, and the backward
            forms the logits again. No all-gather in any backward.

    Returns:
        The loss in float32 (float64 for float64), the same on every rank: a scalar, or [...] for "none".

    In 16 bits a sum over chunks is rounded after each of the six: the gradient of weight for "mean" and "sum", of hidden for
    "none". Under autocast a float32 weight's gradient is summed in float32. Inside `use("reference")` the definition runs: logits
    of all tokens, then their loss.

    Raises what `vocab_parallel_cross_entropy` raises, and RuntimeError for a hidden and a weight that don't fit each other.
    """
    group = group_of(group, "tp")
    target = checked_target(WHAT, target, hidden, "hidden", reduction)
    if weight.dim() != 2 or weight.shape[-1] != hidden.shape[-1]:
        raise RuntimeError(f"{WHAT}: weight must be [rows, {hidden.shape[-1]}] for hidden {list(hidden.shape)}, got "
                           f"{list(weight.shape)}")
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    elif weight.dtype != dtype:
        raise RuntimeError(f"{WHAT}: weight must have hidden's dtype {_say(dtype)}, got {_say(weight.dtype)}")
    shard, fault = shard_of(WHAT, group, weight.shape[0], vocab_start, vocab_size, ignore_index, label_smoothing, z_loss)
    name = backend.choose("cross_entropy", hidden)
    check_classes(WHAT, target, shard, name)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if fault:
        whole = reduction == "none" or name == backend.REFERENCE
        refuse(fault, group, (flat if whole else flat[:_piece(flat.shape[0], dtype, 16)]).shape, hidden)
    if name == backend.REFERENCE:
        return vocab_parallel_cross_entropy(F.linear(hidden, weight), target, group, vocab_start=shard.start,
                                            vocab_size=shard.vocab_size, ignore_index=ignore_index,
                                            label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction)
    recorded = backend.gradient_wanted(hidden, weight)
    task = _Task(group, shard, reduction, dtype, (recorded and hidden.requires_grad, recorded and weight.requires_grad), name)
    if recorded:
        loss = _LinearCrossEntropy.apply(rows, weight, flat, task)
    elif reduction == "none":
        loss = _losses(rows, weight, flat, task)[0]
    else:
        loss = _loss_and_gradients(rows, weight, flat, task)[0]
    return loss.view(target.shape) if reduction == "none" else loss


def _say(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _piece(whole: int, dtype: torch.dtype, step: int) -> int:
    """Of how many tokens (or columns) the logits are held at a time. Depends on nothing in which the ranks may differ."""
    share = -(-whole * 4 // (_PIECES * dtype.itemsize))
    return max(-(-share // step) * step, _FEWEST)


def _pieces(whole: int, dtype: torch.dtype, step: int) -> Iterator[slice]:
    length = _piece(whole, dtype, step)
    return (slice(i, min(i + length, whole)) for i in range(0, whole, length))


def _as_given(x: Tensor) -> AbstractContextManager:
    """Products are in the dtype of their operands, which are cast already, also where a backward runs inside autocast."""
    return nullcontext() if torch.compiler.is_compiling() else torch.autocast(x.device.type, enabled=False)


def _losses(hidden: Tensor, weight: Tensor, target: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp per token, one all-gather."""
    found = []
    with _as_given(hidden):
        weight = weight.to(task.dtype)
        for piece in _pieces(hidden.shape[0], task.dtype, 16):
            logits = logits_of(hidden[piece].to(task.dtype), weight)
            if task.group.size == 1:
                found.append(torch.stack(loss_of(WHAT, logits, target[piece], task.group, task.shard, task.name), -1))
            else:
                found.append(raw(task.name).cross_entropy_partial(logits, target[piece], *task.shard[:4]))
            del logits
    if not found:
        empty = hidden.new_empty(0, dtype=_wide(task.dtype))
        return empty, empty
    if task.group.size == 1:
        loss, lse = torch.cat(found).unbind(-1)
        return loss.contiguous(), lse.contiguous()
    return merge(WHAT, gather(torch.cat(found), task.group), target, task.shard, task.group)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weights(target: Tensor, task: _Task) -> tuple[Tensor, Tensor | None]:
    """What a token's loss weighs where the gradients are formed, and by what they are multiplied afterwards, if by anything.

    In float16 a gradient divided by the number of tokens could vanish before the scale of the loss, which comes with the backward,
    lifts it, and an undivided sum could overflow: half of the division (by a power of two) is done before, half after.
    """
    if task.reduction == "sum":
        return torch.ones((), dtype=_wide(task.dtype), device=target.device), None
    count = (target != task.shard.ignore_index).sum().clamp(min=1).to(_wide(task.dtype))
    if task.dtype != torch.float16:
        return 1 / count, None
    before = torch.exp2(-(count.log2() / 2).floor())
    return before, 1 / (count * before)


def _loss_and_gradients(hidden: Tensor, weight: Tensor, target: Tensor, task: _Task) \
        -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The reduced loss, the gradients of hidden and weight, what they are still to be multiplied by, and the log-sum-exps."""
    kernels = raw(task.name)
    weighs, rest = _weights(target, task)
    dhidden = torch.empty_like(hidden) if task.wanted[0] else None
    dweight = (torch.empty_like if hidden.shape[0] else torch.zeros_like)(weight) if task.wanted[1] else None
    losses, lses = [hidden.new_empty(0, dtype=_wide(task.dtype))], [hidden.new_empty(0, dtype=_wide(task.dtype))]
    with _as_given(hidden):
        weight = weight.to(task.dtype)
        for piece in _pieces(hidden.shape[0], task.dtype, 16):
            rows, classes = hidden[piece].to(task.dtype), target[piece]
            logits = logits_of(rows, weight)
            loss, lse = loss_of(WHAT, logits, classes, task.group, task.shard, task.name)
            losses.append(loss)
            lses.append(lse)
            if any(task.wanted):
                kernels.cross_entropy_backward_(weighs.expand(loss.shape), logits, classes, lse, *task.shard)
            if dhidden is not None:
                dhidden[piece] = product(logits, weight.t())
            if dweight is not None:
                add_product(dweight, logits.t(), rows, first=piece.start == 0)
            del logits
    return reduced(torch.cat(losses), target, task.shard.ignore_index, task.reduction), dhidden, dweight, rest, torch.cat(lses)


def _gradients(hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, dloss: Tensor, task: _Task) \
        -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden and weight from that of each token's loss [n], by blocks of the vocabulary."""
    kernels, (start, *rest) = raw(task.name), task.shard
    dhidden = torch.empty_like(hidden) if task.wanted[0] else None
    dweight = torch.empty_like(weight) if task.wanted[1] else None
    with _as_given(hidden):
        rows = hidden.to(task.dtype)
        for piece in _pieces(weight.shape[0], task.dtype, 64):
            block = weight[piece].to(task.dtype)
            logits = logits_of(rows, block)
            kernels.cross_entropy_backward_(dloss, logits, target, lse, start + piece.start, *rest)
            if dhidden is not None:
                add_product(dhidden, logits, block, first=piece.start == 0)
            if dweight is not None:
                add_product(dweight[piece], logits.t(), rows, first=True)
            del logits
    return dhidden, dweight


def _scaled(gradient: Tensor, factor: Tensor, inplace: bool) -> Tensor:
    """gradient * factor, where a 16-bit gradient doesn't round the factor, which may be beyond its range, to its own dtype."""
    if not inplace:
        return (gradient * factor.view(1)).to(gradient.dtype)
    if type(factor) is not Tensor or not factor.is_cpu:  # asking for its value would wait for the GPU
        return gradient.mul_(factor.view(1))
    value = factor.item()
    return gradient if value == 1 else gradient.mul_(value)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, task):
        ctx.task = task
        if task.reduction == "none":
            loss, lse = _losses(hidden, weight, target, task)
            ctx.save_for_backward(hidden, weight, target, lse)
            return loss
        loss, dhidden, dweight, rest, lse = _loss_and_gradients(hidden, weight, target, task)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(rest, dhidden, dweight)
        else:
            # Not among the saved tensors: the first backward gives them away, so that they become .grad without a copy.
            ctx.save_for_backward(hidden, weight, target, lse)
            ctx.rest, ctx.gradients = rest, (dhidden, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        task, compiling = ctx.task, torch.compiler.is_compiling()
        if task.reduction == "none":
            hidden, weight, target, lse = ctx.saved_tensors
            return *_gradients(hidden, weight, target, lse, dloss, task), None, None
        if compiling:
            rest, *gradients = ctx.saved_tensors
        else:
            rest, gradients, ctx.gradients = ctx.rest, ctx.gradients, None
        if gradients is None:  # given away
            hidden, weight, target, lse = ctx.saved_tensors
            if task.reduction == "mean":
                dloss = dloss / (target != task.shard.ignore_index).sum().clamp(min=1)
            return *_gradients(hidden, weight, target, lse, dloss.expand(lse.shape), task), None, None
        factor = dloss if rest is None else dloss * rest
        return *(None if g is None else _scaled(g, factor, not compiling) for g in gradients), None, None
