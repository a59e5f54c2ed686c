"""Steps that all ranks of a mesh take together, and that fail on all of them when one fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """All ranks of a mesh, or this process alone."""

    size: int = 1
    rank: int = 0
    process_group: Any = None

    def everywhere(self, call: Callable[[], T]) -> list[T]:
        """call() on every rank, and what it gave on each. Raises on all of them what it raised on the first that failed."""
        failure, mine = None, None
        try:
            mine = call()
        except Exception as error:  # whatever it is, the others must not wait
            failure = error
        message = None if failure is None else str(_readable(failure))
        results: list[Any] = [(mine, message)]
        if self.size > 1:
            results = [None] * self.size
            dist.all_gather_object(results, (mine, message), self.process_group)
        if failure is not None:
            raise _readable(failure) from failure
        for rank, (_, message) in enumerate(results):
            if message is not None:
                raise CheckpointError(f"rank {self.global_rank(rank)}: {message}")
        return [value for value, _ in results]

    def guarded(self, call: Callable[[], T]) -> T:
        """This rank's call(); raises on every rank when it fails on one."""
        mine: list[T] = []
        self.everywhere(lambda: mine.append(call()))
        return mine[0]

    def first(self, call: Callable[[], T]) -> T:
        """call() on the first rank, and its result on every one."""
        return self.everywhere(lambda: call() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def tell(self, value: T) -> T:
        """The first rank's value, on every rank."""
        box: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, self.global_rank(0), self.process_group)
        return box[0]

    def global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.process_group, rank) if self.process_group is not None else rank


def _readable(error: Exception) -> Exception:
    if isinstance(error, OSError):
        return CheckpointError(f"{error.filename or 'checkpoint'}: {error.strerror or error}")
    return error


@contextlib.contextmanager
def ranks_of(mesh: DeviceMesh | None) -> Iterator[Ranks]:
    """The ranks of a mesh; a mesh that is neither the whole world nor one of its own groups gets a group for the while."""
    if mesh is None or mesh.size() == 1:
        yield Ranks()
        return
    made = None
    if mesh.size() == dist.get_world_size():
        group: Any = dist.group.WORLD
    elif mesh.size() in mesh.shape:
        group = mesh.get_group(mesh.shape.index(mesh.size()))
    else:
        group = made = dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    try:
        yield Ranks(dist.get_world_size(group), dist.get_rank(group), group)
    finally:
        if made is not None:
            dist.destroy_process_group(made)
