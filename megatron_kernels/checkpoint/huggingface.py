"""Hugging Face directories, read and written: GPT-2's here, BERT's with `bert.py`.

Read: config.json with model.safetensors or pytorch_model.bin, sharded or not, with or without the `transformer.` prefix; the
causal masks that old files carry are ignored. Written: config.json, generation_config.json and safetensors, tensor by tensor.
Conv1D matrices are [in, out], the transpose of Megatron's; the rows of c_attn are [3, heads, head_dim].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..models.config import BertConfig, GPT2Config, ModelConfig
from . import bert, names
from .atomic import atomic_directory
from .errors import CheckpointError
from .settings import known_by_huggingface, known_by_user, make_config, read_json, to_huggingface
from .tensors import Checkpoint, Entry, LazyTensors, rows_of_heads
from .tokenizer import Tokenizer
from .weights import DTYPE_NAMES, Made, Source, check_source, locate, weight_files, write_json, write_weights
from .wordpiece import WordPiece, check_tokenizer

DEFAULT_SHARD_BYTES = 5 * 10**9
_HF_DEFAULTS = {"vocab_size": 50257, "max_position_embeddings": 1024, "hidden_size": 768, "num_layers": 12,
                "num_attention_heads": 12}  # what Hugging Face's own GPT2Config takes for absent fields


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


def load(directory: Path, config: ModelConfig | str | Path | None = None) -> Checkpoint:
    """Read a Hugging Face directory of a GPT-2 or a BERT; see `checkpoint.load`."""
    label = str(directory / "config.json")
    content = read_json(directory / "config.json")
    if content.get("model_type") in bert.TYPES:
        return bert.load(directory, content, config)
    known = known_by_huggingface(content, label)
    user, user_label = known_by_user(config)
    for name, value in user.items():
        if name in known and known[name] != value and not name.endswith(("dropout", "std")):
            raise CheckpointError(f"{user_label} says {name} = {value!r}, but {label} says {known[name]!r}")
        known[name] = value
    for name, default in _HF_DEFAULTS.items():
        known.setdefault(name, default)
    files, kind = weight_files(directory)
    found = locate(files, names.from_huggingface)
    settings = make_config(known, label)
    entries = {parameter.canonical: _entry(parameter, found, settings, directory) for parameter in names.parameters(settings)}
    expected = {parameter.huggingface for parameter in names.parameters(settings)} | {"lm_head.weight"}
    if unknown := sorted(set(found) - expected):
        raise CheckpointError(f"{found[unknown[0]].label}: unknown key {unknown[0]}; expected the parameters of a GPT-2 with "
                              f"{settings.num_layers} layers (config.json)")
    return Checkpoint(settings, LazyTensors(entries), None, "huggingface", directory,
                      {"layout": f"directory, {len(files)} file(s): {directory}", "weights": kind})


def _entry(parameter: names.Parameter, found: dict[str, Source], config: GPT2Config, directory: Path) -> Entry:
    shape = parameter.shape(config)
    expected = shape[::-1] if parameter.conv1d else shape
    source = check_source(found.get(parameter.huggingface), names.huggingface_key(parameter), expected, directory)
    assert source.dtype is not None
    heads = config.num_attention_heads
    return Entry(shape, source.dtype, lambda start, stop: _from_huggingface(source.read(), parameter, heads, start, stop),
                 source.key, parameter.split or 0)


def _tensors_for_huggingface(checkpoint: Checkpoint, config: GPT2Config, dtype: torch.dtype | None) -> dict[str, Made]:
    """Key -> the tensor to be written, made when it is asked for."""
    made: dict[str, Made] = {}
    for parameter in names.parameters(config):
        shape, own = checkpoint.meta(parameter.canonical)
        if parameter.symbols[0] == "v":
            shape = (config.vocab_size, *shape[1:])
        made[names.huggingface_key(parameter)] = Made(
            shape[::-1] if parameter.conv1d else shape, dtype or own,
            lambda parameter=parameter, dtype=dtype or own: _to_huggingface(  # type: ignore[misc]
                checkpoint.tensors[parameter.canonical], parameter, config, dtype))
    return made


def save_huggingface(checkpoint: Checkpoint, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None,
                     tokenizer: Tokenizer | WordPiece | None = None, max_shard_size: int = DEFAULT_SHARD_BYTES,
                     force: bool = False, track: Callable[[list[str]], Iterable[str]] = iter) -> None:
    """Write a directory that transformers loads, atomically: of a GPT-2 as GPT2LMHeadModel, of a BERT as MegatronBertForMaskedLM,
    or as BertForMaskedLM where its ordering is the original BERT's.

    dtype None keeps each tensor's own. Padding rows of the vocabulary are dropped. Weights above `max_shard_size` bytes are
    split over several files with an index. `tokenizer` puts its files beside the weights. `force` replaces an existing
    checkpoint at the very end. `track` wraps the list of names of each file, for progress. Raises CheckpointError when the
    destination can't be written or the tokenizer doesn't fit.
    """
    config = checkpoint.config
    check_tokenizer(tokenizer, config)
    if isinstance(config, BertConfig):
        tensors, fields = bert.tensors_for_huggingface(checkpoint, config, dtype), bert.to_huggingface(config)
    else:
        tensors, fields = _tensors_for_huggingface(checkpoint, config, dtype), to_huggingface(config, config.vocab_size)
    with atomic_directory(directory, force=force, source=checkpoint.source) as root:
        write_weights(root, tensors, max_shard_size, track)
        ids: dict[str, int | None] = {}
        if isinstance(config, GPT2Config):
            ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
            if isinstance(tokenizer, Tokenizer):
                ids = {name: value if value is not None else tokenizer.end_of_text for name, value in ids.items()}
        if tokenizer is not None:
            tokenizer.write(root, config.max_position_embeddings)
        stored = DTYPE_NAMES[dtype or checkpoint.dtype]
        write_json(root / "config.json", {**fields, **ids, "torch_dtype": stored})
        if ids.get("eos_token_id") is not None:
            write_json(root / "generation_config.json", ids)
