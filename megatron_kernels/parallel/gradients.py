"""What is left to do to the gradients between the backward and the optimizer: sums that no layer makes, and the global norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .collectives import all_reduce, exchange
from .group import Group, group_of
from .layout import shares

DIMENSIONS = ("tp", "dp", "pp")  # the ranks that talk most first


def finish_gradients(*models: nn.Module) -> None:
    """Complete the gradients of a model or of this rank's pipeline stages, in place.

    Call it once after the last backward and before clipping and the optimizer, on every rank, with all the stages that the rank
    has in one call; `Pipeline.step` does so itself. Two sums are made:

    - Under sequence parallelism a replicated parameter (layer norms, biases after a sum, positions) has seen this rank's share of
      the sequence alone: one all-reduce for all of them over the tensor-parallel group (one for each dtype).
    - The tied token table of a pipeline is two parameters: the first stage has the gradient of the embedding, the last that of
      the head. Both get the sum, by an exchange between the two ranks, or locally where one rank has both.

    Data parallelism must have averaged before; gradients of DDP and FSDP2 are taken as they are, local shards included. A model
    that needs neither is left alone. Calling it twice on the same gradients sums twice.

    Raises:
        TypeError: a model that is not, and does not wrap, a GPT2.
        ValueError: the last stage without the first, where the rank has both.
    """
    parts = [part_of(model) for model in models]
    _sum_replicated([part for part in parts if part.sequence_parallel])
    _sum_tied(parts)


def clip_grad_norm_(models: nn.Module | Sequence[nn.Module], max_norm: float, mesh: DeviceMesh | None = None) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most max_norm; returns the norm they had, a float64 scalar.

    The norm is that of the serial model: a replicated parameter, one of a DDP replica and the tied token table count once, shards
    are summed. It is the same on every rank; one all-reduce of one number along each dimension of the mesh. Call it on every
    rank, after `finish_gradients`, with all of its stages.

    Args:
        models: a model, or this rank's pipeline stages; wrapped or not.
        max_norm: the norm to scale down to, as in torch.nn.utils.clip_grad_norm_; inf scales nothing.
        mesh: of all ranks that share the model; None takes the one it was made with.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    parts = [part_of(model) for model in models]
    mesh = next((part.mesh for part in parts), None) if mesh is None else mesh
    groups = {name: group_of(mesh, name) for name in DIMENSIONS}
    gradients, squares = [], []
    for part in parts:
        tied = tied_table(part)
        for _, parameter, share in shares(part):
            if parameter.grad is None:
                continue
            gradient = local(parameter.grad)
            gradients.append(gradient)
            copy = ((share.dim is None and groups["tp"].rank > 0)
                    or (not isinstance(parameter.grad, DTensor) and groups["dp"].rank > 0)
                    or (parameter is tied and not part.is_first))
            if not copy:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                squares.append(torch.linalg.vector_norm(gradient, dtype=wide).double().square())
    device = gradients[0].device if gradients else torch.device(mesh.device_type if mesh is not None else "cpu")
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    for name in DIMENSIONS:
        total = all_reduce(total, groups[name])
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm


def part_of(model: nn.Module) -> Any:
    """The GPT2 that a model is or wraps."""
    for module in model.modules():
        if isinstance(getattr(module, "stage", None), tuple):
            return module
    raise TypeError(f"expected a GPT2, or one wrapped by DDP, FSDP or torch.compile, got {type(model).__name__}")


def tied_table(part: Any) -> nn.Parameter | None:
    """The token table of a first or last pipeline stage that is tied to another stage's; else None."""
    if part.stage[1] == 1 or part.config.untie_embeddings_and_output_weights or not (part.is_first or part.is_last):
        return None
    return part.embedding.word_embeddings.weight


def unfinished(parts: Sequence[Any]) -> Iterator[nn.Parameter]:
    """The parameters whose gradients finish_gradients changes."""
    for part in parts:
        tied = tied_table(part)
        if tied is not None:
            yield tied
        for _, parameter, share in shares(part) if part.sequence_parallel else ():
            if share.dim is None:
                yield parameter


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _sum_replicated(parts: Sequence[Any]) -> None:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for part in parts:
        for _, parameter, share in shares(part):
            if share.dim is None and parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(local(parameter.grad))
    for gradients in by_dtype.values():
        total = all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), parts[0].tensor_group)
        for gradient, summed in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


@torch.no_grad()
def _sum_tied(parts: Sequence[Any]) -> None:
    tables = [(part, table) for part in parts for table in [tied_table(part)] if table is not None and table.requires_grad]
    for _, table in tables:
        if table.grad is None:
            table.grad = torch.zeros_like(table)
    if len(tables) == 2:
        first, last = (local(table.grad) for _, table in tables)  # type: ignore[arg-type]
        last.copy_(first.add_(last))
    elif tables:
        (part, table), = tables
        group: Group = group_of(part.mesh, "pp")
        peer = group.size - 1 if part.is_first else 0
        if peer == group.rank:
            raise ValueError(f"finish_gradients: stage {part.stage[0]} of {part.stage[1]} has a tied token table, and so has the "
                             "first stage, on this same rank, which must be given in the same call")
        gradient = local(table.grad)  # type: ignore[arg-type]
        gradient.add_(exchange(gradient, group, peer))

