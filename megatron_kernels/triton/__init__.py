"""The ops as Triton kernels: for GPUs without the CUDA library, AMD's included, and a second writing of the same contract.

`register` enters them as torch.ops.megatron_kernels_triton, with the schemas of the compiled library. The modules beside this one
import triton, so each is imported when one of its ops first runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

OPS = {name: name.removesuffix("_").rsplit("_", 1)[0] for name in (
    "scaled_masked_softmax_forward", "scaled_masked_softmax_backward", "bias_gelu_forward", "bias_gelu_backward",
    "layer_norm_forward", "layer_norm_backward", "cross_entropy_forward", "cross_entropy_partial", "cross_entropy_backward",
    "cross_entropy_backward_")}
_library: torch.library.Library | None = None


class _Direct:
    """The functions themselves, by op name: without the dispatcher, which costs more than the rest of a call."""

    def __getattr__(self, name: str):
        function = getattr(module_of(name), name)
        if torch.cuda.device_count() > 1:
            function = on_device_of_tensor(function)
        setattr(self, name, function)
        return function


def on_device_of_tensor(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be the one of the tensors."""
    def guarded(*arguments):
        if arguments[0].get_device() in (-1, torch.cuda.current_device()):  # -1 is the CPU
            return function(*arguments)
        with torch.cuda.device(arguments[0].device):
            return function(*arguments)
    return guarded


direct = _Direct()


def module_of(op: str) -> ModuleType:
    """The module that has the op."""
    return importlib.import_module(f"{__name__}.{OPS[op]}")


def register() -> None:
    """Define the ops under the schemas that the compiled library has, for CUDA and ROCm tensors and interpreted CPU ones."""
    global _library
    _library = torch.library.Library("megatron_kernels_triton", "DEF")
    for op in OPS:
        schema = getattr(torch.ops.megatron_kernels, op).default._schema
        _library.define(str(schema).split("::", 1)[1])
        for key in ("CUDA", "CPU"):
            _library.impl(op, lambda *arguments, op=op: getattr(direct, op)(*arguments), key)
