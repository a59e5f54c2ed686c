"""The whole state of a training run: written by all ranks together, read back at any other parallel size.

    save_training("run", model, optimizer, step=1000)        # run/step_00001000
    step = load_training("run", model, optimizer).step       # of the last one

Parameters and optimizer state go through torch.distributed.checkpoint as boxes of full tensors, so that every rank reads the parts
that it has now, whoever wrote them. A checkpoint is filled under a hidden name and renamed when all ranks are done.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ..models.config import GPT2Config
from ..models.gpt2 import GPT2
from ..parallel.failures import failures
from ..parallel.group import DIMENSIONS, group_of
from ..parallel.random import SharedGenerator
from .atomic import commit
from .errors import CheckpointError
from .gathering import check_complete
from .optimizers import Names, Restoring, merge, state_of
from .pieces import Piece, named_tensors, piece_of
from .reading import first_line, read_torch_file
from .storage import read_metadata, read_pieces, verify_checksums, write_checksums, write_pieces
from .together import ranks_of

SETTINGS = "training.pt"
FORMAT = 1
_STEP = re.compile(r"step_(\d+)")
_SHAPING = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings", "vocab_size",
            "padded_vocab_size", "untie_embeddings_and_output_weights", "layernorm_epsilon", "gelu_approximate")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What load_training gives back: `random` says whether the random states were restored, `notes` what a user should know."""

    step: int
    extra: Any
    path: Path
    random: bool
    notes: tuple[str, ...] = ()


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step in a run's directory; a checkpoint itself; None where there is none."""
    root = Path(directory)
    if (root / SETTINGS).is_file():
        return root
    steps = {int(match[1]): path for path in (root.iterdir() if root.is_dir() else ())
             if (match := _STEP.fullmatch(path.name)) and path.is_dir()}
    return steps[max(steps)] if steps else None


def save_training(directory: str | os.PathLike[str], models: nn.Module | Sequence[nn.Module],
                  optimizers: Optimizer | Sequence[Optimizer] | None = None, *, step: int, extra: Any = None,
                  mesh: DeviceMesh | None = None) -> Path:
    """Write directory/step_NNNNNNNN: parameters, optimizer state, random states, and `extra`.

    All ranks of the mesh call this, with one directory on a file system that they share. A run that is killed meanwhile leaves
    the earlier checkpoints as they were, and a hidden directory that the next call removes; a checkpoint of the same step is
    replaced at the very end.

    Args:
        directory: of one run; made where it is missing.
        models: this rank's model or stages, wrapped by DDP, fully_shard or torch.compile or not.
        optimizers: one or several, over parameters of the models.
        step: number of the checkpoint, from 0.
        extra: numbers, strings, tensors, and containers of them, such as a learning-rate scheduler's state_dict; the first rank's
            is kept.
        mesh: all ranks that train together; None takes the model's, and without one this process is alone.

    Returns the checkpoint's path. Raises on every rank: CheckpointError for what can't be written, parallel.CollectiveError when
    a rank has stopped.
    """
    models, optimizers, mesh = _arguments(models, optimizers, mesh)
    if step < 0:
        raise ValueError(f"save_training: step must be at least 0, got {step}")
    root = Path(os.path.realpath(directory))
    with failures(mesh), ranks_of(mesh) as ranks:
        pieces, about = ranks.guarded(lambda: _collect(models, optimizers, ranks.rank, mesh))
        abouts = ranks.everywhere(lambda: about)
        config = abouts[0]["config"]
        if config is not None:
            check_complete(GPT2Config(**config), {name for each in abouts for name in each["names"]})
        settings = {"format": FORMAT, "step": step, "extra": extra, "config": config,
                    "layout": [each["layout"] for each in abouts], "generators": [each["generators"] for each in abouts],
                    "optimizers": merge(group for each in abouts for group in each["optimizers"])}
        temporary = ranks.first(lambda: _begin(root, step))
        try:
            write_pieces(temporary, pieces, ranks)
            ranks.first(lambda: _write_settings(temporary / SETTINGS, settings))
            write_checksums(temporary, ranks)
            ranks.first(lambda: commit(temporary, _folder(root, step)))
        except BaseException:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return _folder(root, step)


def load_training(directory: str | os.PathLike[str], models: nn.Module | Sequence[nn.Module],
                  optimizers: Optimizer | Sequence[Optimizer] | None = None, *, mesh: DeviceMesh | None = None,
                  verify: bool = True) -> Restored:
    """Read a checkpoint of save_training into models and optimizers of any parallel size; the other arguments are as there.

    directory: of the run, for its last checkpoint, or a checkpoint. Without optimizers their state is left in the file. Random
    states are restored where the parallel layout is that of the saving run, and else left alone, with a note. verify=True reads
    every file once, each rank its share, and compares checksums before anything is overwritten.

    Raises on every rank: CheckpointError for a checkpoint that is missing, damaged, or of another configuration, dtype or
    optimizer; parallel.CollectiveError when a rank has stopped.
    """
    models, optimizers, mesh = _arguments(models, optimizers, mesh)
    with failures(mesh), ranks_of(mesh) as ranks:
        path = ranks.first(lambda: _existing(Path(directory)))
        if verify:
            verify_checksums(path, ranks)
        layout = ranks.everywhere(lambda: _layout(models, mesh))
        plan = ranks.guarded(lambda: _plan(path, models, optimizers, ranks.rank, layout))
        read_pieces(path, plan.pieces, ranks)
        for target, source in plan.copies:
            target.copy_(source)
        for restoring in plan.restoring:
            restoring.apply()
        saved = plan.settings
        if saved["layout"] == layout:
            notes = _restore_random(models, plan.pieces, saved["generators"][ranks.rank], ranks.rank)
        else:
            notes = [f"random states were left alone: saved on {_describe(saved['layout'])}, loaded on {_describe(layout)}; "
                     "parallel.seed sets new ones"]
        return Restored(saved["step"], saved["extra"], path, saved["layout"] == layout, tuple(notes))


def _arguments(models: Any, optimizers: Any, mesh: DeviceMesh | None) -> tuple[list[nn.Module], list[Optimizer], DeviceMesh | None]:
    models = [models] if isinstance(models, nn.Module) else list(models)
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers or ())
    if mesh is None:
        mesh = next((model.mesh for model in _gpt2s(models) if model.mesh is not None), None)
    return models, optimizers, mesh


def _gpt2s(models: Iterable[nn.Module]) -> list[GPT2]:
    """The models inside of wrappers, where they are this package's."""
    return [module for model in models for module in model.modules() if isinstance(module, GPT2)]


def _layout(models: list[nn.Module], mesh: DeviceMesh | None) -> dict[str, Any]:
    """What a rank's random states depend on."""
    return {**{name: group_of(mesh, name).size for name in DIMENSIONS}, "stages": [list(model.stage) for model in _gpt2s(models)],
            "sequence parallel": any(model.sequence_parallel for model in _gpt2s(models))}


def _describe(layout: list[dict[str, Any]]) -> str:
    first = layout[0]
    sizes = " x ".join(f"{name} {first[name]}" for name in DIMENSIONS)
    return f"{sizes}{', sequence parallel' if first['sequence parallel'] else ''}, stages {[rank['stages'] for rank in layout]}"


def _names(models: list[nn.Module]) -> Names:
    return {id(tensor): (name, share) for name, tensor, share in named_tensors(models)}


def _collect(models: list[nn.Module], optimizers: list[Optimizer], rank: int,
             mesh: DeviceMesh | None) -> tuple[dict[str, Piece], dict[str, Any]]:
    """This rank's pieces, and what is to be known about it."""
    pieces: dict[str, Piece] = {}
    for name, tensor, share in named_tensors(models):
        pieces.setdefault(f"model.{name}", piece_of(name, tensor, share))
    configs = [dataclasses.asdict(model.config) for model in _gpt2s(models)]
    about: dict[str, Any] = {"config": configs[0] if configs else None, "layout": _layout(models, mesh),
             "names": [key.removeprefix("model.") for key in pieces]}
    state, about["optimizers"] = state_of(optimizers, _names(models))
    random, about["generators"] = _random_state(models, rank)
    return {**pieces, **state, **random}, about


def _folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def _begin(root: Path, step: int) -> Path:
    """A hidden directory to fill, after those that killed runs have left are gone."""
    target = _folder(root, step)
    if target.exists() and not (target / SETTINGS).is_file():
        raise CheckpointError(f"{target}: exists and is no training checkpoint")
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".step_*.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=root))


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        torch.save(settings, path)
        torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(f"save_training: extra must be made of numbers, strings, tensors, lists, tuples and dictionaries "
                              f"({first_line(error)})") from error


def _existing(directory: Path) -> Path:
    path = latest(directory)
    if path is None:
        raise CheckpointError(f"{directory}: no training checkpoint, expected step_NNNNNNNN")
    return Path(os.path.realpath(path))


class _Plan(NamedTuple):
    settings: dict[str, Any]
    pieces: dict[str, Piece]  # to be read into
    copies: list[tuple[Tensor, Tensor]]  # target and source, for a tensor that this rank has twice
    restoring: list[Restoring]


def _plan(path: Path, models: list[nn.Module], optimizers: list[Optimizer], rank: int, layout: list[dict[str, Any]]) -> _Plan:
    """All that can be checked before anything is overwritten."""
    settings = read_torch_file(path / SETTINGS)
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else None
        raise CheckpointError(f"{path / SETTINGS}: of format {found}, expected {FORMAT}")
    metadata = read_metadata(path)
    _check_config(path, settings["config"], models)
    pieces: dict[str, Piece] = {}
    copies: list[tuple[Tensor, Tensor]] = []

    def add(key: str, piece: Piece) -> None:
        if key in pieces:
            copies.append((piece.tensor, pieces[key].tensor))
        pieces.setdefault(key, piece)

    for name, tensor, share in named_tensors(models):
        piece = piece_of(name, tensor, share)
        entry = metadata.state_dict_metadata.get(f"model.{name}")
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path}: {name} is missing")
        if tuple(entry.size) != piece.shape or entry.properties.dtype != tensor.dtype:
            raise CheckpointError(f"{path}: {name} is {list(entry.size)} of {entry.properties.dtype}, expected "
                                  f"{list(piece.shape)} of {tensor.dtype}")
        add(f"model.{name}", piece)
    restoring = [Restoring(str(path), optimizer, _names(models), settings["optimizers"], metadata) for optimizer in optimizers]
    for each in restoring:
        for key, piece in each.pieces:
            add(key, piece)
    if settings["layout"] == layout:
        pieces.update(_empty_random(metadata, rank))
    return _Plan(settings, pieces, copies, restoring)


def _check_config(path: Path, saved: dict[str, Any] | None, models: list[nn.Module]) -> None:
    for model in _gpt2s(models):
        for field in _SHAPING if saved is not None else ():
            if saved.get(field) != (own := getattr(model.config, field)):  # type: ignore[union-attr]
                raise CheckpointError(f"{path}: of another configuration: its {field} is {saved[field]!r}, "  # type: ignore[index]
                                      f"that of the model {own!r}")


def _generators(models: list[nn.Module]) -> list[SharedGenerator]:
    return [model.shared_generator for model in _gpt2s(models)]


def _devices(models: list[nn.Module]) -> dict[str, torch.device]:
    return {"cpu": torch.device("cpu"), **{tensor.device.type: tensor.device for _, tensor, _ in named_tensors(models)}}


def _random_state(models: list[nn.Module], rank: int) -> tuple[dict[str, Piece], list[int]]:
    """The states of torch's default generators and of the models' shared ones, and the seeds of the latter."""
    states = {}
    for kind, device in _devices(models).items():
        states[kind] = torch.get_rng_state() if kind == "cpu" else torch.get_device_module(device).get_rng_state(device)
    for number, generator in enumerate(_generators(models)):
        if (state := generator.get_state()) is not None:
            states[f"shared-{number}.{_kind(models)}"] = state
    pieces = {f"random.{rank}.{key}": Piece(state, tuple(state.shape), (0,)) for key, state in states.items()}
    return pieces, [generator.seed for generator in _generators(models)]


def _kind(models: list[nn.Module]) -> str:
    """Where the models' shared generators draw."""
    return list(_devices(models))[-1]


def _empty_random(metadata: Metadata, rank: int) -> dict[str, Piece]:
    return {key: Piece(torch.empty(entry.size, dtype=torch.uint8), tuple(entry.size), (0,))
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith(f"random.{rank}.") and isinstance(entry, TensorStorageMetadata)}


def _restore_random(models: list[nn.Module], pieces: dict[str, Piece], seeds: list[int], rank: int) -> list[str]:
    """Restore what can be; a note for each state of a kind of device that this run does not use."""
    states = {key.removeprefix(f"random.{rank}."): piece.tensor for key, piece in pieces.items() if key.startswith("random.")}
    devices = _devices(models)
    for number, (generator, seed) in enumerate(zip(_generators(models), seeds, strict=True)):
        generator.manual_seed(seed)
        if (state := states.pop(f"shared-{number}.{_kind(models)}", None)) is not None:
            generator.set_state(state, devices[_kind(models)])
    for kind, device in devices.items():
        if (state := states.pop(kind, None)) is not None:
            torch.set_rng_state(state) if kind == "cpu" else torch.get_device_module(device).set_rng_state(state, device)
    return [f"the random state of {key} was left alone: the model is on {_kind(models)}" for key in states]
