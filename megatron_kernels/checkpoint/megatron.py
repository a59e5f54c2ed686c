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

from ..models.config import GPT2Config
from . import names
from .errors import CheckpointError
from .layout import Layout, Shard, find
from .reading import Stub, attributes
from .settings import combine, refuse_unsupported
from .tensors import Checkpoint, Entry, LazyTensors

VERSIONS = (0.0, 1.0, 2.0, 3.0)
_SAME_IN_ALL_SHARDS = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings",
                       "padded_vocab_size", "layernorm_epsilon", "norm_epsilon", "bias_gelu_fusion", "openai_gelu", "seed",
                       "tensor_model_parallel_size", "model_parallel_size", "pipeline_model_parallel_size",
                       "virtual_pipeline_model_parallel_size", "untie_embeddings_and_output_weights")


@dataclass(frozen=True)
class Located:
    """A tensor of one shard under the key that the file has for it."""

    tensor: Tensor
    key: str


Chunk = dict[str, Located]  # canonical names with layer numbers local to the chunk -> tensors


@dataclass(frozen=True)
class Part:
    """One shard, read: its ranks, its header, and its chunks of layers (several with a virtual pipeline)."""

    shard: Shard
    version: float
    args: dict[str, Any] | None
    iteration: int | None
    chunks: tuple[Chunk, ...]

    @property
    def label(self) -> str:
        return self.shard.label


def load(path: Path, config: GPT2Config | str | Path | None = None) -> Checkpoint:
    """Read a Megatron checkpoint of any version, key style and parallel layout; see `checkpoint.load`."""
    layout = find(path)
    parts = [_read_part(shard) for shard in layout.shards]
    refuse_unsupported(parts[0].args or {}, parts[0].label)
    tensor, pipeline = _check_grid(parts, layout)
    _check_headers(parts)
    grid = {(part.shard.tensor_rank, part.shard.pipeline_rank): part for part in parts}
    stages = list(_stages(grid, tensor, pipeline))
    sources = _number_layers(stages)
    head_copy, untied = _head(sources, parts[0].args, pipeline)
    measured = _measure(sources, untied, parts[0].label)
    _refuse_by_shape(sources, measured, tensor)
    settings, notes = combine(measured, parts[0].args, config, parts[0].label, tensor)
    if settings.num_attention_heads % tensor:
        raise CheckpointError(f"{layout.label}: {settings.num_attention_heads} heads cannot lie on {tensor} tensor-parallel shards")
    entries = {parameter.canonical: _entry(parameter, sources, settings, parts[0].version) for parameter in names.parameters(settings)}
    _check_copies(sources, settings, head_copy)
    return Checkpoint(settings, LazyTensors(entries), parts[0].iteration, "megatron", path,
                      _details(layout, parts[0], tensor, pipeline, len(parts[0].chunks)), notes)


def _details(layout: Layout, part: Part, tensor: int, pipeline: int, virtual: int) -> dict[str, str]:
    core = any(located.key.startswith(("decoder.", "module.decoder.")) for located in part.chunks[0].values())
    return {"layout": f"{layout.kind}, {len(layout.shards)} file(s): {layout.label}",
            "checkpoint_version": f"{part.version:.1f}", "keys": "Megatron-core" if core else "Megatron-LM",
            "args": "yes" if part.args is not None else "no", "tensor parallel": str(tensor), "pipeline parallel": str(pipeline),
            **({"virtual pipeline": str(virtual)} if virtual > 1 else {})}


def _read_part(shard: Shard) -> Part:
    content = shard.read()
    if not isinstance(content, dict):
        raise CheckpointError(f"{shard.label}: expected a dictionary with 'model', got {type(content).__name__}")
    models = [content["model"]] if "model" in content else []
    while (name := f"model{len(models)}") in content and "model" not in content:
        models.append(content[name])
    if not models or not all(isinstance(model, dict) for model in models):
        raise CheckpointError(f"{shard.label}: no Megatron checkpoint: expected a 'model' dictionary, found the keys "
                              f"{', '.join(map(str, list(content)[:8])) or '(none)'}")
    args = None
    if content.get("args") is not None and (args := attributes(content["args"])) is None:
        raise CheckpointError(f"{shard.label}: 'args' is a {type(content['args']).__name__}, expected a namespace")
    chunks = tuple(_chunk(model, shard.label) for model in models)
    iteration = content.get("iteration", content.get("total_iters"))
    return Part(shard, _version(content.get("checkpoint_version"), chunks, shard.label), args,
                iteration if isinstance(iteration, int) else None, chunks)


def _version(value: Any, chunks: tuple[Chunk, ...], label: str) -> float:
    newer = next((located.key for chunk in chunks for located in chunk.values() if names.implies_grouped_qkv(located.key)), None)
    if value is None:
        return 3.0 if newer else 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or float(value) not in VERSIONS:
        raise CheckpointError(f"{label}: unknown checkpoint_version {value!r}; known are {', '.join(map(str, VERSIONS))}")
    if newer and value < 2:
        raise CheckpointError(f"{label}: checkpoint_version {value!r} contradicts the key {newer}, which is of version 3.0")
    return float(value)


def _flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _chunk(model: dict[Any, Any], label: str) -> Chunk:
    chunk: Chunk = {}
    for key, value in _flatten(model):
        if value is None:
            continue
        if feature := names.refused_feature(key):
            raise CheckpointError(f"{label}: {key} belongs to {feature}, which is not supported")
        try:
            canonical = names.from_megatron(key)
        except KeyError:
            raise CheckpointError(f"{label}: unknown key {key}; expected the parameters of a GPT-2") from None
        if canonical is None:
            continue
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__name__}" if isinstance(value, Stub) else type(value).__name__
            raise CheckpointError(f"{label}: {key} is a {kind}, expected a tensor")
        if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
            raise CheckpointError(f"{label}: {key} has dtype {value.dtype}, expected float16, bfloat16, float32 or float64")
        if canonical in chunk:
            raise CheckpointError(f"{label}: {chunk[canonical].key} and {key} are both {canonical}")
        chunk[canonical] = Located(value, key)
    return chunk


def _sizes(args: dict[str, Any]) -> tuple[int | None, int | None]:
    return (args.get("tensor_model_parallel_size", args.get("model_parallel_size")), args.get("pipeline_model_parallel_size"))


def _check_grid(parts: list[Part], layout: Layout) -> tuple[int, int]:
    """(tensor, pipeline) sizes; raises CheckpointError for a missing or surplus shard."""
    found = {(part.shard.tensor_rank, part.shard.pipeline_rank) for part in parts}
    tensor, pipeline = (max(ranks) + 1 for ranks in zip(*found, strict=True))
    said_by = "the files found"
    if parts[0].args is not None:
        said = _sizes(parts[0].args)
        tensor, pipeline = said[0] or tensor, said[1] or pipeline
        said_by = f"args in {parts[0].label}"
    for part in parts:
        rank = (part.shard.tensor_rank, part.shard.pipeline_rank)
        if rank[0] >= tensor or rank[1] >= pipeline:
            raise CheckpointError(f"{part.label}: one shard too many: {said_by} say tensor parallel {tensor} x pipeline parallel {pipeline}")
    missing = sorted({(t, p) for t in range(tensor) for p in range(pipeline)} - found)
    if missing:
        shown = ", ".join(f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") for t, p in missing[:4])
        hint = "; give the directory that holds all shards" if layout.kind == "file" else ""
        raise CheckpointError(f"{layout.label}: missing {len(missing)} of {tensor * pipeline} shards: {shown} "
                              f"({said_by} say tensor parallel {tensor} x pipeline parallel {pipeline}){hint}")
    return tensor, pipeline


def _check_headers(parts: list[Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        pairs: list[tuple[str, Any, Any]] = [("checkpoint_version", first.version, part.version),
                                             ("iteration", first.iteration, part.iteration),
                                             ("whether it has args", first.args is not None, part.args is not None),
                                             ("number of virtual pipeline chunks", len(first.chunks), len(part.chunks))]
        if first.args is not None and part.args is not None:
            pairs += [(f"args.{name}", first.args.get(name), part.args.get(name)) for name in _SAME_IN_ALL_SHARDS]
        for what, one, other in pairs:
            if one != other:
                raise CheckpointError(f"{part.label}: a shard of another run: {what} is {other!r}, but {one!r} in {first.label}")


@dataclass(frozen=True)
class Stage:
    """The shards of one chunk of layers, over the tensor-parallel ranks in order."""

    chunks: tuple[Chunk, ...]
    labels: tuple[str, ...]


def _stages(grid: dict[tuple[int, int], Part], tensor: int, pipeline: int) -> Iterator[Stage]:
    """Chunks in the order of the layers: virtual chunk by virtual chunk, through the pipeline ranks in each."""
    for virtual in range(len(grid[0, 0].chunks)):
        for rank in range(pipeline):
            parts = [grid[t, rank] for t in range(tensor)]
            yield Stage(tuple(part.chunks[virtual] for part in parts), tuple(part.label for part in parts))


@dataclass(frozen=True)
class Sources:
    """The shards of one parameter, in tensor-parallel order."""

    shards: tuple[Located, ...]
    labels: tuple[str, ...]


def _number_layers(stages: list[Stage]) -> dict[str, Sources]:
    """Canonical name, with the layer's number in the whole model -> its shards."""
    sources: dict[str, Sources] = {}
    offset = 0
    for stage in stages:
        numbers = sorted({layer[0] for name in stage.chunks[0] if (layer := names.split_layer(name))})
        if numbers != list(range(len(numbers))):
            gap = next(i for i in range(numbers[-1] + 1) if i not in numbers)
            raise CheckpointError(f"{stage.labels[0]}: layer {gap} is missing; found layers {', '.join(map(str, numbers))}")
        for name, located in stage.chunks[0].items():
            for chunk, label in zip(stage.chunks[1:], stage.labels[1:], strict=True):
                if name not in chunk:
                    raise CheckpointError(f"{label}: lacks {located.key}, which {stage.labels[0]} has")
        for chunk, label in zip(stage.chunks[1:], stage.labels[1:], strict=True):
            if surplus := next((chunk[name].key for name in chunk if name not in stage.chunks[0]), None):
                raise CheckpointError(f"{stage.labels[0]}: lacks {surplus}, which {label} has")
        for number in numbers:
            for parameter in names.LAYER:
                if f"decoder.layers.{number}.{parameter.canonical}" not in stage.chunks[0]:
                    raise CheckpointError(_missing(parameter.canonical, f"layer {number}", stage.labels[0]))
        for name in stage.chunks[0]:
            layer = names.split_layer(name)
            whole = f"decoder.layers.{layer[0] + offset}.{layer[1]}" if layer else name
            if whole in sources:
                raise CheckpointError(f"{stage.labels[0]}: {stage.chunks[0][name].key} is also in {sources[whole].labels[0]}")
            sources[whole] = Sources(tuple(chunk[name] for chunk in stage.chunks), stage.labels)
        offset += len(numbers)
    for parameter in (names.WORD_EMBEDDINGS, names.POSITION_EMBEDDINGS, *names.FINAL_NORM):
        if parameter.canonical not in sources:
            last = parameter in names.FINAL_NORM
            raise CheckpointError(_missing(parameter.canonical, "the last stage" if last else "the first stage", stages[-1 if last else 0].labels[0]))
    if not offset:
        raise CheckpointError(f"{stages[0].labels[0]}: no layers found")
    return sources


_HINTS = {"layernorm.bias": "RMSNorm has no bias and is not supported", "position_embeddings.weight": "rotary position embeddings are not supported",
          "qkv.bias": "linear layers without biases are not supported", "fc1.bias": "linear layers without biases are not supported"}


def _missing(canonical: str, where: str, label: str) -> str:
    megatron = {p.canonical: p.megatron for p in (*names.LAYER, names.WORD_EMBEDDINGS, names.POSITION_EMBEDDINGS, *names.FINAL_NORM)}
    hint = next((f" ({text})" for end, text in _HINTS.items() if canonical.endswith(end)), "")
    return f"{label}: {where} lacks {megatron[canonical]}, expected in every GPT-2{hint}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit (NaNs included)."""
    return (one.shape == other.shape and one.dtype == other.dtype
            and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)))


def _head(sources: dict[str, Sources], args: dict[str, Any] | None, pipeline: int) -> tuple[Sources | None, bool]:
    """The last stage's copy of the word embeddings, if any, and whether the output layer has weights of its own.

    Megatron-core keeps the copy of a tied head as output_layer.weight; Megatron-LM as word_embeddings_for_head.
    """
    copy, output = sources.pop(names.HEAD_COPY, None), sources.get(names.OUTPUT_LAYER.canonical)
    stated = (args or {}).get("untie_embeddings_and_output_weights")
    if output is None:
        return (None if stated else copy), False
    embedding = sources[names.WORD_EMBEDDINGS.canonical]
    equal = all(same_bits(a.tensor, b.tensor) for a, b in zip(output.shards, embedding.shards, strict=True))
    if stated is None:
        untied = not (equal and pipeline > 1)
    elif stated:
        untied = True
    elif equal:
        untied = False
    else:
        raise CheckpointError(f"{output.labels[0]}: {output.shards[0].key} differs from the word embeddings, but "
                              "args.untie_embeddings_and_output_weights is False")
    if not untied:
        del sources[names.OUTPUT_LAYER.canonical]
    return (None if untied else copy), untied


def _measure(sources: dict[str, Sources], untied: bool, label: str) -> dict[str, Any]:
    """The sizes that the tensors tell."""
    def shape(name: str) -> tuple[int, int]:
        located, where = sources[name].shards[0], sources[name].labels[0]
        if located.tensor.dim() != 2:
            raise CheckpointError(f"{where}: {located.key} has shape {list(located.tensor.shape)}, expected two dimensions")
        return located.tensor.shape[0], located.tensor.shape[1]

    words, positions = shape(names.WORD_EMBEDDINGS.canonical), shape(names.POSITION_EMBEDDINGS.canonical)
    tensor = len(sources[names.WORD_EMBEDDINGS.canonical].shards)
    layers = 1 + max(layer[0] for name in sources if (layer := names.split_layer(name)))
    return {"num_layers": layers, "hidden_size": positions[1], "max_position_embeddings": positions[0],
            "ffn_hidden_size": shape("decoder.layers.0.mlp.linear_fc2.weight")[1] * tensor,
            "padded_vocab_size": words[0] * tensor, "untie_embeddings_and_output_weights": untied}


def _refuse_by_shape(sources: dict[str, Sources], measured: dict[str, Any], tensor: int) -> None:
    hidden, ffn = measured["hidden_size"], measured["ffn_hidden_size"]
    for suffix, rows, reading in (("mlp.linear_fc1.weight", ffn // tensor, ((2, "a gated activation such as SwiGLU"),)),
                                  ("self_attention.linear_qkv.weight", 3 * hidden // tensor, ())):
        located, label = (s := sources[f"decoder.layers.0.{suffix}"]).shards[0], s.labels[0]
        seen = located.tensor.shape[0]
        for factor, feature in reading:
            if seen == factor * rows:
                raise CheckpointError(f"{label}: {located.key} has {seen} rows where {rows} are expected: {feature}, which is not supported")
        if suffix.endswith("qkv.weight") and hidden // tensor < seen < rows:
            raise CheckpointError(f"{label}: {located.key} has {seen} rows where {rows} are expected: multi-query or grouped-query "
                                  "attention, which is not supported")
    dense, label = (s := sources["decoder.layers.0.self_attention.linear_proj.weight"]).shards[0], s.labels[0]
    width = dense.tensor.shape[-1]
    if width * tensor != hidden and width and hidden % width == 0:
        raise CheckpointError(f"{label}: {dense.key} is {width} wide, one of {hidden // width} tensor-parallel shards of width {hidden}, "
                              f"but {tensor} found; shards are missing")


def _entry(parameter: names.Parameter, sources: dict[str, Sources], config: GPT2Config, version: float) -> Entry:
    """The lazily merged tensor of one parameter; raises CheckpointError for shards of the wrong shape or dtype."""
    source = sources[parameter.canonical]
    tensor = len(source.shards)
    expected = parameter.shape(config, tensor)
    for located, label in zip(source.shards, source.labels, strict=True):
        if tuple(located.tensor.shape) != expected:
            raise CheckpointError(f"{label}: {located.key} has shape {list(located.tensor.shape)}, expected {list(expected)}")
        if located.tensor.dtype != source.shards[0].tensor.dtype:
            raise CheckpointError(f"{label}: a shard of another run: {located.key} has dtype {located.tensor.dtype}, but "
                                  f"{source.shards[0].tensor.dtype} in {source.labels[0]}")
    make = partial(_merge, [located.tensor for located in source.shards], parameter, config, version)
    return Entry(parameter.shape(config), source.shards[0].tensor.dtype, make, source.shards[0].key)


def _merge(shards: list[Tensor], parameter: names.Parameter, config: GPT2Config, version: float) -> Tensor:
    if parameter.is_qkv and version < 2:
        shards = [heads_first(shard, config.num_attention_heads // len(shards), version) for shard in shards]
    if parameter.split is None or len(shards) == 1:
        return shards[0].contiguous()
    return torch.cat(shards, parameter.split)


def heads_first(qkv: Tensor, heads: int, version: float) -> Tensor:
    """One shard's QKV rows of a version below 2.0, brought to [heads, 3, head_dim]."""
    if version < 1:
        return qkv.view(3, heads, -1, *qkv.shape[1:]).transpose(0, 1).reshape(qkv.shape)
    return qkv.view(heads, -1, 3, *qkv.shape[1:]).transpose(1, 2).reshape(qkv.shape)


def _check_copies(sources: dict[str, Sources], config: GPT2Config, head_copy: Sources | None) -> None:
    """What several shards hold must be the same in all of them, and what they split must not be."""
    for parameter in names.parameters(config):
        source = sources[parameter.canonical]
        if parameter.split is None:
            for located, label in zip(source.shards[1:], source.labels[1:], strict=True):
                if not same_bits(located.tensor, source.shards[0].tensor):
                    raise CheckpointError(f"{label}: a shard of another run: {located.key} differs from {source.labels[0]}, expected equal")
    if head_copy is not None:
        embedding = sources[names.WORD_EMBEDDINGS.canonical]
        for a, b, label in zip(head_copy.shards, embedding.shards, head_copy.labels, strict=True):
            if not same_bits(a.tensor, b.tensor):
                raise CheckpointError(f"{label}: a shard of another run: {a.key} differs from the word embeddings of the first stage, "
                                      "expected equal")
    qkv = sources["decoder.layers.0.self_attention.linear_qkv.weight"]
    for i, one in enumerate(qkv.shards):
        for j in range(i):
            if same_bits(one.tensor, qkv.shards[j].tensor) and one.tensor.unique().numel() > 1:
                raise CheckpointError(f"{qkv.labels[i]}: holds the same {one.key} as {qkv.labels[j]}, expected another part of it")
