"""Hugging Face's command for Megatron-LM checkpoints of any parallel layout, which transformers lacks since 5.16.

    python -m megatron_kernels.compat.checkpoint_reshaping_and_interoperability \\
        --convert_checkpoint_from_megatron_to_transformers --load_path iter_0005000 --save_path out

and, without the flag, from Hugging Face to Megatron-LM. Same arguments and files; what the script got wrong is listed in
docs/checkpoints.md. Source of the arguments: transformers 4.37.2 and 4.47.1,
models/megatron_gpt2/checkpoint_reshaping_and_interoperability.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError, Tokenizer, save_megatron
from ..checkpoint.layout import MODEL_FILES
from ..checkpoint.megatron_writer import megatron_args
from ..checkpoint.names import OUTPUT_LAYER, WORD_EMBEDDINGS
from ..checkpoint.reading import read_torch_file
from ..cli import parse_size
from .convert_megatron_gpt2_checkpoint import (
    STAGED,
    Parser,
    filled,
    main,
    open_checkpoint,
    report,
    save_torch,
    say,
    structure,
    write_pytorch_model,
)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DIVISIBLE_BY = 128  # what save_megatron pads the vocabulary to a multiple of
_DIRECTION = "--convert_checkpoint_from_megatron_to_transformers"
_FOR_MEGATRON = ("target_tensor_model_parallel_size", "target_pipeline_model_parallel_size", "target_data_parallel_size",
                 "make_vocab_size_divisible_by", "use_distributed_optimizer")
_FOR_HUGGINGFACE = ("tokenizer_name", "max_shard_size")
_TABLES = {WORD_EMBEDDINGS.canonical: ("language_model/embedding/word_embeddings", "word_embeddings_for_head"),
           OUTPUT_LAYER.canonical: ("language_model/output_layer",)}  # where shards keep what has a row per word


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size such as 10GB or 500MB, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m megatron_kernels.compat.checkpoint_reshaping_and_interoperability",
                    description="Convert a GPT-2 from Hugging Face to Megatron-LM, or the other way.")
    parser.add_argument("--megatron-path", metavar="DIR", help="Accepted; Megatron-LM isn't needed.")
    parser.add_argument(_DIRECTION, action="store_true", help="From Megatron-LM to Hugging Face; without it, the other way.")
    parser.add_argument("--load_path", type=Path, required=True, metavar="PATH", help="Checkpoint to read: a Hugging Face "
                        "directory; an iteration directory of Megatron-LM, the one above, a zip or a .pt file.")
    parser.add_argument("--save_path", type=Path, required=True, metavar="DIR", help="Directory to write.")
    parser.add_argument("--print-checkpoint-structure", action="store_true", help="List what is written, on stdout.")
    parser.add_argument("--target_params_dtype", choices=_DTYPES, default="fp32", help="Of the weights written (default fp32).")
    megatron = parser.add_argument_group("to Megatron-LM")
    for name, what in (("tensor_model", "Tensor"), ("pipeline_model", "Pipeline"), ("data", "Data")):
        megatron.add_argument(f"--target_{name}_parallel_size", type=_positive, default=1, metavar="N",
                              help=f"{what}-parallel size.")
    megatron.add_argument("--make_vocab_size_divisible_by", type=_positive, default=_DIVISIBLE_BY, metavar="N", help="The "
                          "vocabulary is padded to a multiple of this times the tensor-parallel size (default 128).")
    megatron.add_argument("--use_distributed_optimizer", action="store_true", help="Files as Megatron-LM of early 2023 wants them "
                          "for its distributed optimizer: model_rng.pt, and an optim.pt without state per data-parallel rank.")
    huggingface = parser.add_argument_group("to Hugging Face")
    huggingface.add_argument("--tokenizer_name", type=Path, metavar="DIR", help="A local directory with tokenizer.json, or "
                             "vocab.json and merges.txt, which go beside the weights. Nothing is downloaded.")
    huggingface.add_argument("--max_shard_size", type=_size, default=_size("10GB"), metavar="SIZE", help="Split the weights into "
                             "files of at most this size, such as 200MB (default 10GB).")
    return parser


def convert(arguments: list[str] | None = None) -> None:
    """The command itself; raises CheckpointError for what a user can put right."""
    parser = _parser()
    args = parser.parse_args(arguments)
    to_huggingface: bool = args.convert_checkpoint_from_megatron_to_transformers
    idle = [f"--{name}" for name in (_FOR_MEGATRON if to_huggingface else _FOR_HUGGINGFACE)
            if getattr(args, name) != parser.get_default(name)]
    if to_huggingface and args.tokenizer_name is not None and not args.tokenizer_name.is_dir():
        raise CheckpointError(f"--tokenizer_name {args.tokenizer_name}: no such directory; expected a local one with "
                              "tokenizer.json, or vocab.json and merges.txt (nothing is downloaded)")
    model = open_checkpoint(args.load_path, option="--config FILE of `megatron-kernels convert`")
    if (model.format == "megatron") != to_huggingface:
        raise CheckpointError(f"{args.load_path}: a Hugging Face checkpoint; leave {_DIRECTION} out to convert it" if to_huggingface
                              else f"{args.load_path}: a Megatron-LM checkpoint; {_DIRECTION} converts it")
    dtype = _DTYPES[args.target_params_dtype]
    if to_huggingface:
        tokenizer = None if args.tokenizer_name is None else Tokenizer(args.tokenizer_name)
        lines = write_pytorch_model(model, args.save_path, dtype=dtype, tokenizer=tokenizer, max_shard_size=args.max_shard_size)
    else:
        lines = _write_megatron(model, args, dtype)
    if idle:
        say(f"note: without effect in this direction: {', '.join(idle)}")
    report(model, lines if args.print_checkpoint_structure else [],
           f"{args.save_path}: {'huggingface' if to_huggingface else 'megatron'}, {args.target_params_dtype}")


def _write_megatron(model: Checkpoint, args: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    """save_megatron, and what this command adds to it; returns the structure of the shards as lines."""
    if args.load_path.resolve().is_relative_to((args.save_path / "release").resolve()):
        raise CheckpointError(f"{args.save_path}: its release/ holds the source {args.load_path} and would be replaced")
    tensor, pipeline = args.target_tensor_model_parallel_size, args.target_pipeline_model_parallel_size
    lines: list[str] = []
    with filled(args.save_path) as root:
        save_megatron(model, root / STAGED, tensor_parallel=tensor, pipeline_parallel=pipeline, dtype=dtype)
        for path in (root / STAGED).iterdir():
            os.rename(path, root / path.name)
        (root / STAGED).rmdir()
        for stage, rank in itertools.product(range(pipeline), range(tensor)):
            folder = root / "release" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            content = _finish(folder, model, args, dtype, rank, stage)
            if args.print_checkpoint_structure:
                lines += [f"TP rank {rank}, PP rank {stage}:", *structure(content)]
    return lines


def _finish(folder: Path, model: Checkpoint, args: argparse.Namespace, dtype: torch.dtype, rank: int, stage: int) -> dict[str, Any]:
    """Give one shard the vocabulary's padding, the `args` and the file names that were asked for; returns its content."""
    tensor, pipeline, data = (getattr(args, f"target_{name}_parallel_size") for name in ("tensor_model", "pipeline_model", "data"))
    written, wanted = folder / MODEL_FILES[0], folder / MODEL_FILES[bool(args.use_distributed_optimizer)]
    step = args.make_vocab_size_divisible_by * tensor
    rows = -(-model.config.vocab_size // step) * step
    content = read_torch_file(written)
    made = megatron_args(model.config, dtype, tensor, pipeline, stage * tensor + rank, content["iteration"])
    made.make_vocab_size_divisible_by, made.padded_vocab_size = args.make_vocab_size_divisible_by, rows
    made.data_parallel_size, made.world_size = data, tensor * pipeline * data
    content["args"] = made
    if (args.make_vocab_size_divisible_by, data) == (_DIVISIBLE_BY, 1):
        os.rename(written, wanted)
    else:
        for table, name in _tables(content["model"]):
            table["weight"] = _piece(model.tensors[name], model.config.vocab_size, rows, tensor, rank).to(dtype)
        save_torch(content, folder / "rewritten")
        written.unlink()
        os.rename(folder / "rewritten", wanted)
    if args.use_distributed_optimizer:
        for replica in range(data):
            beside = folder.with_name(f"{folder.name}_{replica:03d}")
            beside.mkdir()
            save_torch({"optimizer": {"state": {}, "param_groups": []}}, beside / "optim.pt")
    return content


def _tables(content: dict[str, Any]) -> Iterator[tuple[dict[str, Tensor], str]]:
    """The dictionaries of a shard that hold a table with a row per word, and the table's canonical name."""
    for name, places in _TABLES.items():
        for place in places:
            level: Any = content
            for step in place.split("/"):
                level = level.get(step, {})
            if level:
                yield level, name


def _piece(table: Tensor, vocab_size: int, rows: int, count: int, rank: int) -> Tensor:
    """A rank's rows of the table, which is padded to `rows` by repeating its last word's row, as Megatron-LM's converters do."""
    size = rows // count
    own = table[min(rank * size, vocab_size):min((rank + 1) * size, vocab_size)]
    return torch.cat([own, table[vocab_size - 1:vocab_size].expand(size - own.shape[0], -1)])


if __name__ == "__main__":
    main(convert)
