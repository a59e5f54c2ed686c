"""The collectives on local tensors, and the paper's f and g made of them.

f and g (Megatron-LM, arXiv 1909.08053, figure 3) are conjugate: what is an all-reduce in the forward of one is the identity in
the other's, and the backward swaps them. With sequence parallelism (arXiv 2205.05198, section 4.2.2) all-gather and reduce-scatter
along the sequence take their places. Everything goes through torch's functional collectives, which torch.compile traces; a group
of one rank returns its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group import Group

SEQUENCE = 1  # the dimension of [batch, seq, hidden] that sequence parallelism cuts


class CollectiveError(RuntimeError):
    """A collective failed: as a rule another rank of the group has stopped."""


def _run(what: str, group: Group, call: Callable, *args: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return call(*args)
    try:
        return call(*args)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise CollectiveError(f"{what} over {group} failed on rank {group.ranks[group.rank]}: {reason}; another rank of the group "
                              "has probably stopped, see its own error") from error


def start_all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over the group, not yet there: hand it to `wait` before use."""
    return _run("all-reduce", group, torch.ops._c10d_functional.all_reduce, x.contiguous(), "sum", group.name)


def start_reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's share, along dim, of the sum over the group; not yet there."""
    if x.shape[dim] % group.size:
        raise ValueError(f"reduce-scatter over {group}: dimension {dim} of {list(x.shape)} is not a multiple of {group.size}")
    shares = x.unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    return _run("reduce-scatter", group, torch.ops._c10d_functional.reduce_scatter_tensor, shares.flatten(0, 1), "sum",
                group.size, group.name)


def wait(x: Tensor, group: Group) -> Tensor:
    """What a start_ function began, complete."""
    return _run("waiting for a collective", group, torch.ops._c10d_functional.wait_tensor, x)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over the group, a new tensor."""
    return x if group.size == 1 else wait(start_all_reduce(x, group), group)


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's share, along dim, of the sum over the group."""
    return x if group.size == 1 else wait(start_reduce_scatter(x, group, dim), group)


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """The ranks' tensors, of one shape, joined along dim in rank order."""
    if group.size == 1:
        return x
    whole = _run("all-gather", group, torch.ops._c10d_functional.all_gather_into_tensor, x.contiguous(), group.size, group.name)
    return wait(whole, group).unflatten(0, (group.size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def broadcast(x: Tensor, group: Group, source: int) -> Tensor:
    """x of the group's rank `source`, written into every other rank's x."""
    if group.size > 1:
        _run("broadcast", group, dist.broadcast, x, group.ranks[source], group.process_group)
    return x


def exchange(x: Tensor, group: Group, peer: int) -> Tensor:
    """The x of the group's rank `peer`, which calls this with our rank; the other ranks do nothing."""
    theirs = torch.empty_like(x, memory_format=torch.contiguous_format)
    process_group, to = group.process_group, group.ranks[peer]
    operations = [dist.P2POp(dist.isend, x.contiguous(), to, process_group), dist.P2POp(dist.irecv, theirs, to, process_group)]

    def both() -> Tensor:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return theirs

    return _run(f"exchange with rank {to}", group, both)


def send(x: Tensor, group: Group, peer: int) -> None:
    """x to the group's rank `peer`, which calls `receive`."""
    _run(f"send to rank {group.ranks[peer]}", group, dist.send, x.contiguous(), group.ranks[peer], group.process_group)


def receive(x: Tensor, group: Group, peer: int) -> Tensor:
    """What the group's rank `peer` sends, written into x."""
    _run(f"receive from rank {group.ranks[peer]}", group, dist.recv, x, group.ranks[peer], group.process_group)
    return x


def share_of(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's share of a replicated tensor, along dim: a view."""
    start, stop = group.range(x.shape[dim])
    return x.narrow(dim, start, stop - start)


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """f: the identity; its gradient is summed over the group, each rank having used x for a part of the result."""
    return x if group.size == 1 else _Copy.apply(x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """g: the sum over the group; its gradient goes to every rank unchanged."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """f of sequence parallelism: [b, s / size, h] -> [b, s, h]; the gradient is summed over the group and shared out."""
    return x if group.size == 1 else _GatherSequence.apply(x, group)


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """g of sequence parallelism: the sum over the group, of which each rank keeps its share [b, s / size, h]."""
    return x if group.size == 1 else _ScatterSequence.apply(x, group)


def gather_columns(x: Tensor, group: Group, size: int) -> Tensor:
    """[..., this rank's share of size columns] -> [..., size] on every rank; the gradient is this rank's columns of it."""
    return x if group.size == 1 else _GatherColumns.apply(x, group, size)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return all_reduce(dx, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather(x, group, SEQUENCE)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return reduce_scatter(dx, ctx.group, SEQUENCE), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return reduce_scatter(x, group, SEQUENCE)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return all_gather(dy, ctx.group, SEQUENCE), None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, size):
        ctx.range = start, stop = group.range(size)
        share, dim = -(-size // group.size), x.dim() - 1
        if x.shape[-1] != stop - start:
            raise ValueError(f"gather_columns over {group}: expected {stop - start} of {size} columns, got {list(x.shape)}")
        if x.shape[-1] < share:  # the last ranks have less when size is not a multiple: all-gather wants one shape
            x = torch.nn.functional.pad(x, (0, share - x.shape[-1]))
        return all_gather(x, group, dim)[..., :size].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        start, stop = ctx.range
        return dy[..., start:stop], None, None
