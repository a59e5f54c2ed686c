"""Which samples an iteration trains on: a pure function of seed, number of the iteration, and global batch size.

Sample i is tokens i * seq_length to (i + 1) * seq_length, that last one included: one is the first of the next sample too, so that
every token but the first is predicted once. The samples are shuffled anew for each epoch, and epochs follow each other without a
gap. Iteration k (from 0) takes the positions k * global_batch and on, whatever the parallel layout: piece a of replica r begins at
(a * replicas + r) * micro_batch. Nothing has to be stored to go on from iteration k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .tokens import DataError, Tokens


@dataclass(frozen=True)
class Batches:
    """How a global batch is shared out: `pieces` micro batches on each of the replicas, of which this is number `replica`."""

    global_batch: int
    micro_batch: int
    replicas: int = 1
    replica: int = 0

    @property
    def pieces(self) -> int:
        return self.global_batch // (self.micro_batch * self.replicas)

    def positions(self, iteration: int) -> list[range]:
        """The positions of this replica's pieces in the shuffled samples."""
        first = [iteration * self.global_batch + (piece * self.replicas + self.replica) * self.micro_batch
                 for piece in range(self.pieces)]
        return [range(start, start + self.micro_batch) for start in first]


@dataclass
class Samples:
    """Samples first to first + count of the tokens; seed None keeps them in their order."""

    tokens: Tokens
    seq_length: int
    count: int
    first: int = 0
    seed: int | None = None
    _order: dict[int, np.ndarray] = field(default_factory=dict, repr=False)  # of one epoch

    def __getitem__(self, positions: range) -> Tensor:
        """[len(positions), seq_length + 1] token ids, int64."""
        rows = []
        for position in positions:
            start = (self.first + self.number(position)) * self.seq_length
            rows.append(self.tokens.read(start, start + self.seq_length + 1))
        return torch.from_numpy(np.stack(rows))

    def number(self, position: int) -> int:
        """Which sample is at this position; position // count is the epoch."""
        epoch, within = divmod(position, self.count)
        if self.seed is None:
            return within
        if epoch not in self._order:
            self._order.clear()
            # NumPy promises never to change what RandomState draws.
            self._order[epoch] = np.random.RandomState([self.seed, epoch]).permutation(self.count)
        return int(self._order[epoch][within])


def split(tokens: Tokens, seq_length: int, fraction: float, seed: int) -> tuple[Samples, Samples | None]:
    """Samples to train on, shuffled, and the last `fraction` of them to score, in their order.

    Raises DataError where there are too few tokens for either.
    """
    total = max(len(tokens) - 1, 0) // seq_length
    held_out = round(total * fraction)
    names = ", ".join(str(file.path) for file in tokens.files[:3]) + (", ..." if len(tokens.files) > 3 else "")
    if total - held_out < 1:
        raise DataError(f"{names}: {len(tokens)} tokens are too few for one sample of {seq_length} + 1")
    train = Samples(tokens, seq_length, total - held_out, seed=seed)
    if not fraction:
        return train, None
    if not held_out:
        raise DataError(f"{names}: --valid-fraction {fraction:g} of {total} samples is none")
    return train, replace(train, first=train.count, count=held_out, seed=None, _order={})
