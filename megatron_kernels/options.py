"""Command lines made of dataclasses, one field an option. No torch is needed."""

from __future__ import annotations

import dataclasses
import inspect
from enum import Enum
from typing import Any, get_type_hints

import typer


class DType(str, Enum):
    """The dtypes of weights on disk and of products."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Attention(str, Enum):
    """Which attention: the package's softmax, or torch's scaled_dot_product_attention."""

    softmax = "softmax"
    sdpa = "sdpa"


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """What a field is annotated with; `panel` is the heading that --help shows it under."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def signature(options: type) -> inspect.Signature:
    """The fields of options as parameters, which is where typer looks for them."""
    hints = get_type_hints(options, include_extras=True)
    parameters = []
    for field in dataclasses.fields(options):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default,
                                            annotation=hints[field.name]))
    return inspect.Signature(parameters)
