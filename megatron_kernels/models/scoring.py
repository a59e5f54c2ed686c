"""Given next tokens: the loss of each, and whether it is the one the model would have chosen. Evaluation asks nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linear import project
from ..parallel.collectives import all_gather
from ..parallel.group import Group

if TYPE_CHECKING:
    from .gpt2 import GPT2

_ROWS = 512  # of logits at a time: those of whole windows would be larger than everything else together


@torch.no_grad()
def score(self: GPT2, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score targets that stand where they are predicted. Only the scored positions go through the last norm and the head.

    Args:
        input_ids: [b, s], int64 or int32. Positions count from 0; shorter rows are padded on the right with any token.
        targets: [b, s], int64 or int32: the token to follow each position. They are not shifted, unlike `forward`'s labels. -100
            is not scored.

    Returns:
        For the n scored positions, row by row: the loss [n], float32 (float64 for float64), and whether the target is the most
        likely class [n], bool (of equally likely ones, the first). Rows that pad the vocabulary are no classes. The same on every
        rank of a mesh. Dropout is off, and the model is left in the mode it was in.

    Raises:
        ValueError: as `forward`; targets of another shape or dtype; a stage of a pipeline.
        RuntimeError: on a CPU, a target that is neither -100 nor a class. Elsewhere its loss is NaN.
    """
    if not (self.is_first and self.is_last):
        raise ValueError(f"GPT2.score: needs the whole model, this is stage {self.stage[0]} of {self.stage[1]}")
    self._check(input_ids, None, None, None, 0, None, False)
    if targets.shape != input_ids.shape or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"GPT2.score: targets must be {list(input_ids.shape)} of int64 or int32, got {list(targets.shape)} of "
                         f"{str(targets.dtype).removeprefix('torch.')}")
    was_training = self.training
    self.eval()
    try:
        return _score(self, input_ids, targets.reshape(-1))
    finally:
        self.train(was_training)


def _score(model: GPT2, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    scored = (targets != -100).nonzero().squeeze(1)
    targets = targets[scored].to(input_ids.device, torch.int64)
    scored = scored.to(input_ids.device)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    x, table = model._embed(input_ids, positions, False)  # without a backward there is little to share along the sequence
    x, _ = model.decoder(x)
    rows = model._before_head(x.flatten(0, 1)[scored][None], False, None)[0]
    losses = [rows.new_empty(0, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)]
    hits = [torch.empty(0, dtype=torch.bool, device=rows.device)]
    for piece, target in zip(rows.split(_ROWS), targets.split(_ROWS), strict=True):
        if not target.numel():
            continue
        logits = project(piece, model._table(table))
        losses.append(model.loss_of_logits(logits, target, "none"))
        hits.append(_most_likely(logits, model.tensor_group, **model._vocabulary()) == target)
    return torch.cat(losses), torch.cat(hits)


def _most_likely(logits: Tensor, group: Group, vocab_start: int, vocab_size: int, ignore_index: int) -> Tensor:
    """The class of the largest logit, of this rank's columns [n, columns] and the other ranks': [n], int64.

    Each rank sends its largest and where it is. Classes are exact in float64.
    """
    columns = max(min(vocab_size - vocab_start, logits.shape[1]), 0)
    if columns:
        top, index = logits[:, :columns].max(-1)
    else:  # this rank has nothing but padding
        top, index = logits.new_full(logits.shape[:1], -math.inf), torch.zeros(logits.shape[0], device=logits.device)
    if group.size == 1:
        return index
    parts = all_gather(torch.stack([top.double(), (index + vocab_start).double()])[None], group, 0)  # [ranks, 2, n]
    first = parts[:, 0].argmax(0, keepdim=True)  # of equal ones the lowest rank's, which is the lowest class
    return parts[:, 1].gather(0, first)[0].long()
