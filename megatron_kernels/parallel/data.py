"""Data parallelism: torch's DDP or FSDP2 over the mesh's "dp" dimension, once all ranks have been seen to have the same weights."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .gradients import local, part_of, tied_table
from .layout import shares

_BLOCK = 2**22  # elements that a checksum widens at a time


def data_parallel(model: nn.Module, mesh: DeviceMesh, kind: str = "ddp", **options: Any) -> nn.Module:
    """Replicate a GPT2, or a pipeline stage, over the mesh's dimension "dp": each replica is given its part of the batch.

    Gradients become the mean over the replicas, while the backward still runs: of replicas with equally many scored labels they
    are those of the serial model on the whole batch. Collective over the whole mesh.

    Args:
        model: a GPT2 made with this mesh, its weights already loaded.
        mesh: has the dimension "dp".
        kind: "ddp", torch's DistributedDataParallel: every replica holds everything, gradients are all-reduced in buckets; or
            "fsdp", FSDP2: parameters, gradients and optimizer state are shared out, and every layer, as well as what is outside
            the layers, is gathered when needed.
        options: for DistributedDataParallel or fully_shard, such as bucket_cap_mb or mp_policy.

    Returns:
        The DDP wrapper, or for FSDP2 the model itself, its parameters now DTensors. Optimizers come after.

    Raises ValueError for another kind, a mesh without "dp", and as `check_same_weights`.
    """
    if kind not in ("ddp", "fsdp"):
        raise ValueError(f"data_parallel: kind must be 'ddp' or 'fsdp', got {kind!r}")
    if "dp" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"data_parallel: the mesh must have the dimension 'dp', got {mesh.mesh_dim_names}")
    check_same_weights(model, mesh)
    if kind == "ddp":
        # init_sync sends the first rank's weights around: they have just been seen to be the same
        return DistributedDataParallel(model, process_group=mesh.get_group("dp"), **{"init_sync": False, **options})
    for layer in part_of(model).decoder.layers:
        fully_shard(layer, mesh=mesh["dp"], **options)
    fully_shard(model, mesh=mesh["dp"], **options)
    return model


@contextlib.contextmanager
def no_sync(*models: nn.Module) -> Iterator[None]:
    """Inside, backwards only add to this rank's gradients; for all forwards and backwards of a step but the last.

    Of models that data_parallel wrapped; others accumulate anyway. FSDP2 keeps the gradients of whole parameters until then.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            if isinstance(model, DistributedDataParallel):
                stack.enter_context(model.no_sync())
            elif isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(False)
                stack.callback(model.set_requires_gradient_sync, True)
        yield


def check_same_weights(models: nn.Module | Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Compare what must be equal between ranks, bit for bit by checksums: every parameter between data-parallel replicas,
    replicated ones within a tensor-parallel group, and a pipeline's tied token table between its first and last stage.

    Collective over the mesh. Shards of FSDP2 are not compared between replicas, tensors on the meta device not at all.

    Raises ValueError, the same on every rank: the parameter, the group, the ranks that differ from the others.
    """
    rows = [row for model in ([models] if isinstance(models, nn.Module) else models) for row in _rows(model)]
    problems = []
    for label, name, found in _compared(_gather({dist.get_rank(): rows}, mesh), mesh):
        common, _ = Counter(value for _, value in found).most_common(1)[0]  # of equally many the first rank's
        others = [rank for rank, value in found if value != common]
        if others:
            same = [rank for rank, value in found if value == common]
            problems.append(f"{name} within group '{label}' (ranks {_list(sorted({rank for rank, _ in found}))}): "
                            f"{_ranks(others)} from {_ranks(same)}")
    if problems:
        more = f"; and {len(problems) - 1} more such differences" if len(problems) > 1 else ""
        raise ValueError(f"check_same_weights: weights that must be equal differ: {problems[0]}{more}")


class _Row(NamedTuple):
    name: str
    stage: int
    value: tuple[Any, ...]  # shape, dtype, checksum
    sharded: bool  # by FSDP2
    replicated: bool  # over the tensor-parallel group
    tied: bool


def _rows(model: nn.Module) -> list[_Row]:
    part = part_of(model)
    tied = tied_table(part)
    return [_Row(name, part.stage[0], (tuple(local(parameter).shape), str(parameter.dtype), checksum(local(parameter.detach()))),
                 isinstance(parameter, DTensor), share.dim is None, parameter is tied)
            for name, parameter, share in shares(model) if not parameter.is_meta]


def checksum(x: Tensor) -> int:
    """A number that any change of one element changes: the bits of the elements as integers, times odd weights, modulo 2^64."""
    bits = x.detach().contiguous().view(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    total = 0
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start:start + _BLOCK].long()
        weights = torch.arange(start, start + block.numel(), device=x.device).mul_(0x9E3779B1).bitwise_or_(1)
        total += int(weights.mul_(block).sum())
    return total % 2**64


def _gather(mine: dict[int, list[_Row]], mesh: DeviceMesh) -> dict[int, list[_Row]]:
    """What every rank of the mesh has, by rank: gathered along one dimension after the other."""
    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        found: list[Any] = [None] * group.size()
        dist.all_gather_object(found, mine, group=group)
        mine = {rank: rows for one in found for rank, rows in one.items()}
    return dict(sorted(mine.items()))


def _compared(gathered: dict[int, list[_Row]], mesh: DeviceMesh) -> Iterator[tuple[str, str, list[tuple[int, Any]]]]:
    """(group's label, parameter, [(rank, value)]) for all that must be equal; the value is None where a rank lacks it."""
    names = mesh.mesh_dim_names or ("tp",)
    for label in names:
        groups: dict[tuple, list[int]] = {}
        for rank in gathered:
            at = (mesh.mesh == rank).nonzero()[0].tolist()
            groups.setdefault(tuple(i for i, name in zip(at, names, strict=True) if name != label), []).append(rank)
        for ranks in groups.values():
            if label == "pp":
                tables = [(rank, row) for rank in ranks for row in gathered[rank] if row.tied]
                for name in dict.fromkeys(row.name for _, row in tables):
                    yield label, name, [(rank, row.value) for rank, row in tables if row.name == name]
                continue
            rows = {rank: {(row.stage, row.name): row for row in gathered[rank]} for rank in ranks}
            for key in dict.fromkeys(key for rank in ranks for key in rows[rank]):
                found = [rows[rank].get(key) for rank in ranks]
                row = next(row for row in found if row is not None)
                if row.replicated if label == "tp" else label == "dp" and not row.sharded:
                    yield label, row.name, [(rank, row and row.value) for rank, row in zip(ranks, found, strict=True)]


def _list(ranks: Any) -> str:
    return ", ".join(map(str, ranks))


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_list(ranks)}"
