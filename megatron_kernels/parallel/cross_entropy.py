"""Cross-entropy of logits whose columns are spread over a group, with one collective: an all-gather of three floats per token.

Each rank reads its columns once and sends their maximum, the sum of exponentials relative to that, and its part of what is
subtracted from the log-sum-exp: (1 - a) x_target + a/K sum(x). The merged log-sum-exp is all that the backward needs beside the
rank's own logits. (Megatron-LM, arXiv 1909.08053, section 3, fuses the output layer with the loss for the same reason: scalars
travel, not logits.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend, ops
from ..ops.cross_entropy import check_reduction, check_writable, reduced
from .collectives import all_gather
from .group import Group, group_of

_REFUSED = -1.0  # as a sum of exponentials: the rank that sent it raised an error


class Shard(NamedTuple):
    """The columns from `start` of a vocabulary of `vocab_size`, and the loss's constants, in the order of the raw ops."""

    start: int
    vocab_size: int
    ignore_index: int
    label_smoothing: float
    z_loss: float


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, group: Any = None, *, vocab_start: int | None = None,
                                 vocab_size: int | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
                                 z_loss: float = 0.0, reduction: str = "none", inplace_backward: bool = False) -> Tensor:
    """The loss of `megatron_kernels.cross_entropy` where each rank of a group has some columns of the logits.

    The forward is one all-gather of three floats per token, the backward has no collective. Every rank gets the whole loss and the
    gradient of its own columns. A group of one rank computes `megatron_kernels.cross_entropy`.

    Args:
        logits: [..., this rank's columns], float32, float16, bfloat16 (float64 on CPU).
        target: [...], the same on every rank: class numbers of the whole vocabulary, of any integer dtype, or ignore_index.
        group: a ProcessGroup, a DeviceMesh (its dimension "tp"), or None for this process alone.
        vocab_start: the class of this rank's first column. None: the ranks have equally many, in rank order. Where they have not,
            vocab_start and vocab_size must be given: from one shard alone the mistake can't be seen.
        vocab_size: number of classes K of the whole vocabulary; columns at or beyond it are padding, take no part and get gradient
            exactly 0, and a rank may have nothing else. None: all columns of all ranks.
        ignore_index, label_smoothing, z_loss, inplace_backward: as in `megatron_kernels.cross_entropy`; the smoothing is over the
            whole vocabulary.
        reduction: "none", "sum", or "mean" over the rows that are not ignored (0 when there are none).

    Returns:
        The loss in float32 (float64 for float64), the same on every rank: [...] for "none", else a scalar.

    Raises:
        ValueError: reduction, label_smoothing, vocab_start or vocab_size, or logits that can't be written in place.
        RuntimeError: a dtype, shape or device that does not fit, or on a CPU a target that is neither ignore_index nor a class
            (elsewhere its loss is NaN). Where only one rank's columns are at fault that rank says why and, on a CPU, the others
            that it did; elsewhere they get NaN.
    """
    what = "vocab_parallel_cross_entropy"
    group = group_of(group, "tp")
    if inplace_backward:
        check_writable(what, logits)
    target = checked_target(what, target, logits, "logits", reduction)
    name = backend.choose("cross_entropy", logits)
    shard, fault = shard_of(what, group, logits.shape[-1], vocab_start, vocab_size, ignore_index, label_smoothing, z_loss)
    check_classes(what, target, shard, name)
    if fault:
        refuse(fault, group, target.shape, logits)
    if group.size == 1:
        return ops.cross_entropy(logits, target, vocab_size=shard.vocab_size, ignore_index=ignore_index,
                                 label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction,
                                 inplace_backward=inplace_backward)
    if backend.gradient_wanted(logits):
        loss = _VocabParallel.apply(logits, target, group, shard, inplace_backward, name)
    else:
        loss, _ = loss_of(what, logits, target, group, shard, name)
    return reduced(loss, target, ignore_index, reduction)


def checked_target(what: str, target: Tensor, x: Tensor, x_name: str, reduction: str) -> Tensor:
    """The target as int64. What is looked at here is the same on every rank, so that all of them raise alike."""
    check_reduction(what, reduction)
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        raise RuntimeError(f"{what}: target must be of an integer dtype, got {str(target.dtype).removeprefix('torch.')}")
    if x.dim() == 0 or target.shape != x.shape[:-1]:
        raise RuntimeError(f"{what}: target must have the shape of {x_name} {list(x.shape)} without the last dimension, got "
                           f"{list(target.shape)}")
    if target.device != x.device:
        raise RuntimeError(f"{what}: target must be on the device of {x_name}, {x.device}, got {target.device}")
    return target.long()


def shard_of(what: str, group: Group, columns: int, vocab_start: int | None, vocab_size: int | None, ignore_index: int,
             label_smoothing: float, z_loss: float) -> tuple[Shard, str]:
    """This rank's shard, and what is wrong with it. Errors that every rank can see are raised."""
    if vocab_start is not None and vocab_size is None and group.size > 1:
        raise ValueError(f"{what}: vocab_start={vocab_start} needs vocab_size too, got None")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"{what}: vocab_size must be at least 1, got {vocab_size}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{what}: label_smoothing must be in [0, 1], got {label_smoothing}")
    start = group.rank * columns if vocab_start is None else vocab_start
    size = group.size * columns if vocab_size is None else vocab_size
    fault, end = "", start + columns
    if columns < 1:
        fault = "this rank has no column"
    elif start < 0 or (group.rank == 0 and start > 0):
        fault = f"vocab_start must be {'0 on the first rank' if group.rank == 0 else 'at least 0'}, got {start}"
    elif group.rank == group.size - 1 and end < size:
        fault = f"the last rank has columns {start} to {end - 1} of vocab_size={size}"
        fault += ", without the last ones" if vocab_start is not None else ": uneven shards must pass vocab_start"
    return Shard(start, size, ignore_index, label_smoothing, z_loss), f"{what}: {fault}" if fault else ""


def check_classes(what: str, target: Tensor, shard: Shard, name: str) -> None:
    """A target that is no class is an error where asking costs nothing; a GPU would have to be waited for."""
    if torch.compiler.is_compiling() or type(target) is not Tensor or not target.is_cpu or name not in ("cpu", backend.REFERENCE):
        return
    bad = ((target < 0) | (target >= shard.vocab_size)) & (target != shard.ignore_index)
    if bad.any():
        row = int(bad.reshape(-1).int().argmax())
        raise RuntimeError(f"{what}: target {int(target.reshape(-1)[row])} at row {row} is neither ignore_index "
                           f"({shard.ignore_index}) nor in [0, {shard.vocab_size})")


def refuse(fault: str, group: Group, shape: torch.Size, like: Tensor) -> NoReturn:
    """Raise on this rank. The others wait for its statistics, of `shape`: they get some that no columns have."""
    if shape.numel() and group.size > 1:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        gather(torch.full((*shape, 3), _REFUSED, dtype=dtype, device=like.device), group)
    raise ValueError(fault)


def gather(partial: Tensor, group: Group) -> Tensor:
    """[..., 3] -> [size, ..., 3]. Of no tokens there is nothing to send, and not every engine sends nothing."""
    return all_gather(partial[None], group, 0) if partial.numel() else partial.new_empty(group.size, *partial.shape)


def merge(what: str, parts: Tensor, target: Tensor, shard: Shard, group: Group) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp per token, from every rank's statistics [size, ..., 3].

    Rank by rank in order, so every rank gets the same bits. Shards without classes have maximum -inf and sum 0, and so has every
    shard of an ignored row: while all is -inf the sums count as relative to 0, as they are.
    """
    tops, exps, terms = parts.unbind(-1)
    if not torch.compiler.is_compiling() and type(parts) is Tensor and parts.is_cpu and (exps < 0).any():
        rank = int((exps < 0).reshape(group.size, -1).any(1).int().argmax())
        raise RuntimeError(f"{what} over {group}: rank {group.ranks[rank]} refused its columns, see its own error")
    top = tops.amax(0)
    shift = top.masked_fill(top == -math.inf, 0.0)
    log_exps = (exps * (tops - shift).exp()).sum(0).log()
    lse = shift + log_exps
    loss = log_exps + (shift - terms.sum(0))  # in this order large logits cancel before the small number joins
    if shard.z_loss:
        loss = loss + shard.z_loss * lse.square()
    return loss.masked_fill(target == shard.ignore_index, 0.0), lse


def loss_of(what: str, logits: Tensor, target: Tensor, group: Group, shard: Shard, name: str) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp per token: one all-gather, none for a group of one."""
    if group.size == 1 and name != backend.REFERENCE:
        return raw(name).cross_entropy_forward(logits, target, *shard[1:])
    return merge(what, gather(raw(name).cross_entropy_partial(logits, target, *shard[:4]), group), target, shard, group)


def raw(name: str):
    """The raw ops of an implementation, the reference's included."""
    return _Reference if name == backend.REFERENCE else backend.namespace(name)


class _Reference:
    """The raw ops in plain torch, for `use("reference")`."""

    @staticmethod
    def _classes(logits: Tensor, shard_start: int, vocab_size: int) -> tuple[Tensor, Tensor]:
        """The logits, 16 bits widened, and which columns are classes."""
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return wide, torch.arange(shard_start, shard_start + logits.shape[-1], device=logits.device) < vocab_size

    @classmethod
    def cross_entropy_partial(cls, logits, target, vocab_start, vocab_size, ignore_index, label_smoothing):
        x, classes = cls._classes(logits, vocab_start, vocab_size)
        x = x.masked_fill(~classes, -math.inf)
        top = x.amax(-1)
        exps = (x - top.masked_fill(top == -math.inf, 0.0).unsqueeze(-1)).exp().sum(-1)
        column = target - vocab_start
        here = (column >= 0) & (column < logits.shape[-1])
        hit = x.gather(-1, column.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1).where(here, 0.0)
        term = (1 - label_smoothing) * hit
        if label_smoothing:
            term = term + label_smoothing / vocab_size * x.masked_fill(~classes, 0.0).sum(-1)
        nothing = x.new_tensor([-math.inf, 0.0, 0.0])
        return torch.where((target == ignore_index).unsqueeze(-1), nothing, torch.stack([top, exps, term], -1))

    @classmethod
    def cross_entropy_backward(cls, dloss, logits, target, lse, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss):
        x, classes = cls._classes(logits, vocab_start, vocab_size)
        true_class = torch.arange(vocab_start, vocab_start + logits.shape[-1], device=logits.device) == target.unsqueeze(-1)
        lse = lse.unsqueeze(-1)
        dx = (1 + 2 * z_loss * lse) * (x - lse).exp() - (1 - label_smoothing) * true_class.to(x.dtype)
        dx = dx - label_smoothing / vocab_size
        return (dloss.unsqueeze(-1) * dx).where(classes & (target != ignore_index).unsqueeze(-1), 0.0).to(logits.dtype)

    @classmethod
    def cross_entropy_backward_(cls, dloss, logits, *rest):
        logits.copy_(cls.cross_entropy_backward(dloss, logits, *rest))


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, group, shard, inplace, name):
        loss, lse = loss_of("vocab_parallel_cross_entropy", logits, target, group, shard, name)
        ctx.save_for_backward(logits, target, lse)
        ctx.shard, ctx.inplace, ctx.name = shard, inplace, name
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, target, lse = ctx.saved_tensors
        if not ctx.inplace:
            return raw(ctx.name).cross_entropy_backward(dloss, logits, target, lse, *ctx.shard), *[None] * 5
        dlogits = logits.detach()
        raw(ctx.name).cross_entropy_backward_(dloss, dlogits, target, lse, *ctx.shard)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(logits)  # C++ ops don't
        return dlogits, *[None] * 5
