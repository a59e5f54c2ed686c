"""Hugging Face GPT-2 directories, read and written.

Read: config.json with model.safetensors or pytorch_model.bin, sharded or not, with or without the `transformer.` prefix; the
causal masks that old files carry are ignored. Written: config.json, generation_config.json and safetensors, tensor by tensor.
Conv1D matrices are [in, out], the transpose of Megatron's; the rows of c_attn are [3, heads, head_dim].
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

from ..models.config import GPT2Config
from . import names
from .atomic import atomic_directory
from .errors import CheckpointError
from .reading import first_line, read_torch_file
from .safetensors_file import write_safetensors
from .settings import known_by_huggingface, known_by_user, make_config, read_json, to_huggingface
from .tensors import Checkpoint, Entry, LazyTensors, rows_of_heads
from .tokenizer import Tokenizer

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DEFAULT_SHARD_BYTES = 5 * 10**9
_HF_DEFAULTS = {"vocab_size": 50257, "max_position_embeddings": 1024, "hidden_size": 768, "num_layers": 12,
                "num_attention_heads": 12}  # what Hugging Face's own GPT2Config takes for absent fields
_DTYPE_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _from_huggingface(tensor: Tensor, parameter: names.Parameter, heads: int, start: int, stop: int) -> Tensor:
    """A tensor of GPT2LMHeadModel as the canonical one, [out, in] with QKV rows [heads, 3, head_dim]: the range along the
    dimension that tensor parallelism cuts. Everything before the copy at the end is a view of the file."""
    if parameter.conv1d:
        tensor = tensor.T
    if parameter.is_qkv:
        return rows_of_heads(tensor.unflatten(0, (3, heads, -1)).transpose(0, 1), start, stop).contiguous()
    return tensor.narrow(parameter.split or 0, start, stop - start).contiguous()


def _to_huggingface(tensor: Tensor, parameter: names.Parameter, config: GPT2Config, dtype: torch.dtype) -> Tensor:
    """The inverse of `_from_huggingface`, of a whole tensor, with the padding rows of the vocabulary dropped."""
    if parameter.is_qkv:
        tensor = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    if parameter.symbols[0] == "v":
        tensor = tensor[:config.vocab_size]
    if parameter.conv1d:
        tensor = tensor.T
    return tensor.to(dtype).contiguous()


def load(directory: Path, config: GPT2Config | str | Path | None = None) -> Checkpoint:
    """Read a Hugging Face GPT-2 directory; see `checkpoint.load`."""
    label = str(directory / "config.json")
    known = known_by_huggingface(read_json(directory / "config.json"), label)
    user, user_label = known_by_user(config)
    for name, value in user.items():
        if name in known and known[name] != value and not name.endswith(("dropout", "std")):
            raise CheckpointError(f"{user_label} says {name} = {value!r}, but {label} says {known[name]!r}")
        known[name] = value
    for name, default in _HF_DEFAULTS.items():
        known.setdefault(name, default)
    files, kind = _weight_files(directory)
    found = _locate(files)
    settings = make_config(known, label)
    entries = {parameter.canonical: _entry(parameter, found, settings, directory) for parameter in names.parameters(settings)}
    expected = {parameter.huggingface for parameter in names.parameters(settings)} | {"lm_head.weight"}
    if unknown := sorted(set(found) - expected):
        raise CheckpointError(f"{found[unknown[0]].label}: unknown key {unknown[0]}; expected the parameters of a GPT-2 with "
                              f"{settings.num_layers} layers (config.json)")
    return Checkpoint(settings, LazyTensors(entries), None, "huggingface", directory,
                      {"layout": f"directory, {len(files)} file(s): {directory}", "weights": kind})


def _weight_files(directory: Path) -> tuple[list[Path], str]:
    for name in _WEIGHT_FILES:
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
    raise CheckpointError(f"{directory}: config.json without weights; expected one of {', '.join(_WEIGHT_FILES)}")


@dataclass(frozen=True)
class _Source:
    """A tensor of a weights file: shape and dtype at once, the data when asked."""

    label: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]


def _locate(files: list[Path]) -> dict[str, _Source]:
    """Hugging Face name without its `transformer.` prefix -> where it lies."""
    found: dict[str, _Source] = {}
    for path in files:
        for source in _safetensors_sources(path) if path.suffix == ".safetensors" else _pickle_sources(path):
            if (bare := names.from_huggingface(source.key)) is None:
                continue
            if bare in found:
                raise CheckpointError(f"{source.label}: {source.key} is also in {found[bare].label} as {found[bare].key}")
            found[bare] = source
    return found


def _safetensors_sources(path: Path) -> list[_Source]:
    from safetensors import safe_open

    try:
        file = safe_open(path, framework="pt")
        sources = []
        for key in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
            part = file.get_slice(key)
            sources.append(_Source(str(path), key, tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype()),
                                   partial(file.get_tensor, key)))
        return sources
    except Exception as error:  # SafetensorError is no public base of what the library raises
        raise CheckpointError(f"{path}: truncated or damaged safetensors file ({first_line(error)})") from None


def _pickle_sources(path: Path) -> list[_Source]:
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return [_Source(str(path), str(key), tuple(value.shape), value.dtype, lambda value=value: value)  # type: ignore[misc]
            for key, value in content.items() if isinstance(value, Tensor)]


def _entry(parameter: names.Parameter, found: dict[str, _Source], config: GPT2Config, directory: Path) -> Entry:
    source = found.get(parameter.huggingface)
    if source is None:
        raise CheckpointError(f"{directory}: {names.huggingface_key(parameter)} is missing from the weights")
    shape = parameter.shape(config)
    expected = shape[::-1] if parameter.conv1d else shape
    if source.shape != expected:
        raise CheckpointError(f"{source.label}: {source.key} has shape {list(source.shape)}, expected {list(expected)}")
    if source.dtype is None or source.dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"{source.label}: {source.key} is of an unsupported dtype, expected one of "
                              f"{', '.join(_DTYPE_NAMES.values())}")
    heads = config.num_attention_heads
    return Entry(shape, source.dtype, lambda start, stop: _from_huggingface(source.read(), parameter, heads, start, stop),
                 source.key, parameter.split or 0)


def save_huggingface(checkpoint: Checkpoint, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None,
                     tokenizer: Tokenizer | None = None, max_shard_size: int = DEFAULT_SHARD_BYTES, force: bool = False,
                     track: Callable[[list[str]], Iterable[str]] = iter) -> None:
    """Write a directory that transformers' GPT2LMHeadModel loads, atomically.

    dtype None keeps each tensor's own. Padding rows of the vocabulary are dropped. Weights above `max_shard_size` bytes are
    split over several files with an index. `tokenizer` puts its files beside the weights. `force` replaces an existing
    checkpoint at the very end. `track` wraps the list of names of each file, for progress. Raises CheckpointError when the
    destination can't be written or the tokenizer doesn't fit.
    """
    config = checkpoint.config
    if tokenizer is not None:
        tokenizer.check(config.vocab_size)
    table = {names.huggingface_key(parameter): parameter for parameter in names.parameters(config)}
    entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, parameter in table.items():
        shape = parameter.shape(config)
        if parameter.symbols[0] == "v":
            shape = (config.vocab_size, *shape[1:])
        entries[key] = (shape[::-1] if parameter.conv1d else shape, dtype or checkpoint.meta(parameter.canonical)[1])

    def make(key: str) -> Tensor:
        return _to_huggingface(checkpoint.tensors[table[key].canonical], table[key], config, entries[key][1])

    with atomic_directory(directory, force=force, source=checkpoint.source) as root:
        shards = _plan(entries, max_shard_size)
        for file, keys in shards.items():
            write_safetensors(root / file, {key: entries[key] for key in keys}, make, track)
        if len(shards) > 1:
            total = sum(_nbytes(entry) for entry in entries.values())
            _write_json(root / "model.safetensors.index.json", {
                "metadata": {"total_size": total}, "weight_map": {key: file for file, keys in shards.items() for key in keys}})
        fields = to_huggingface(config, config.vocab_size)
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        if tokenizer is not None:
            ids = {name: value if value is not None else tokenizer.end_of_text for name, value in ids.items()}
            tokenizer.write(root, config.max_position_embeddings)
        embedding_dtype = entries[names.huggingface_key(names.WORD_EMBEDDINGS)][1]
        _write_json(root / "config.json", {**fields, **ids, "torch_dtype": _DTYPE_NAMES[embedding_dtype]})
        if ids["eos_token_id"] is not None:
            _write_json(root / "generation_config.json", ids)


def _nbytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    return torch.Size(entry[0]).numel() * entry[1].itemsize


def _plan(entries: dict[str, tuple[tuple[int, ...], torch.dtype]], limit: int) -> dict[str, list[str]]:
    """File name -> keys, in order, each file within `limit` bytes unless a single tensor exceeds it."""
    if limit < 1:
        raise CheckpointError(f"max_shard_size must be at least 1 byte, got {limit}")
    groups: list[list[str]] = [[]]
    used = 0
    for key, entry in entries.items():
        if groups[-1] and used + _nbytes(entry) > limit:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += _nbytes(entry)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, 1)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
