"""The one error that reading and writing checkpoints raises for what the user can put right."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint, a configuration or a destination is unusable; the message is one line naming the file, key or shard."""
