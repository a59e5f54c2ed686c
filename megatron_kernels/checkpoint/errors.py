"""The error that reading and writing checkpoints raises for what the user can put right."""

from __future__ import annotations

from typing import Any

from ..models.config import GPT2Config, ModelConfig


class CheckpointError(ValueError):
    """A checkpoint, a configuration or a destination is unusable; the message is one line naming the file, key or shard."""


class MissingConfigurationError(CheckpointError):
    """The checkpoint has no `args`, and its shapes don't tell the rest.

    `config` is what the shapes do tell, as fields of `kind`, the class of its configuration. Its heads are as few as the
    tensor-parallel shards allow and every row of the vocabulary is a class: enough to look at the checkpoint, not to compute
    with it.
    """

    def __init__(self, message: str, config: dict[str, Any], kind: type[ModelConfig] = GPT2Config) -> None:
        super().__init__(message)
        self.config, self.kind = config, kind
