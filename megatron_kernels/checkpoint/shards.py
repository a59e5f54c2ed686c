"""Reading the shards of a Megatron checkpoint, one by one, and checking that together they are one run's complete set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import names
from .errors import CheckpointError
from .layout import Layout, Shard
from .reading import Stub, attributes

VERSIONS = (0.0, 1.0, 2.0, 3.0)
_SAME_IN_ALL_SHARDS = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings",
                       "padded_vocab_size", "layernorm_epsilon", "norm_epsilon", "bias_gelu_fusion", "openai_gelu", "seed",
                       "tensor_model_parallel_size", "model_parallel_size", "pipeline_model_parallel_size",
                       "virtual_pipeline_model_parallel_size", "untie_embeddings_and_output_weights",
                       "apply_residual_connection_post_layernorm")


@dataclass(frozen=True)
class Located:
    """A tensor of one shard, under the key that the file has for it."""

    tensor: Tensor
    key: str


Chunk = dict[str, Located]  # canonical names, with layer numbers local to the chunk -> tensors


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


def read(shard: Shard) -> Part:
    """Read one shard; raises CheckpointError for a file that is no Megatron checkpoint, or holds more than a model that is read."""
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
    keys = (located.key for chunk in chunks for located in chunk.values())
    newer = next(filter(names.implies_grouped_qkv, keys), None)
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
            raise CheckpointError(f"{label}: unknown key {key}; expected the parameters of a GPT-2 or a BERT") from None
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


def check_grid(parts: list[Part], layout: Layout) -> tuple[int, int]:
    """(tensor, pipeline) parallel sizes; raises CheckpointError for a missing or surplus shard."""
    found = {(part.shard.tensor_rank, part.shard.pipeline_rank) for part in parts}
    tensor, pipeline = (max(ranks) + 1 for ranks in zip(*found, strict=True))
    said_by = "the files found"
    if (args := parts[0].args) is not None:
        tensor = args.get("tensor_model_parallel_size", args.get("model_parallel_size")) or tensor  # the latter before 3.0
        pipeline = args.get("pipeline_model_parallel_size") or pipeline
        said_by = f"args in {parts[0].label}"
    grid = f"{said_by} say tensor parallel {tensor} x pipeline parallel {pipeline}"
    for part in parts:
        if part.shard.tensor_rank >= tensor or part.shard.pipeline_rank >= pipeline:
            raise CheckpointError(f"{part.label}: one shard too many: {grid}")
    missing = sorted({(t, p) for t in range(tensor) for p in range(pipeline)} - found)
    if missing:
        shown = ", ".join(f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") for t, p in missing[:4])
        hint = "; give the directory that holds all shards" if layout.kind == "file" else ""
        raise CheckpointError(f"{layout.label}: missing {len(missing)} of {tensor * pipeline} shards: {shown} ({grid}){hint}")
    return tensor, pipeline


def check_headers(parts: list[Part]) -> None:
    """Raise CheckpointError unless all shards tell the same version, iteration and command line."""
    first = parts[0]
    for part in parts[1:]:
        pairs: list[tuple[str, Any, Any]] = [
            ("checkpoint_version", first.version, part.version),
            ("iteration", first.iteration, part.iteration),
            ("whether it has args", first.args is not None, part.args is not None),
            ("number of virtual pipeline chunks", len(first.chunks), len(part.chunks))]
        if first.args is not None and part.args is not None:
            pairs += [(f"args.{name}", first.args.get(name), part.args.get(name)) for name in _SAME_IN_ALL_SHARDS]
        for what, one, other in pairs:
            if one != other:
                raise CheckpointError(f"{part.label}: a shard of another run: {what} is {other!r}, "
                                      f"but {one!r} in {first.label}")
