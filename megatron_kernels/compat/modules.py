"""The extension modules that Megatron-LM's and apex's Python code imports, registered in sys.modules on request."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec

from . import norm_extensions as norms
from . import softmax_extensions as softmax

_FUNCTIONS: dict[str, dict[str, Callable]] = {
    "scaled_upper_triang_masked_softmax_cuda": {"forward": softmax.causal_softmax_forward,
                                                "backward": softmax.causal_softmax_backward},
    "scaled_masked_softmax_cuda": {"forward": softmax.masked_softmax_forward, "backward": softmax.softmax_backward,
                                   "get_batch_per_block": softmax.get_batch_per_block},
    "scaled_softmax_cuda": {"forward": softmax.softmax_forward, "backward": softmax.softmax_backward},
    "generic_scaled_masked_softmax_cuda": {"forward": softmax.masked_softmax_forward, "backward": softmax.softmax_backward},
    "fused_layer_norm_cuda": {function.__name__: function for function in (
        norms.forward, norms.forward_affine, norms.forward_affine_mixed_dtypes, norms.backward, norms.backward_affine,
        norms.rms_forward, norms.rms_forward_affine, norms.rms_forward_affine_mixed_dtypes, norms.rms_backward,
        norms.rms_backward_affine)},
    # Megatron-LM before 2023 built its own; its forward_affine is what apex calls the mixed one.
    "fused_mix_prec_layer_norm_cuda": {"forward_affine": norms.forward_affine_mixed_dtypes,
                                       "backward_affine": norms.backward_affine},
    "fast_layer_norm": {"ln_fwd": norms.ln_fwd, "ln_bwd": norms.ln_bwd},
    "xentropy_cuda": {"forward": softmax.xentropy_forward, "backward": softmax.xentropy_backward},
}
_ORIGIN = "megatron_kernels.compat"
REGISTERED = "registered"
_hidden: dict[str, types.ModuleType] = {}  # what ours stand in front of, by name


def _is_ours(module: types.ModuleType | None) -> bool:
    return getattr(getattr(module, "__spec__", None), "origin", None) == _ORIGIN


def _installed(name: str) -> str | None:
    """Where a module of this name that is not ours comes from, or None."""
    module = sys.modules.get(name)
    if module is not None:
        return getattr(module, "__file__", None) or "sys.modules"
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin or "a namespace package"


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name, f"The functions of the extension module {name}, by megatron_kernels.")
    # find_spec on a module without a spec raises, and libraries ask it whether an extension is there.
    module.__spec__ = ModuleSpec(name, None, origin=_ORIGIN)
    for function_name, function in _FUNCTIONS[name].items():
        setattr(module, function_name, function)
    return module


def install(names: Iterable[str] | None = None, *, replace: bool = False) -> dict[str, str]:
    """Register the extension modules, so that `import scaled_masked_softmax_cuda` and its like give functions of ours.

    Nothing else changes: a top-level `apex` is never pretended to be there. Code that has imported a module before keeps it.

    Args:
        names: which modules; None: all that are known.
        replace: also stand in front of modules that are really installed, which are left alone otherwise.

    Returns:
        For each name "registered", or "kept: " and where the module that is really installed comes from.

    Raises:
        ValueError: a name that is not known.
    """
    names = list(_FUNCTIONS) if names is None else [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in _FUNCTIONS]:
        raise ValueError(f"compat.install: unknown modules {unknown}; known are {', '.join(_FUNCTIONS)}")
    report = {}
    for name in names:
        if _is_ours(sys.modules.get(name)):
            report[name] = REGISTERED
            continue
        origin = _installed(name)
        if origin is not None and not replace:
            report[name] = f"kept: {origin}"
            continue
        if name in sys.modules:
            _hidden[name] = sys.modules[name]
        sys.modules[name] = _module(name)
        report[name] = REGISTERED
    return report


def uninstall() -> list[str]:
    """Take out what `install` registered, and put back what it stood in front of. Returns the names taken out."""
    names = [name for name in _FUNCTIONS if _is_ours(sys.modules.get(name))]
    for name in names:
        del sys.modules[name]
        if name in _hidden:
            sys.modules[name] = _hidden[name]
    _hidden.clear()
    return names
