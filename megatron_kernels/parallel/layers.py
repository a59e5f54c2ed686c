"""Linear layers and a token table of which each rank holds a share.

A column-parallel layer holds rows of its weight [out, in] and gives its part of the outputs; a row-parallel layer holds columns,
takes its part of the inputs, and its outputs are summed. One after the other they need one collective each way. With sequence
parallelism what lies between such pairs is shared along the sequence, and the collectives become all-gather and reduce-scatter.
`splits` of a module says which dimension of a parameter is shared, and how large it is in full; other parameters are replicated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..linear import linear, product
from .collectives import (
    SEQUENCE,
    all_gather,
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    scatter_sequence,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from .group import ALONE, Group


class ParallelModule(nn.Module):
    """A module that holds shares of parameters: `splits` maps their names to (dimension, full size along it)."""

    group: Group
    splits: dict[str, tuple[int, int]]


class ColumnParallelLinear(ParallelModule):
    """x @ weight.T + bias for this rank's out / group.size outputs. Raises ValueError when the group does not divide them.

    forward(x [b, s, in]) -> [b, s, out / size]; sequence=True takes x [b, s / size, in], the rank's share of the sequence.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, group: Group = ALONE, device=None, dtype=None):
        super().__init__()
        self.group, share = group, _share("ColumnParallelLinear: out_features", out_features, group)
        self.weight = nn.Parameter(torch.empty(share, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(share, device=device, dtype=dtype)) if bias else None
        self.splits = {"weight": (0, out_features), "bias": (0, out_features)}

    def forward(self, x: Tensor, sequence: bool = False) -> Tensor:
        return column_linear(x, self.weight, self.bias, self.group, sequence)

    def extra_repr(self) -> str:
        return _describe(self)


class RowParallelLinear(ParallelModule):
    """The sum over the group of x @ weight.T, each rank having in / group.size of the inputs, + bias (replicated).

    forward(x [b, s, in / size]) -> [b, s, out]; sequence=True gives [b, s / size, out], the rank's share of the sequence, and the
    bias's gradient is then of that share alone.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, group: Group = ALONE, device=None, dtype=None):
        super().__init__()
        self.group, share = group, _share("RowParallelLinear: in_features", in_features, group)
        self.weight = nn.Parameter(torch.empty(out_features, share, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.splits = {"weight": (1, in_features)}

    def forward(self, x: Tensor, sequence: bool = False) -> Tensor:
        if self.group.size == 1:
            return linear(x, self.weight, self.bias)
        y = linear(x, self.weight)
        y = scatter_sequence(y, self.group) if sequence else reduce_from_group(y, self.group)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return _describe(self)


class VocabParallelEmbedding(ParallelModule):
    """This rank's rows of a token table [vocabulary, h]: equal shares, rounded up, the last rank having what is left.

    forward(ids [b, s]) -> [b, s, h], summed over the group; sequence=True gives [b, s / size, h]. An id that is no row raises
    IndexError on a CPU.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, group: Group = ALONE, device=None, dtype=None):
        super().__init__()
        self.group, self.total = group, num_embeddings
        self.start, stop = group.range(num_embeddings)
        if group.range(num_embeddings, group.size - 1) == (num_embeddings, num_embeddings):
            raise ValueError(f"VocabParallelEmbedding: {num_embeddings} rows over {group} leave the last rank without any; "
                             "pad the vocabulary")
        self.weight = nn.Parameter(torch.empty(stop - self.start, embedding_dim, device=device, dtype=dtype))
        self.splits = {"weight": (0, num_embeddings)}

    def forward(self, ids: Tensor, sequence: bool = False) -> Tensor:
        return self.reduce(F.embedding(*self.local(ids)), ids, sequence)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers in this rank's table, 0 for tokens of other ranks, and the table."""
        return local_ids(ids, self.start, self.weight.shape[0], self.total), self.weight

    def reduce(self, rows: Tensor, ids: Tensor, sequence: bool) -> Tensor:
        """The rows that `local` found, without those of other ranks' tokens, summed over the group."""
        if self.group.size == 1:
            return rows
        rows = rows.masked_fill(elsewhere(ids, self.start, self.weight.shape[0], self.total).unsqueeze(-1), 0.0)
        return scatter_sequence(rows, self.group) if sequence else reduce_from_group(rows, self.group)

    def extra_repr(self) -> str:
        return _describe(self)


def elsewhere(ids: Tensor, start: int, rows: int, total: int) -> Tensor:
    """Which tokens are another rank's than that of [start, start + rows). What is no token at all is nobody else's."""
    return (ids >= 0) & (ids < total) & ((ids < start) | (ids >= start + rows))


def local_ids(ids: Tensor, start: int, rows: int, total: int) -> Tensor:
    """Row numbers in the table of [start, start + rows), 0 for tokens of other ranks; out of range for what is no token, so that
    looking it up fails on every rank as it does on one."""
    return ids if rows == total else (ids - start).masked_fill(elsewhere(ids, start, rows, total), 0)


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sequence: bool = False) -> Tensor:
    """f and the product: x [b, s, in] (sequence=True: this rank's share of s) -> x @ weight.T + bias, [b, s, out / size].

    The backward's collective runs while the weight's gradient is computed.
    """
    if group.size == 1:
        return linear(x, weight, bias)
    if _split:
        return linear(gather_sequence(x, group) if sequence else copy_to_group(x, group), weight, bias)
    if torch.is_autocast_enabled(x.device.type):  # autocast does not reach into autograd.Functions
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _ColumnLinear.apply(x, weight, bias, group, sequence)


_split = False


@contextlib.contextmanager
def split_backward() -> Iterator[None]:
    """For schedules that compute the gradients of inputs and of weights at different times, around forward and backward.

    autograd runs a Function's whole backward each time, so column_linear is then made of two nodes: the collective is not
    repeated for the weight. Process-wide, because the backward of a device has a thread of its own.
    """
    global _split
    before, _split = _split, True
    try:
        yield
    finally:
        _split = before


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, group, sequence):
        if sequence:
            x = all_gather(x, group, SEQUENCE)
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence = group, sequence
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = dweight = dbias = None
        if needs_x:
            dx = product(dy, weight.t())
            dx = start_reduce_scatter(dx, ctx.group, SEQUENCE) if ctx.sequence else start_all_reduce(dx, ctx.group)
        rows = dy.reshape(-1, dy.shape[-1])
        if needs_weight:
            dweight = rows.t() @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            dbias = rows.sum(0)
        return None if dx is None else wait(dx, ctx.group), dweight, dbias, None, None


def _share(what: str, size: int, group: Group) -> int:
    if size % group.size:
        raise ValueError(f"{what} {size} is not a multiple of the {group.size} ranks of {group}")
    return size // group.size


def _describe(module: ParallelModule) -> str:
    shape = list(module.weight.shape)  # type: ignore[union-attr, arg-type]
    return f"{shape}" if module.group.size == 1 else f"{shape}, share {module.group.rank} of {module.group.size}"
