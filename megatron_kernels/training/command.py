"""`megatron-kernels train`: the options as a command line."""

from __future__ import annotations

from typing import Any

from ..options import signature
from .options import Options


def train(**given: Any) -> int:
    """Train a GPT-2, from scratch or from a checkpoint of Megatron-LM or Hugging Face, on one process or under torchrun.

    Texts are tokenised once into memory-mapped files. With --save and --resume a run that was stopped goes on bit for bit;
    SIGTERM and Ctrl-C finish the iteration, save, and exit with 143 and 130.
    """
    from ..parallel import CollectiveError
    from .loop import run

    try:
        return run(Options(**given))
    except CollectiveError as error:
        raise ConnectionError(str(error)) from error


train.__signature__ = signature(Options)  # type: ignore[attr-defined]
