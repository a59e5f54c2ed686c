"""Who computes together: the mesh of all ranks, and the group along one of its dimensions.

Ranks are numbered with tensor parallelism innermost, then data, then pipeline parallelism, so that the group that talks most has
neighbouring ranks. A group of one rank is the serial case: its collectives do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DIMENSIONS = ("pp", "dp", "tp")


@dataclass(frozen=True)
class Group:
    """The ranks that share a tensor. `name` is the process group's, `label` what messages call it."""

    size: int = 1
    rank: int = 0
    name: str = ""
    label: str = "alone"
    ranks: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return f"group '{self.label}' (ranks {', '.join(map(str, self.ranks))})"

    @property
    def process_group(self) -> Any:
        """The torch.distributed process group; None for a group of one that has none."""
        return dist.distributed_c10d._resolve_process_group(self.name) if self.name else None  # type: ignore[arg-type]

    def range(self, size: int, rank: int | None = None) -> tuple[int, int]:
        """[start, stop) of a rank's share of `size` rows: equal shares, rounded up, as torch.chunk makes them."""
        rank = self.rank if rank is None else rank
        share = -(-size // self.size)
        return min(rank * share, size), min((rank + 1) * share, size)


ALONE = Group()


def group_of(what: Group | DeviceMesh | dist.ProcessGroup | None, dimension: str = "tp") -> Group:
    """The group meant by `what`: a process group, the named dimension of a mesh, or None for this process alone.

    A mesh of one dimension without a name is taken as that dimension; a mesh that has names but not this one means one rank.
    """
    if what is None:
        return ALONE
    if isinstance(what, Group):
        return what
    label = dimension
    if isinstance(what, DeviceMesh):
        names = what.mesh_dim_names
        if names is None and what.ndim > 1:
            raise ValueError(f"mesh: needs mesh_dim_names among {DIMENSIONS} when it has {what.ndim} dimensions")
        if names is not None and dimension not in names:
            return ALONE
        process_group = what.get_group(dimension) if names is not None else what.get_group()
    elif isinstance(what, dist.ProcessGroup):
        process_group, label = what, getattr(what, "group_desc", "") or dimension
    else:
        raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh or None, got {type(what).__name__}")
    return Group(process_group.size(), process_group.rank(), process_group.group_name, label,
                 tuple(dist.get_process_group_ranks(process_group)))


def make_mesh(*, tensor_parallel: int = 1, pipeline_parallel: int = 1, data_parallel: int | None = None,
              device_type: str | None = None) -> DeviceMesh:
    """A mesh with the dimensions "pp", "dp", "tp" over all ranks that torchrun started.

    Args:
        tensor_parallel, pipeline_parallel, data_parallel: sizes; data_parallel None takes the ranks that are left.
        device_type: "cuda" (NCCL) or "cpu" (gloo); None takes "cuda" where there is one. On CUDA the device of
            this rank's number on its node is made the current one.

    Raises ValueError for sizes whose product is not the number of ranks. Initialises torch.distributed where nobody has yet.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    if device_type == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank(dist.get_rank() % torch.cuda.device_count()))
    world = dist.get_world_size()
    for name, size in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel),
                       ("data_parallel", data_parallel)):
        if size is not None and size < 1:
            raise ValueError(f"make_mesh: {name} must be at least 1, got {size}")
    data_parallel = max(world // (tensor_parallel * pipeline_parallel), 1) if data_parallel is None else data_parallel
    if pipeline_parallel * data_parallel * tensor_parallel != world:
        raise ValueError(f"make_mesh: pipeline_parallel {pipeline_parallel} x data_parallel {data_parallel} x tensor_parallel "
                         f"{tensor_parallel} is {pipeline_parallel * data_parallel * tensor_parallel} ranks, but there are {world}")
    return init_device_mesh(device_type, (pipeline_parallel, data_parallel, tensor_parallel), mesh_dim_names=DIMENSIONS)


def agreed_seed(mesh: DeviceMesh | None) -> int:
    """A seed from torch's default generator; on a mesh every rank gets that of the first."""
    drawn = torch.randint(2**62, ())
    if mesh is not None:
        drawn = drawn.to(mesh.device_type)
        for dimension in range(mesh.ndim):
            process_group = mesh.get_group(dimension)
            dist.broadcast(drawn, dist.get_global_rank(process_group, 0), process_group)
    return int(drawn)
