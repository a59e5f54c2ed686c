"""What is there before the first iteration: the mesh, the samples, and the checks that need to know the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import checkpoint, parallel
from ..checkpoint.together import ranks_of
from ..checkpoint.tokenizer import given_tokenizer, tokenizer_beside
from ..models import GPT2Config
from .data import Samples, split
from .options import Options, Replicas
from .tokens import DataError, Tokens, open_tokens


def make_mesh(options: Options) -> DeviceMesh | None:
    """All ranks that torchrun started; None for a process alone. Raises ValueError for sizes that do not fit."""
    if dist.is_torchelastic_launched():
        return parallel.make_mesh(tensor_parallel=options.tensor_parallel, pipeline_parallel=options.pipeline_parallel,
                                  device_type=device_type(options))
    wanted = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in ("tensor_parallel", "pipeline_parallel")
              if getattr(options, name) > 1]
    wanted += ["--data-parallel fsdp"] if options.data_parallel is Replicas.fsdp else []
    if wanted:
        raise ValueError(f"{', '.join(wanted)}: needs several processes, as in torchrun --nproc-per-node N --no-python "
                         "megatron-kernels train ...")
    return None


def device_type(options: Options) -> str:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def find_tokenizer(options: Options) -> checkpoint.Tokenizer | None:
    """The tokenizer that is given, or else the one beside the model. A package's is not looked for: ids may come in files."""
    given = given_tokenizer(options.tokenizer, options.vocab_file, options.merges_file)
    return given or (None if options.model is None else tokenizer_beside(options.model))


def find_samples(options: Options, tokenizer: checkpoint.Tokenizer | None,
                 mesh: DeviceMesh | None) -> tuple[Samples, Samples | None]:
    """Samples to train on and to score; texts are tokenised by the first rank, which the others wait for."""
    def opened() -> tuple[Tokens, Tokens | None]:
        return (open_tokens(options.data, tokenizer, options.data_cache),
                open_tokens(options.valid_data, tokenizer, options.data_cache) if options.valid_data else None)

    with ranks_of(mesh) as ranks:
        ranks.first(lambda: (opened(), None)[1])
    tokens, apart = opened()
    samples, scored = split(tokens, options.seq_length, options.valid_fraction, options.seed)
    if apart is not None:
        scored, _ = split(apart, options.seq_length, 0.0, options.seed)
        scored.seed = None
    return samples, scored


def check_fit(options: Options, config: GPT2Config, samples: Samples, scored: Samples | None, global_batch: int,
              tokenizer: checkpoint.Tokenizer | None) -> None:
    """Raise ValueError where data, model, and what is to be exported do not fit together."""
    for part in (samples, scored):
        for file in part.tokens.files if part is not None else ():
            if file.vocab_size is not None and file.vocab_size > config.vocab_size:
                raise DataError(f"{file.path}: of a vocabulary of {file.vocab_size}, but the model's has {config.vocab_size}")
    if options.seq_length > config.max_position_embeddings:
        raise ValueError(f"--seq-length {options.seq_length} is more than the model's {config.max_position_embeddings} positions")
    if scored is not None and scored.count < global_batch:
        raise ValueError(f"{scored.count} samples to score are fewer than a global batch of {global_batch}")
    if tokenizer is not None and (options.export_huggingface or options.export_megatron):
        tokenizer.check(config.vocab_size)
    tp, pp = options.export_tensor_parallel, options.export_pipeline_parallel
    if options.export_megatron and (config.num_attention_heads % tp or config.ffn_hidden_size % tp or config.num_layers % pp):
        raise ValueError(f"--export-megatron: {config.num_attention_heads} heads and {config.num_layers} layers can't be shared "
                         f"out over {tp} tensor-parallel and {pp} pipeline ranks")


def identity(options: Options, samples: Samples, global_batch: int) -> dict[str, Any]:
    """What must not change between two parts of a run, or the order of its samples would."""
    return {"data": samples.tokens.digest[:16], "samples": samples.count, "--seq-length": samples.seq_length,
            "--global-batch-size": global_batch, "--seed": options.seed}


def in_vocabulary(pieces: Sequence[Tensor], vocab_size: int) -> list[Tensor]:
    """The pieces. Raises DataError for an id that the model has no row for: files of Megatron-LM do not tell their vocabulary."""
    for piece in pieces:
        low, high = piece.min().item(), piece.max().item()
        if low < 0 or high >= vocab_size:
            raise DataError(f"the data has the token id {low if low < 0 else high}, expected 0 to {vocab_size - 1}")
    return list(pieces)
