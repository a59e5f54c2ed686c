"""A checkpoint in memory: the configuration, and tensors that come into being one at a time when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..models.config import BertConfig, GPT2Config, ModelConfig
from .errors import CheckpointError

C = TypeVar("C", GPT2Config, BertConfig)


@dataclass(frozen=True)
class Entry:
    """A tensor not yet assembled: what it will be, where it comes from, and how to make it.

    read(start, stop) gives that range of dimension `dim`, the one that tensor parallelism cuts, and touches nothing else.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    origin: str
    dim: int = 0

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Canonical name -> tensor, assembled on each access and not kept.

    Tensors can be views of memory-mapped files: copy one before writing into it. `entries` tells shapes and dtypes without
    touching the data.
    """

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        return entry.read(0, entry.shape[entry.dim])

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """[start, stop) of a tensor along dim; along the dimension that tensor parallelism cuts, nothing else is read."""
        entry = self.entries[name]
        return entry.read(start, stop) if dim == entry.dim else self[name].narrow(dim, start, stop - start)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"LazyTensors({len(self)} tensors, {sum(entry.nbytes for entry in self.entries.values())} bytes)"


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2 or a BERT read from disk, or about to be written.

    `tensors` maps canonical names (Megatron-core's) to tensors of the full model, [out, in]; QKV rows are [heads, 3, head_dim],
    and the vocabulary has config.padded_vocab_size rows. `iteration` is the training step, where the file tells it.
    The rest describes the files for people: `format` and `details` (label -> value), `notes` what a user should know.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    iteration: int | None = None
    format: str = "memory"
    source: Path | None = None
    details: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def expect(self, kind: type[C]) -> C:
        """The configuration; raises CheckpointError unless it is of that class."""
        if not isinstance(self.config, kind):
            reader = {"BERT": "Bert", "GPT-2": "GPT2"}[self.config.model]
            raise CheckpointError(f"{self.source or 'checkpoint'}: a {self.config.model}, expected a {kind.model}; "
                                  f"models.{reader} is what reads it")
        return self.config

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """[start, stop) of a tensor along dim; a lazy one is assembled no further than that."""
        if isinstance(self.tensors, LazyTensors):
            return self.tensors.part(name, dim, start, stop)
        return self.tensors[name].narrow(dim, start, stop - start)

    def meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without assembling it where `tensors` is lazy."""
        if isinstance(self.tensors, LazyTensors):
            entry = self.tensors.entries[name]
            return entry.shape, entry.dtype
        tensor = self.tensors[name]
        return tuple(tensor.shape), tensor.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the word embeddings, which stands for the checkpoint's."""
        return self.meta("embedding.word_embeddings.weight")[1]


def rows_of_heads(grouped: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of grouped [heads, 3, head_dim, ...] seen as [heads * 3 * head_dim, ...]: only their heads are copied."""
    rows = 3 * grouped.shape[2]
    first = start // rows
    return grouped[first:-(-stop // rows)].flatten(0, 2).narrow(0, start - first * rows, stop - start)
