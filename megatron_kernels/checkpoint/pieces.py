"""Which box of each tensor of the whole model this rank holds.

Tensor parallelism cuts a parameter along one dimension, fully_shard cuts what is left once more, often along the same one, and
neither must divide it. The result is always a box, so that is what travels: a local tensor, its offset, and the full shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..parallel.group import Group
from ..parallel.layout import Share, bare_name, shares


@dataclass(frozen=True)
class Piece:
    """A local tensor, which lies at `offset` in a tensor of `shape`; it shares memory with the parameter it was made of."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def piece_of(name: str, tensor: Tensor, share: Share) -> Piece:
    """The piece that a parameter is, or a tensor that is cut like it. Raises ValueError for placements that are no boxes."""
    offset = [0] * tensor.dim()
    local = tensor
    if isinstance(tensor, DTensor):
        local, size = tensor.to_local(), list(tensor.shape)
        for i, placement in enumerate(tensor.placements):
            if type(placement) is Shard:
                group = Group(tensor.device_mesh.size(i), tensor.device_mesh.get_local_rank(i))
                start, stop = group.range(size[placement.dim])
                offset[placement.dim] += start
                size[placement.dim] = stop - start
            elif not isinstance(placement, Replicate):
                raise ValueError(f"{name}: is placed as {placement}, expected Shard or Replicate")
        if list(local.shape) != size:
            raise ValueError(f"{name}: has the local shape {list(local.shape)}, expected {size} by its placements")
    if share.dim is not None:
        offset[share.dim] += share.range[0]
    return Piece(local.detach(), share.shape, tuple(offset))


def named_tensors(models: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor, Share]]:
    """(canonical name, tensor, share) of every parameter and buffer; a name can come twice, where a rank has two stages that
    share a table."""
    for model in models:
        yield from shares(model)
        for name, buffer in model.named_buffers():
            yield bare_name(name), buffer, Share(tuple(buffer.shape))
