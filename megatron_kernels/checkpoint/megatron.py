"""Reading Megatron-LM checkpoints: shards in, one lazily assembled model out.

Every shard is memory-mapped, its keys are brought to canonical names, and the shards are checked against each other and against
`args` before any tensor is assembled. The rows of a query-key-value matrix lie, within each tensor-parallel shard of `heads`,
as [3, heads, head_dim] in version 0 (or no version), [heads, head_dim, 3] in 1.0, [heads, 3, head_dim] in 2.0 and 3.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.config import BertConfig, GPT2Config, ModelConfig
from . import bert, names, shards
from .errors import CheckpointError
from .layout import Layout, find
from .settings import combine, refuse_unsupported, truth
from .shards import Chunk, Located, Part
from .tensors import Checkpoint, Entry, LazyTensors, rows_of_heads

_QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
_PROJ = "decoder.layers.0.self_attention.linear_proj.weight"
_FC1, _FC2 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"
_WORDS, _POSITIONS = names.WORD_EMBEDDINGS.canonical, names.POSITION_EMBEDDINGS.canonical
_HEAD = names.OUTPUT_LAYER.canonical


@dataclass(frozen=True)
class Sources:
    """The shards of one parameter, in tensor-parallel order, and the names of their files."""

    shards: tuple[Located, ...]
    labels: tuple[str, ...]

    def first(self) -> tuple[Tensor, str]:
        """The first shard's tensor, and how to call it in messages."""
        return self.shards[0].tensor, f"{self.labels[0]}: {self.shards[0].key}"


def load(path: Path, config: ModelConfig | str | Path | None = None) -> Checkpoint:
    """Read a Megatron checkpoint of any version, key style and parallel layout; see `checkpoint.load`."""
    layout = find(path)
    parts = [shards.read(shard) for shard in layout.shards]
    first = parts[0]
    is_bert = names.is_bert(name for part in parts for chunk in part.chunks for name in chunk)
    kind: type[ModelConfig] = BertConfig if is_bert else GPT2Config
    refuse_unsupported(first.args or {}, first.label, bert.SUPPORTED_ARGS if is_bert else ())
    tensor, pipeline = shards.check_grid(parts, layout)
    shards.check_headers(parts)
    sources = _number_layers(list(_stages(parts, tensor, pipeline)), kind)
    head_copy, untied = _head(sources, first.args, pipeline)
    measured = _measure(sources, untied)
    _refuse_by_shape(sources, measured, tensor)
    settings: ModelConfig
    if is_bert:
        measured = bert.measure(measured, {name: source.first()[0] for name, source in sources.items()}, first.label)
        settings, notes = bert.combine(measured, first.args, config, first.label, tensor)
        sources = {names.of_encoder(name): source for name, source in sources.items()}
    else:
        settings, notes = combine(measured, first.args, config, first.label, tensor)
    if settings.num_attention_heads % tensor:
        raise CheckpointError(f"{layout.label}: {settings.num_attention_heads} heads cannot lie on {tensor} shards")
    entries = {parameter.canonical: _entry(parameter, sources[parameter.canonical], settings, first.version)
               for parameter in names.parameters(settings)}
    _check_copies(sources, settings, head_copy)
    return Checkpoint(settings, LazyTensors(entries), first.iteration, "megatron", path,
                      _details(layout, first, tensor, pipeline, is_bert), notes)


def _details(layout: Layout, part: Part, tensor: int, pipeline: int, is_bert: bool) -> dict[str, str]:
    core = any(key.removeprefix("module.").startswith(("decoder.", "encoder."))
               for key in (found.key for found in part.chunks[0].values()))
    details = {"model": "BERT"} if is_bert else {}
    details |= {"layout": f"{layout.kind}, {len(layout.shards)} file(s): {layout.label}",
               "checkpoint_version": f"{part.version:.1f}", "keys": "Megatron-core" if core else "Megatron-LM",
               "args": "no" if part.args is None else "yes", "tensor parallel": str(tensor), "pipeline parallel": str(pipeline)}
    return details | ({"virtual pipeline": str(len(part.chunks))} if len(part.chunks) > 1 else {})


def _stages(parts: list[Part], tensor: int, pipeline: int) -> Iterator[tuple[tuple[Chunk, str], ...]]:
    """Chunks of layers in the model's order, each as (chunk, file) over the tensor-parallel ranks.

    With a virtual pipeline, the ranks hold their first chunks of the model in turn, then their second ones, and so on.
    """
    grid = {(part.shard.tensor_rank, part.shard.pipeline_rank): part for part in parts}
    for virtual in range(len(parts[0].chunks)):
        for rank in range(pipeline):
            yield tuple((grid[t, rank].chunks[virtual], grid[t, rank].label) for t in range(tensor))


def _number_layers(stages: list[tuple[tuple[Chunk, str], ...]], kind: type[ModelConfig]) -> dict[str, Sources]:
    """Canonical names, with the layers' numbers in the whole model -> their shards; complains about what is missing."""
    sources: dict[str, Sources] = {}
    offset = 0
    for stage in stages:
        chunk, label = stage[0]
        for other, other_label in stage[1:]:
            for key, lacks, has in [*((chunk[name].key, other_label, label) for name in chunk.keys() - other.keys()),
                                    *((other[name].key, label, other_label) for name in other.keys() - chunk.keys())]:
                raise CheckpointError(f"{lacks}: lacks {key}, which {has} has")
        layers = _check_layers(chunk, label, kind)
        for name, located in chunk.items():
            layer = names.split_layer(name)
            whole = f"decoder.layers.{layer[0] + offset}.{layer[1]}" if layer else name
            if whole in sources:
                raise CheckpointError(f"{label}: {located.key} is also in {sources[whole].labels[0]}")
            sources[whole] = Sources(tuple(part[name] for part, _ in stage), tuple(where for _, where in stage))
        offset += layers
    at_the_end = [*names.FINAL_NORM, *(names.heads_of_bert(sources) if kind is BertConfig else ())]
    for parameter in (names.WORD_EMBEDDINGS, names.POSITION_EMBEDDINGS, *at_the_end):
        if parameter.canonical not in sources:
            where, stage = ("the last stage", stages[-1]) if parameter in at_the_end else ("the first stage", stages[0])
            raise CheckpointError(_missing(parameter, where, stage[0][1], kind))
    if not offset:
        raise CheckpointError(f"{stages[0][0][1]}: no layers found")
    return sources


def _check_layers(chunk: Chunk, label: str, kind: type[ModelConfig]) -> int:
    """The number of layers in a chunk, each of which must be complete."""
    numbers = {layer[0] for name in chunk if (layer := names.split_layer(name))}
    for number in range(max(numbers, default=-1) + 1):
        if number not in numbers:
            raise CheckpointError(f"{label}: layer {number} is missing; found layers {', '.join(map(str, sorted(numbers)))}")
        for parameter in names.LAYER:
            if f"decoder.layers.{number}.{parameter.canonical}" not in chunk:
                raise CheckpointError(_missing(parameter, f"layer {number}", label, kind))
    return len(numbers)


_HINTS = {"layernorm.bias": "RMSNorm has no bias and is not supported",
          "position_embeddings.weight": "rotary position embeddings are not supported",
          "qkv.bias": "linear layers without biases are not supported",
          "fc1.bias": "linear layers without biases are not supported"}


def _missing(parameter: names.Parameter, where: str, label: str, kind: type[ModelConfig]) -> str:
    hint = next((f" ({text})" for end, text in _HINTS.items() if parameter.canonical.endswith(end)), "")
    return f"{label}: {where} lacks {parameter.megatron}, expected in every {kind.model}{hint}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit (NaNs included)."""
    return (one.shape == other.shape and one.dtype == other.dtype
            and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)))


def _head(sources: dict[str, Sources], args: dict[str, Any] | None, pipeline: int) -> tuple[Sources | None, bool]:
    """The last stage's copy of the word embeddings, if any, and whether the output layer has weights of its own.

    Megatron-core keeps the copy of a tied head as output_layer.weight; Megatron-LM as word_embeddings_for_head.
    """
    copy, output = sources.pop(names.HEAD_COPY, None), sources.get(_HEAD)
    stated = (args or {}).get("untie_embeddings_and_output_weights")
    if output is None:
        return (None if truth(stated) else copy), False
    equal = all(same_bits(a.tensor, b.tensor) for a, b in zip(output.shards, sources[_WORDS].shards, strict=True))
    untied = truth(stated) if stated is not None else not (equal and pipeline > 1)
    if not untied:
        if not equal:
            raise CheckpointError(f"{output.first()[1]} differs from the word embeddings, but args say "
                                  "untie_embeddings_and_output_weights = False")
        del sources[_HEAD]
    return (None if untied else copy), untied


def _measure(sources: dict[str, Sources], untied: bool) -> dict[str, Any]:
    """The sizes that the tensors tell."""
    for name in (_WORDS, _POSITIONS, _QKV, _PROJ, _FC1, _FC2):
        tensor, label = sources[name].first()
        if tensor.dim() != 2 or not tensor.numel():
            raise CheckpointError(f"{label} has shape {list(tensor.shape)}, expected two dimensions")
    words, positions, fc2 = (sources[name].first()[0].shape for name in (_WORDS, _POSITIONS, _FC2))
    parallel = len(sources[_WORDS].shards)
    return {"num_layers": 1 + max(layer[0] for name in sources if (layer := names.split_layer(name))),
            "hidden_size": positions[1], "max_position_embeddings": positions[0], "ffn_hidden_size": fc2[1] * parallel,
            "padded_vocab_size": words[0] * parallel, "untie_embeddings_and_output_weights": untied}


def _refuse_by_shape(sources: dict[str, Sources], measured: dict[str, Any], tensor_parallel: int) -> None:
    """Name what the shapes give away where there are no `args` to tell."""
    hidden = measured["hidden_size"]
    projection, label = sources[_PROJ].first()
    width = projection.shape[1]
    if width * tensor_parallel != hidden and hidden % width == 0:
        raise CheckpointError(f"{label} is {width} wide, one of {hidden // width} tensor-parallel shards of {hidden}, but "
                              f"{tensor_parallel} found: shards are missing")
    for name, rows, feature in ((_FC1, measured["ffn_hidden_size"] // tensor_parallel, "a gated activation such as SwiGLU"),
                                (_QKV, 3 * hidden // tensor_parallel, "multi-query or grouped-query attention")):
        tensor, label = sources[name].first()
        seen = tensor.shape[0]
        if seen == 2 * rows if name == _FC1 else rows // 3 < seen < rows:
            raise CheckpointError(f"{label} has {seen} rows where {rows} are expected: {feature} is not supported")


def _entry(parameter: names.Parameter, source: Sources, config: ModelConfig, version: float) -> Entry:
    """The lazily merged tensor of one parameter; raises CheckpointError for shards of the wrong shape or dtype."""
    expected = parameter.shape(config, len(source.shards))
    dtype = source.shards[0].tensor.dtype
    for located, label in zip(source.shards, source.labels, strict=True):
        if tuple(located.tensor.shape) != expected:
            raise CheckpointError(f"{label}: {located.key} has shape {list(located.tensor.shape)}, expected {list(expected)}")
        if located.tensor.dtype != dtype:
            raise CheckpointError(f"{label}: a shard of another run: {located.key} has dtype {located.tensor.dtype}, "
                                  f"but {dtype} in {source.labels[0]}")
    read = partial(_merge, [located.tensor for located in source.shards], parameter, config, version)
    return Entry(parameter.shape(config), dtype, read, source.shards[0].key, parameter.split or 0)


def _merge(shards: list[Tensor], parameter: names.Parameter, config: ModelConfig, version: float, start: int, stop: int) -> Tensor:
    """[start, stop) of the whole along the dimension that is split; shards without a part in it are not touched."""
    if parameter.split is None:
        return shards[0].narrow(0, start, stop - start).contiguous()
    pieces, size = [], shards[0].shape[parameter.split]
    for i, shard in enumerate(shards):
        first, last = max(start - i * size, 0), min(stop - i * size, size)
        if first >= last:
            continue
        if parameter.is_qkv and version < 2:
            pieces.append(rows_of_heads(_by_head(shard, config.num_attention_heads // len(shards), version), first, last))
        else:
            pieces.append(shard.narrow(parameter.split, first, last - first))
    pieces = pieces or [shards[0].narrow(parameter.split, 0, 0)]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, parameter.split)


def _by_head(qkv: Tensor, heads: int, version: float) -> Tensor:
    """One shard's QKV rows of a version below 2.0 as [heads, 3, head_dim, ...]: a view."""
    if version < 1:
        return qkv.unflatten(0, (3, heads, -1)).transpose(0, 1)
    return qkv.unflatten(0, (heads, -1, 3)).transpose(1, 2)


def _check_copies(sources: dict[str, Sources], config: ModelConfig, head_copy: Sources | None) -> None:
    """What several shards hold must be the same in all of them, and what they split must not be."""
    for parameter in names.parameters(config):
        source = sources[parameter.canonical]
        if parameter.split is None:
            for located, label in zip(source.shards[1:], source.labels[1:], strict=True):
                if not same_bits(located.tensor, source.shards[0].tensor):
                    raise CheckpointError(f"{label}: a shard of another run: {located.key} differs from {source.labels[0]}, "
                                          "expected equal")
    qkv = sources[next(parameter.canonical for parameter in names.parameters(config) if parameter.is_qkv)]
    for i, one in enumerate(qkv.shards):
        for other, label in zip(qkv.shards[:i], qkv.labels, strict=False):
            if same_bits(one.tensor, other.tensor) and one.tensor.unique().numel() > 1:
                raise CheckpointError(f"{qkv.labels[i]}: holds the same {one.key} as {label}, expected another part of it")
    if head_copy is not None:
        for copy, original, label in zip(head_copy.shards, sources[_WORDS].shards, head_copy.labels, strict=True):
            if not same_bits(copy.tensor, original.tensor):
                raise CheckpointError(f"{label}: a shard of another run: {copy.key} differs from the word embeddings of the "
                                      "first stage, expected equal")
