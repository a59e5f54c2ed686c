"""What becomes of the others when a rank stops: one kind of error, which says who waited for whom."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .collectives import CollectiveError
from .group import DIMENSIONS, group_of

# gloo, the object collectives and DDP's reducer raise plain RuntimeErrors, which only their text tells from others.
_SIGNS = re.compile(r"gloo|NCCL|c10d|ProcessGroup|TCPStore|Connection (?:closed|reset|refused)|Broken pipe|Timed out waiting")


@contextlib.contextmanager
def failures(mesh: DeviceMesh | None) -> Iterator[None]:
    """Inside, what torch raises when another rank is gone becomes a CollectiveError naming this rank's place and its groups.

    To be put around a training step or loop: torch's own collectives (DDP's, fully_shard's, a pipeline's) tell neither. What a
    rank must do then is end, or tear the process groups down: as long as it lives, others may wait for it.
    """
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:
        if mesh is None or not is_of_another_rank(error):
            raise
        groups = [group_of(mesh, name) for name in DIMENSIONS] if mesh.mesh_dim_names else [group_of(mesh)]
        groups = [group for group in groups if group.size > 1]
        place = ", ".join(f"{group.label} {group.rank}" for group in groups)
        reason = str(error).strip().partition("\n")[0]
        raise CollectiveError(f"rank {dist.get_rank()} ({place}) lost another rank of {' or of '.join(map(str, groups))}: "
                              f"{reason}") from error


def is_of_another_rank(error: BaseException) -> bool:
    """Whether an error says that communication failed."""
    return isinstance(error, (CollectiveError, dist.DistError)) or (isinstance(error, RuntimeError)
                                                                    and bool(_SIGNS.search(str(error))))
