"""`megatron-kernels train`: the options as a command line."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

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


def _signature() -> inspect.Signature:
    """The fields of Options as parameters, which is where typer looks for the options."""
    hints = get_type_hints(Options, include_extras=True)
    parameters = []
    for field in dataclasses.fields(Options):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default,
                                            annotation=hints[field.name]))
    return inspect.Signature(parameters, return_annotation=int)


train.__signature__ = _signature()  # type: ignore[attr-defined]
