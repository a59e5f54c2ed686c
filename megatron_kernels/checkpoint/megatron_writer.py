"""Writing Megatron-LM checkpoints for any tensor- and pipeline-parallel size.

The files are those of checkpoint version 3.0 under `release/`, which Megatron-LM loads without optimizer state. torch.save
wants all tensors of a file at once, so the pieces of a pipeline stage are first written to scratch files, tensor by tensor,
and torch.save copies from their memory maps: the process never holds more than one whole tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..models.config import BertConfig, ModelConfig
from . import bert, names
from .atomic import atomic_directory
from .errors import CheckpointError
from .layout import MODEL_FILES, TRACKER
from .reading import first_line
from .safetensors_file import write_tensor
from .tensors import Checkpoint
from .tokenizer import Tokenizer
from .wordpiece import WordPiece, check_tokenizer

_VOCAB_DIVISIBLE_BY = 128
_ALIGNMENT = 64


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the word embeddings in Megatron-LM: the vocabulary rounded up to a multiple of 128 x tensor-parallel size."""
    step = _VOCAB_DIVISIBLE_BY * tensor_parallel
    return -(-vocab_size // step) * step


def _pad_vocab(table: Tensor, vocab_size: int, rows: int) -> Tensor:
    """`table` (or the bias beside it) with `rows` rows: padding it already has is kept, new rows repeat the last class.

    Zeros would not do: logits of the classes are often far below zero, and a row of zeros would outrank them all.
    """
    kept = table[:rows]
    if kept.shape[0] == rows:
        return kept
    return torch.cat([kept, table[vocab_size - 1:vocab_size].expand(rows - kept.shape[0], *table.shape[1:])])


class _Scratch:
    """Tensors laid into a file, and handed back as memory-mapped ones with a storage each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed in `tensors` and `remove`)
        self.places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        self.file.write(b"\0" * (-self.file.tell() % _ALIGNMENT))
        self.places[key] = (self.file.tell(), tuple(tensor.shape), tensor.dtype)
        write_tensor(self.file, tensor, (tuple(tensor.shape), tensor.dtype), key)

    def tensors(self) -> dict[str, Tensor]:
        self.file.close()
        with open(self.path, "r+b") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {key: torch.frombuffer(mapping, dtype=dtype, count=torch.Size(shape).numel(), offset=offset).view(shape)
                for key, (offset, shape, dtype) in self.places.items()}

    def remove(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _scratches(root: Path, count: int) -> Iterator[list[_Scratch]]:
    scratches: list[_Scratch] = []
    try:
        for i in range(count):
            scratches.append(_Scratch(root / f"scratch-{i}"))
        yield scratches
    finally:
        for scratch in scratches:
            with contextlib.suppress(OSError):
                scratch.remove()


def megatron_args(config: ModelConfig, dtype: torch.dtype, tensor_parallel: int, pipeline_parallel: int, rank: int,
                  iteration: int) -> argparse.Namespace:
    """The command line that Megatron-LM would have saved: what it, and converters of its checkpoints, read back."""
    tanh = config.gelu_approximate == "tanh"
    heads = config.num_attention_heads
    args = argparse.Namespace(
        num_layers=config.num_layers, encoder_num_layers=config.num_layers, hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size, num_attention_heads=heads, kv_channels=config.hidden_size // heads,
        group_query_attention=False, num_query_groups=1, seq_length=config.max_position_embeddings,
        encoder_seq_length=config.max_position_embeddings, max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="learned_absolute", add_position_embedding=True, use_rotary_position_embeddings=False,
        orig_vocab_size=config.vocab_size, padded_vocab_size=padded_vocab_size(config.vocab_size, tensor_parallel),
        make_vocab_size_divisible_by=_VOCAB_DIVISIBLE_BY, tokenizer_type="GPT2BPETokenizer", tokenizer_model=None,
        vocab_file=None, merge_file=None, untie_embeddings_and_output_weights=config.untie_embeddings_and_output_weights,
        layernorm_epsilon=config.layernorm_epsilon, norm_epsilon=config.layernorm_epsilon, normalization="LayerNorm",
        apply_layernorm_1p=False, apply_residual_connection_post_layernorm=False, add_bias_linear=True, swiglu=False,
        squared_relu=False, bias_gelu_fusion=tanh, openai_gelu=False, onnx_safe=None, bias_dropout_fusion=True,
        masked_softmax_fusion=True, apply_query_key_layer_scaling=False, attention_softmax_in_fp32=False,
        hidden_dropout=config.hidden_dropout, attention_dropout=config.attention_dropout,
        init_method_std=config.init_method_std, num_experts=None, transformer_impl="local", params_dtype=dtype,
        fp16=dtype is torch.float16, bf16=dtype is torch.bfloat16, tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel, virtual_pipeline_model_parallel_size=None, data_parallel_size=1,
        world_size=tensor_parallel * pipeline_parallel, rank=rank, iteration=iteration, consumed_train_samples=0,
        consumed_valid_samples=0)
    if isinstance(config, BertConfig):
        vars(args).update(bert.megatron_args(config))
    else:
        vars(args).update(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    return args


def _stage(config: ModelConfig, rank: int, size: int) -> Iterator[tuple[names.Parameter, str]]:
    """The parameters of a pipeline stage, and their keys in the file: path and, below `encoder`, a flat key."""
    layers = config.num_layers // size
    is_bert = isinstance(config, BertConfig)
    if rank == 0:
        yield names.WORD_EMBEDDINGS, "language_model/embedding/word_embeddings/weight"
        yield names.POSITION_EMBEDDINGS, "language_model/embedding/position_embeddings/weight"
        if config.num_tokentypes:
            yield names.TOKENTYPE_EMBEDDINGS, "language_model/embedding/tokentype_embeddings/weight"
    for local in range(layers):
        for row in names.LAYER:
            yield (row.of_layer(rank * layers + local, "encoder" if is_bert else "decoder"),
                   f"language_model/encoder/layers.{local}.{row.megatron}")
    if rank == size - 1:
        for parameter in names.final_norm(config):
            yield parameter, f"language_model/encoder/{parameter.megatron}"
        if isinstance(config, BertConfig):
            for parameter in names.LM_HEAD + (names.BINARY_HEAD if config.add_binary_head else ()):
                module, rest = parameter.megatron.split(".", 1)
                yield parameter, f"{'language_model/' if module == 'pooler' else ''}{module}/{rest}"
        if config.untie_embeddings_and_output_weights:
            yield names.OUTPUT_LAYER, "language_model/output_layer/weight"
        elif size > 1:
            yield names.WORD_EMBEDDINGS, "word_embeddings_for_head/weight"


def _pieces(tensor: Tensor, split: int | None, count: int) -> Sequence[Tensor]:
    return [tensor] * count if split is None else tensor.chunk(count, split)


def _nest(tensors: dict[str, Tensor]) -> dict[str, Any]:
    model: dict[str, Any] = {"language_model": {"encoder": {}}}
    for key, tensor in tensors.items():
        *path, last = key.split("/")
        level = model
        for step in path:
            level = level.setdefault(step, {})
        level[last] = tensor
    return model


def save_megatron(checkpoint: Checkpoint, directory: str | os.PathLike[str], *, tensor_parallel: int = 1,
                  pipeline_parallel: int = 1, dtype: torch.dtype | None = None,
                  tokenizer: Tokenizer | WordPiece | None = None, force: bool = False,
                  track: Callable[[list[Any]], Iterable[Any]] = iter) -> None:
    """Write directory/release/mp_rank_TT[_PPP]/model_optim_rng.pt and the tracker file, atomically.

    dtype None keeps each tensor's own. The vocabulary is padded to a multiple of 128 x tensor_parallel. tensor_parallel must
    divide heads, hidden and feed-forward size, pipeline_parallel the layers: CheckpointError otherwise, as for a destination
    that can't be written. `tokenizer` puts its files beside `release`. `force` replaces an existing checkpoint at the very end.
    `track` wraps the parameters of each stage, for progress.
    """
    config = checkpoint.config
    names.check_parallel(config, tensor_parallel, pipeline_parallel)
    check_tokenizer(tokenizer, config)
    rows = padded_vocab_size(config.vocab_size, tensor_parallel)
    with atomic_directory(directory, force=force, source=checkpoint.source) as root:
        for stage in range(pipeline_parallel):
            with _scratches(root, tensor_parallel) as scratches:
                for parameter, key in track(list(_stage(config, stage, pipeline_parallel))):
                    tensor = checkpoint.tensors[parameter.canonical]
                    if parameter.symbols[0] == "v":
                        tensor = _pad_vocab(tensor, config.vocab_size, rows)
                    for scratch, piece in zip(scratches, _pieces(tensor, parameter.split, tensor_parallel), strict=True):
                        scratch.add(key, piece.to(dtype or piece.dtype))
                    del tensor, piece
                for rank, scratch in enumerate(scratches):
                    folder = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline_parallel > 1 else "")
                    iteration = checkpoint.iteration or 0
                    _save(root / "release" / folder / MODEL_FILES[0], {
                        "args": megatron_args(config, dtype or checkpoint.dtype, tensor_parallel, pipeline_parallel,
                                              stage * tensor_parallel + rank, iteration),
                        "checkpoint_version": 3.0, "iteration": iteration, "model": _nest(scratch.tensors())})
                    scratch.remove()
        (root / TRACKER).write_text("release")
        if tokenizer is not None:
            tokenizer.write(root, config.max_position_embeddings)


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        guard = _Guard(file)
        try:
            torch.save(content, guard)  # type: ignore[arg-type]
        except Exception as error:
            if guard.error is not None:
                raise guard.error from None
            raise CheckpointError(f"{path.name}: cannot write ({first_line(error)})") from error


class _Guard:
    """A file that remembers the first OSError of a write: torch.save reports a full disk as an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()
