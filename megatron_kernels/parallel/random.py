"""Random numbers: one generator that the ranks of a tensor-parallel group share, and each rank's own.

Dropout of a replicated tensor must drop the same elements on every rank of the group; dropout of a sharded one must not repeat
itself from rank to rank. torch's default generator is each rank's own (scaled_dot_product_attention draws from it and takes no
other), and the model carries a shared one for replicated tensors. `seed` sets both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from .group import group_of


class SharedGenerator:
    """A torch.Generator per device type, made when first used, in the same state on every rank of a tensor-parallel group."""

    def __init__(self, seed: int = 0):
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> None:
        self.seed = seed
        self._generator: torch.Generator | None = None

    def on(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def get_state(self) -> Tensor | None:
        return None if self._generator is None else self._generator.get_state()

    def set_state(self, state: Tensor | None, device: torch.device | None = None) -> None:
        """Go back to what get_state said; None is the state before the first use. device: for a generator not yet made."""
        if state is None:
            self._generator = None
        else:
            (self.on(device) if device is not None else self._made()).set_state(state)

    def _made(self) -> torch.Generator:
        if self._generator is None:
            raise ValueError("SharedGenerator: set_state needs the device when the generator has not been used")
        return self._generator


def dropout(x: Tensor, p: float, training: bool, shared: SharedGenerator | None) -> Tensor:
    """torch's dropout; drawn from `shared` where every rank of the group must drop the same elements."""
    if not training or p == 0.0:
        return x
    if shared is None:
        return F.dropout(x, p)
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=shared.on(x.device))
    return x * keep.div_(1 - p) if p < 1 else x * keep


def replay(shared: SharedGenerator) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """context_fn for torch.utils.checkpoint: the layer that runs again draws from `shared` what it drew the first time."""
    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        before: list[Tensor | None] = []

        @contextlib.contextmanager
        def first():
            before.append(shared.get_state())
            yield

        return first(), _Again(shared, before)
    return contexts


class _Again:
    """Entered whenever the layer runs again: a schedule that splits the backward does it for inputs and for weights."""

    def __init__(self, shared: SharedGenerator, before: list[Tensor | None]):
        self.shared, self.before = shared, before

    def __enter__(self) -> None:
        made = self.shared._generator
        self.now, self.device = self.shared.get_state(), None if made is None else made.device
        self.shared.set_state(self.before[0], self.device)

    def __exit__(self, *_: object) -> None:
        self.shared.set_state(self.now, self.device)


def seed(value: int, mesh: DeviceMesh | None = None, model: torch.nn.Module | None = None) -> None:
    """Seed what dropout draws from: torch's default generators differently on every rank of the mesh, and the shared generator of
    `model` alike within a tensor-parallel group, differently between data-parallel replicas and pipeline stages."""
    tp, dp, pp = (group_of(mesh, name) for name in ("tp", "dp", "pp"))
    torch.manual_seed((value * 1_000_003 + (pp.rank * dp.size + dp.rank) * tp.size + tp.rank) % 2**63)
    for module in model.modules() if model is not None else ():
        if isinstance(generator := getattr(module, "shared_generator", None), SharedGenerator):
            stage, _ = getattr(module, "stage", (pp.rank, pp.size))  # a rank may have several
            generator.manual_seed((value * 1_000_003 + 500_009 * 2**20 + stage * dp.size + dp.rank) % 2**63)
