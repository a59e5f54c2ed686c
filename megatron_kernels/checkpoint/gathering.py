"""Writing a model that is spread over the ranks of a mesh: one full tensor at a time comes to the first rank, which writes.

The first rank names the tensor that its writer asks for, and the ranks that hold boxes of it send them; so any writer serves, and
an error of it ends all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..models.config import ModelConfig
from . import names
from .errors import CheckpointError
from .pieces import Piece, named_tensors, piece_of
from .tensors import Checkpoint, Entry, LazyTensors
from .together import Ranks, ranks_of

Box = tuple[int, tuple[int, ...], tuple[int, ...]]  # rank, offset, size
_NOTHING: tuple[str | None, str] = (None, "")  # what is told: the tensor that is wanted, or None at the end and what went wrong


def write_together(models: Sequence[nn.Module], config: ModelConfig, mesh: DeviceMesh | None,
                   write: Callable[[Checkpoint], None]) -> None:
    """Call write(checkpoint) on the first rank of the mesh, with tensors that are gathered when it asks for them.

    All ranks call this, with the stages of a pipeline that they have. Raises CheckpointError on every rank when `write` fails or
    when a parameter of the configuration is on no rank.
    """
    with ranks_of(mesh) as ranks:
        own: dict[str, Piece] = {}
        for name, tensor, share in named_tensors(models):
            own.setdefault(name, piece_of(name, tensor, share))
        held = ranks.everywhere(lambda: {name: (piece.shape, piece.tensor.dtype, piece.offset, tuple(piece.tensor.shape))
                                         for name, piece in own.items()})
        boxes: dict[str, list[Box]] = {}
        metas: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for rank, pieces in enumerate(held):
            for name, (shape, dtype, offset, size) in pieces.items():
                metas.setdefault(name, (shape, dtype))
                here = boxes.setdefault(name, [])
                if math.prod(size) and all(offset != other for _, other, _ in here):  # the first of the replicas sends
                    here.append((rank, offset, size))
        check_complete(config, metas)
        if ranks.rank == 0:
            device = next(iter(own.values())).tensor.device
            entries = {name: Entry(shape, dtype, partial(_gather, name, metas[name], boxes[name], own, ranks, device), name)
                       for name, (shape, dtype) in metas.items()}
            try:
                write(Checkpoint(config, LazyTensors(entries)))
            except BaseException as error:
                ranks.tell((None, f"{error}" or type(error).__name__))
                raise
            ranks.tell(_NOTHING)
            return
        wanted, failure = ranks.tell(_NOTHING)
        while wanted is not None:
            _send(boxes[wanted], own.get(wanted), ranks)
            wanted, failure = ranks.tell(_NOTHING)
        if failure:
            raise CheckpointError(f"rank {ranks.global_rank(0)}: {failure}")


def check_complete(config: ModelConfig, found: object) -> None:
    """Raise CheckpointError unless every parameter of the model is among the names found on all ranks."""
    for parameter in names.parameters(config):
        if parameter.canonical not in found:  # type: ignore[operator]
            raise CheckpointError(f"{parameter.canonical} is on no rank: the stages of a pipeline are saved together, each rank "
                                  "giving all of its own, over a mesh that has them all")


def _gather(name: str, meta: tuple[tuple[int, ...], torch.dtype], boxes: list[Box], own: dict[str, Piece], ranks: Ranks,
            device: torch.device, start: int, stop: int) -> Tensor:
    if ranks.size == 1 and own[name].tensor.shape == meta[0]:
        return own[name].tensor.narrow(0, start, stop - start)
    ranks.tell((name, ""))
    whole = torch.empty(meta[0], dtype=meta[1], device=device)
    for rank, offset, size in boxes:
        if rank == ranks.rank:
            part = own[name].tensor
        else:
            part = torch.empty(size, dtype=meta[1], device=device)
            dist.recv(part, ranks.global_rank(rank), ranks.process_group)
        whole[tuple(slice(at, at + length) for at, length in zip(offset, size, strict=True))] = part
    return whole.narrow(0, start, stop - start)


def _send(boxes: list[Box], piece: Piece | None, ranks: Ranks) -> None:
    for rank, offset, _ in boxes:
        if rank == ranks.rank and piece is not None and piece.offset == offset:
            dist.send(piece.tensor.contiguous(), ranks.global_rank(0), ranks.process_group)
