"""Which part of the whole model each parameter of this rank is: the one place where wrappers' names are taken off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .group import ALONE, Group
from .layers import ParallelModule

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module)\.")  # DDP's, torch.compile's, checkpointing's


@dataclass(frozen=True)
class Share:
    """A parameter's place in the whole: `dim` of it is cut over `group`, `size` in full; dim None means replicated."""

    shape: tuple[int, ...]
    dim: int | None = None
    group: Group = ALONE

    @property
    def range(self) -> tuple[int, int]:
        """[start, stop) along dim that this rank holds."""
        assert self.dim is not None
        return self.group.range(self.shape[self.dim])

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of the full tensor: a view."""
        if self.dim is None:
            return whole
        start, stop = self.range
        return whole.narrow(self.dim, start, stop - start)


def bare_name(name: str) -> str:
    """The name of a parameter without what wrappers put into it."""
    return _WRAPPERS.sub("", name)


def shares(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Share]]:
    """(canonical name, parameter, its share) for every parameter of this rank's part of a model, wrapped or not."""
    for prefix, module in model.named_modules():
        splits = module.splits if isinstance(module, ParallelModule) else {}
        for name, parameter in module.named_parameters(recurse=False):
            full = bare_name(f"{prefix}.{name}" if prefix else name)
            shape = list(parameter.shape)
            if name in splits and module.group.size > 1:  # type: ignore[union-attr]
                dim, shape[splits[name][0]] = splits[name]
                yield full, parameter, Share(tuple(shape), dim, module.group)  # type: ignore[arg-type]
            else:
                yield full, parameter, Share(tuple(shape))
