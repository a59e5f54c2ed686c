"""Optimizer state under the parameters' names instead of their numbers, so that it can be cut like the parameters.

A state tensor of its parameter's shape is a piece in the same place; a scalar, such as AdamW's step, is replicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..parallel.layout import Share
from .errors import CheckpointError
from .pieces import Piece, piece_of

PREFIX = "optimizer."
Names = dict[int, tuple[str, Share]]  # id of a parameter -> its name and share


def _parameters(optimizer: Optimizer, names: Names) -> Iterator[tuple[dict[str, Any], Tensor, str, Share]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(f"{type(optimizer).__name__}: a parameter of shape {list(parameter.shape)} is in none of the "
                                      "models")
            yield group, parameter, *names[id(parameter)]


def state_of(optimizers: Iterable[Optimizer], names: Names) -> tuple[dict[str, Piece], list[dict[str, Any]]]:
    """The tensors of the optimizers' states, and the rest as plain values: groups of names with their options, and numbers.

    Raises CheckpointError for state that is neither of its parameter's shape nor a scalar where the parameter is cut.
    """
    pieces: dict[str, Piece] = {}
    groups: list[dict[str, Any]] = []
    for optimizer in optimizers:
        for group, parameter, name, share in _parameters(optimizer, names):
            head = {"optimizer": type(optimizer).__name__, "options": _options(group)}
            same = next((known for known in groups if {**known, **head} == known), None)
            if same is None:
                groups.append(same := {**head, "names": [], "values": {}})
            if name in same["names"]:
                continue
            same["names"].append(name)
            for slot, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    same["values"].setdefault(name, {})[slot] = value
                elif value.shape == parameter.shape:
                    pieces[f"{PREFIX}{name}.{slot}"] = piece_of(f"{slot} of {name}", value, share)
                elif value.dim() == 0 or (share.dim is None and not isinstance(parameter, DTensor)):
                    pieces[f"{PREFIX}{name}.{slot}"] = piece_of(f"{slot} of {name}", value, Share(tuple(value.shape)))
                else:
                    raise CheckpointError(f"{type(optimizer).__name__}: {slot} of {name} has shape {list(value.shape)}, expected "
                                          f"{list(parameter.shape)} or a scalar: it could not be cut like the parameter")
    return pieces, groups


def merge(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of several ranks, those with the same options joined."""
    merged: list[dict[str, Any]] = []
    for group in groups:
        same = next((known for known in merged if all(known[key] == group[key] for key in ("optimizer", "options"))), None)
        if same is None:
            merged.append(same := {**group, "names": [], "values": {}})
        same["names"] = sorted({*same["names"], *group["names"]})
        same["values"].update(group["values"])
    return merged


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options; a learning rate that is a tensor as a number."""
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()
            if key not in ("params", "param_names")}


class Restoring:
    """The state that an optimizer will have: empty tensors to read into, and then to put in place."""

    def __init__(self, label: str, optimizer: Optimizer, names: Names, groups: list[dict[str, Any]], metadata: Metadata):
        self.optimizer = optimizer
        self.pieces: list[tuple[str, Piece]] = []
        self.state: dict[int, dict[str, Any]] = {}
        self.groups: list[dict[str, Any]] = []
        of_name = {name: group for group in groups for name in group["names"]}
        slots: dict[str, dict[str, TensorStorageMetadata]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata):
                name, _, slot = key.removeprefix(PREFIX).rpartition(".")
                slots.setdefault(name, {})[slot] = entry
        first: dict[int, tuple[str, dict[str, Any]]] = {}
        for number, (group, parameter, name, share) in enumerate(_parameters(optimizer, names)):
            saved = of_name.get(name)
            kind = type(optimizer).__name__
            if saved is None:
                raise CheckpointError(f"{label}: {name} has no optimizer state; without optimizers the weights alone are loaded")
            if saved["optimizer"] != kind:
                raise CheckpointError(f"{label}: was saved with {saved['optimizer']}, expected {kind}, the optimizer given")
            other, options = first.setdefault(id(group), (name, saved["options"]))
            if options != saved["options"]:
                raise CheckpointError(f"{label}: {other} and {name}, of one group of this {kind}, have different options in the "
                                      f"checkpoint: {options} and {saved['options']}")
            state = self.state[number] = dict(saved["values"].get(name, {}))
            for slot, entry in slots.get(name, {}).items():
                state[slot] = value = _empty(parameter, share, entry)
                like = share if value.shape == parameter.shape else Share(tuple(entry.size))
                piece = piece_of(name, value, like)
                self.pieces.append((f"{PREFIX}{name}.{slot}", piece))
                if piece.shape != tuple(entry.size):
                    raise CheckpointError(f"{label}: {slot} of {name} has shape {list(entry.size)}, expected {list(piece.shape)}")
        for group in optimizer.param_groups:
            options = first[id(group)][1] if group["params"] else _options(group)
            self.groups.append({key: torch.as_tensor(value, dtype=now.dtype, device=now.device)
                                if isinstance(now := group.get(key), Tensor) else value for key, value in options.items()})

    def apply(self) -> None:
        """Hand the state to the optimizer, which moves it to where it wants it."""
        numbers = iter(range(len(self.state)))
        groups = [{**options, "params": [next(numbers) for _ in group["params"]]}
                  for options, group in zip(self.groups, self.optimizer.param_groups, strict=True)]
        self.optimizer.load_state_dict({"state": {number: state for number, state in self.state.items() if state},
                                        "param_groups": groups})


def _empty(parameter: Tensor, share: Share, entry: TensorStorageMetadata) -> Tensor:
    """A tensor to read state into: like the parameter, where the saved one was, else whole."""
    if tuple(entry.size) != share.shape:
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    return torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
