"""The weights files of Hugging Face directories: finding tensors in them without reading them, and writing them one by one.

Which keys there are, and what they mean, is a matter of the model: `huggingface.py` for GPT-2, `bert.py` for BERT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .reading import first_line, read_torch_file
from .safetensors_file import write_safetensors
from .settings import read_json

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPE_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A tensor of a weights file: shape and dtype at once, the data when asked."""

    label: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Made:
    """A tensor to be written: its shape and dtype, and how to make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def weight_files(directory: Path) -> tuple[list[Path], str]:
    """The files that hold the weights, and the name of the one that says so; raises CheckpointError where there are none."""
    for name in WEIGHT_FILES:
        path = directory / name
        if not path.exists():
            continue
        if not name.endswith(".index.json"):
            return [path], name
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{path}: expected 'weight_map' from keys to file names")
        files = sorted(set(weight_map.values()))
        for file in files:
            if os.path.basename(file) != file or file in ("", ".", ".."):
                raise CheckpointError(f"{path}: refused, a shard's name leaves the directory: {file!r}")
            if not (directory / file).exists():
                raise CheckpointError(f"{path}: missing shard {file}")
        return [directory / file for file in files], name
    raise CheckpointError(f"{directory}: config.json without weights; expected one of {', '.join(WEIGHT_FILES)}")


def locate(files: list[Path], bare_name: Callable[[str], str | None]) -> dict[str, Source]:
    """bare_name(key) -> where that key's tensor lies; what bare_name gives None for is left out."""
    found: dict[str, Source] = {}
    for path in files:
        for source in _safetensors_sources(path) if path.suffix == ".safetensors" else _pickle_sources(path):
            if (bare := bare_name(source.key)) is None:
                continue
            if bare in found:
                raise CheckpointError(f"{source.label}: {source.key} is also in {found[bare].label} as {found[bare].key}")
            found[bare] = source
    return found


def _safetensors_sources(path: Path) -> list[Source]:
    from safetensors import safe_open

    try:
        file = safe_open(path, framework="pt")
        sources = []
        for key in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
            part = file.get_slice(key)
            sources.append(Source(str(path), key, tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype()),
                                   partial(file.get_tensor, key)))
        return sources
    except Exception as error:  # SafetensorError is no public base of what the library raises
        raise CheckpointError(f"{path}: truncated or damaged safetensors file ({first_line(error)})") from None


def _pickle_sources(path: Path) -> list[Source]:
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return [Source(str(path), str(key), tuple(value.shape), value.dtype, lambda value=value: value)  # type: ignore[misc]
            for key, value in content.items() if isinstance(value, Tensor)]


def check_source(source: Source | None, key: str, shape: tuple[int, ...], directory: Path) -> Source:
    """The source of a tensor, which must be there, of that shape and of a known dtype: CheckpointError otherwise."""
    if source is None:
        raise CheckpointError(f"{directory}: {key} is missing from the weights")
    if source.shape != shape:
        raise CheckpointError(f"{source.label}: {source.key} has shape {list(source.shape)}, expected {list(shape)}")
    if source.dtype is None or source.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{source.label}: {source.key} is of an unsupported dtype, expected one of "
                              f"{', '.join(DTYPE_NAMES.values())}")
    return source


def write_weights(root: Path, tensors: dict[str, Made], limit: int, track: Callable[[list[str]], Iterable[str]]) -> None:
    """model.safetensors in `root`, or several files of at most `limit` bytes with an index."""
    shards = _plan(tensors, limit)
    for file, keys in shards.items():
        write_safetensors(root / file, {key: (tensors[key].shape, tensors[key].dtype) for key in keys},
                          lambda key: tensors[key].make(), track)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(root / "model.safetensors.index.json", {
            "metadata": {"total_size": total}, "weight_map": {key: file for file, keys in shards.items() for key in keys}})


def _plan(tensors: dict[str, Made], limit: int) -> dict[str, list[str]]:
    """File name -> keys, in order, each file within `limit` bytes unless a single tensor exceeds it."""
    if limit < 1:
        raise CheckpointError(f"max_shard_size must be at least 1 byte, got {limit}")
    groups: list[list[str]] = [[]]
    used = 0
    for key, tensor in tensors.items():
        if groups[-1] and used + tensor.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, 1)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
