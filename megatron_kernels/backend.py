"""Which implementation answers for which tensors: the only place where that is decided.

Each implementation registers the same op schemas: the CPU and the CUDA kernels for their devices in one namespace under torch.ops,
others in a namespace of their own. The functions in ops/ ask `choose` for a name at call time and hand it to their backward.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import triton

REFERENCE = "reference"
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs its kernels on the CPU
# name in use() -> (namespace in torch.ops, the device types that it takes)
_NAMESPACES = {"cpu": ("megatron_kernels", ("cpu",)), "cuda": ("megatron_kernels", ("cuda",)),
               "triton": ("megatron_kernels_triton", ("cuda", "cpu") if _INTERPRETED else ("cuda",)),
               "simt": ("megatron_kernels_simt", ("cpu",))}
_FOLDER = Path(__file__).parent
_BUILD = "`pip install --no-build-isolation .` in the source tree"
_selected = threading.local()  # Dynamo traces a threading.local under fullgraph, and cannot trace a ContextVar


class Implementation(NamedTuple):
    """Whether an implementation can run here, and what it is or why it can't."""

    available: bool
    detail: str


def _load(name: str, how: str) -> str:
    """Load a compiled library; why that failed, or nothing."""
    path = _FOLDER / name
    if not path.exists():
        return f"{name} is not built: {how}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name} does not load: {error}"
    return ""


def _load_cuda() -> str:
    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build"
    how = f"run MK_CUDA=1 {_BUILD}, which says what it needs"
    return _cpu_error or _load("_C_cuda.abi3.so", how)


def _load_simt() -> str:
    if _cpu_error:
        return _cpu_error
    if not importlib.util.find_spec("megatron_kernels._simt"):
        return f"_simt is not built: run MK_SIMT=1 {_BUILD}"
    try:
        importlib.import_module("megatron_kernels._simt")
    except ImportError as error:
        return f"_simt does not load: {error}"
    return ""


def _load_triton() -> str:
    if not importlib.util.find_spec("triton"):
        return "the triton package is not installed"
    if not _cpu_error:
        triton.register()
    return _cpu_error


_cpu_error = _load("_C_cpu.abi3.so", f"run {_BUILD}")
_errors = {"cpu": _cpu_error, "cuda": _load_cuda(), "triton": _load_triton(), "simt": _load_simt(), REFERENCE: ""}


def _why_not(name: str) -> str:
    """Why an implementation can't run here, or nothing."""
    if name == "cuda" and not _errors[name] and not torch.cuda.is_available():
        return "no CUDA device"
    if name == "triton" and not _errors[name] and not torch.cuda.is_available() and not _INTERPRETED:
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return _errors[name]


@torch.compiler.assume_constant_result
def _for_gpu(index: int | None) -> str:
    """The implementation that answers for tensors of a GPU: CUDA, unless its library is absent or has no code for the device."""
    if not _errors["triton"] and (_errors["cuda"] or torch.cuda.get_device_capability(index) < (8, 0)):
        return "triton"
    return "cuda"


def _describe(name: str) -> str:
    if name == "cpu":
        return f"vectorised C++, instruction set {torch.ops.megatron_kernels._isa()}"
    if name == "cuda":
        return f"CUDA C++, on {torch.cuda.get_device_name()}"
    if name == "triton":
        return "Triton, " + (f"on {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "interpreted on the CPU")
    return {"simt": "the CUDA kernels run on the CPU under checks, for tests", REFERENCE: "plain PyTorch, any device"}[name]


def implementations() -> dict[str, Implementation]:
    """Every implementation by its name in `use`, with whether it can run here and, where it can't, why."""
    return {name: Implementation(not why, why or _describe(name)) for name in _errors for why in [_why_not(name)]}


class use:
    """Context manager: inside it, every op of this thread runs the named implementation.

    "cpu" and "cuda" take tensors of their device, "triton" those of CUDA and ROCm devices (and CPU ones where TRITON_INTERPRET=1),
    "simt" (the CUDA kernels run on the CPU under checks) CPU tensors, "reference" any. Nests, and is local to the thread. The
    backward of an op uses the implementation that its forward used, also outside the context. Raises ValueError for an unknown
    name, RuntimeError for an implementation that can't run here (`implementations()` says why).
    """

    def __init__(self, name: str):
        if name not in _errors:
            raise ValueError(f"use: unknown implementation {name!r}; known are {', '.join(_errors)}")
        if why := _why_not(name):
            raise RuntimeError(f"use: implementation {name!r} can't run here: {why}")
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
    device = x.device.type
    name = getattr(_selected, "name", None) or (_for_gpu(x.device.index) if device == "cuda" else device)
    if name == REFERENCE:
        return name
    devices = _NAMESPACES[name][1] if name in _NAMESPACES else ()
    if devices and device not in devices:
        raise RuntimeError(f"{op}: implementation {name!r} takes {' or '.join(devices)} tensors, got one on {x.device}")
    if name not in _NAMESPACES or _errors[name]:
        why = f" ({_errors[name]})" if name in _NAMESPACES else ""
        raise RuntimeError(f"{op}: no implementation for device {x.device}{why}; "
                           "megatron_kernels.use('reference') runs on any device")
    return name


def namespace(name: str):
    """The raw ops of an implementation that `choose` named.

    Triton's are Python functions, for which the dispatcher is a detour; it is needed where somebody watches: when compiling, and
    inside a dispatch mode such as that of fake tensors.
    """
    if name == "triton" and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
        return triton.direct
    return getattr(torch.ops, _NAMESPACES[name][0])


def gradient_wanted(*tensors: Tensor | None) -> bool:
    """Whether a call must be recorded. Where not, the raw op does, and an autograd.Function would cost two microseconds more."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def register_fake(op: str) -> Callable:
    """Decorator: the shape function of an op, for every namespace that has it. Without the library there is no schema."""
    def decorator(function: Callable) -> Callable:
        for name in {space for implementation, (space, _) in _NAMESPACES.items() if not _errors[implementation]}:
            torch.library.register_fake(f"{name}::{op}")(function)
        return function
    return decorator
