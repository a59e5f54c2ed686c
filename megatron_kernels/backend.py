"""Which implementation answers for which tensors: the only place where that is decided.

Each implementation registers the same op schemas in a namespace of its own under torch.ops. The functions in ops/ ask
`choose` for the namespace at call time and hand it to their backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

REFERENCE = "reference"
_NAMESPACES = {"cpu": "megatron_kernels"}  # name in use() -> namespace in torch.ops
_selected = threading.local()  # Dynamo traces a threading.local under fullgraph, and cannot trace a ContextVar


class Implementation(NamedTuple):
    """Whether an implementation can run here, and what it is or why it can't."""

    available: bool
    detail: str


def _load_cpu() -> str | None:
    """Load the compiled library; return why that failed, or None."""
    path = Path(__file__).with_name("_C_cpu.abi3.so")
    if not path.exists():
        return f"{path.name} is not built: run `pip install --no-build-isolation .` in the source tree"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


_cpu_error = _load_cpu()


def implementations() -> dict[str, Implementation]:
    """Every implementation by its name in `use`, with whether it can run here and, where it can't, why."""
    cpu = Implementation(False, _cpu_error) if _cpu_error else Implementation(
        True, f"vectorised C++, instruction set {torch.ops.megatron_kernels._isa()}")
    return {"cpu": cpu, REFERENCE: Implementation(True, "plain PyTorch, any device")}


class use:
    """Context manager: inside it, every op of this thread runs the named implementation.

    Nests, and is local to the thread. The backward of an op uses the implementation that its forward used, also outside the
    context. Raises ValueError for an unknown name, RuntimeError for an implementation that can't run here (`implementations()`
    says why).
    """

    def __init__(self, name: str):
        if name not in (*_NAMESPACES, REFERENCE):
            raise ValueError(f"use: unknown implementation {name!r}; known are {', '.join(implementations())}")
        if name == "cpu" and _cpu_error:
            raise RuntimeError(f"use: implementation {name!r} can't run here: {_cpu_error}")
        self.name = name
        self.outer: list[str | None] = []

    def __enter__(self) -> use:
        self.outer.append(getattr(_selected, "name", None))
        _selected.name = self.name
        return self

    def __exit__(self, *exc) -> None:
        _selected.name = self.outer.pop()


def choose(op: str, x: Tensor) -> str:
    """The name of the implementation that answers for x: the one selected by `use`, else the one of x's device."""
    name = getattr(_selected, "name", None) or x.device.type
    if name == REFERENCE:
        return name
    if name not in _NAMESPACES:
        raise RuntimeError(f"{op}: no implementation for device {x.device}; megatron_kernels.use('reference') runs on any device")
    if x.device.type != "cpu":
        raise RuntimeError(f"{op}: implementation {name!r} does not run on device {x.device}")
    if _cpu_error:
        raise RuntimeError(f"{op}: {_cpu_error}")
    return name


def namespace(name: str):
    """The torch.ops namespace in which the named implementation registered its ops."""
    return getattr(torch.ops, _NAMESPACES[name])


def register_fake(op: str) -> Callable:
    """Decorator: the shape function of an op, for every namespace that has it. Without the library there is no schema."""
    def decorator(function: Callable) -> Callable:
        if not _cpu_error:
            torch.library.register_fake(f"megatron_kernels::{op}")(function)
        return function
    return decorator
