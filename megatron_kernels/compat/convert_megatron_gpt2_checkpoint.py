"""The command that Hugging Face's MegatronGPT2 page tells people to run, and wheels of transformers lack since 4.48.

    python -m megatron_kernels.compat.convert_megatron_gpt2_checkpoint megatron_gpt2_345m_v0_0.zip

Same arguments, and the same files beside the checkpoint: config.json and pytorch_model.bin. No Megatron-LM and no network; what
the script got wrong is listed in docs/checkpoints.md. Source of the arguments: transformers 4.37.2 and 4.47.1,
models/megatron_gpt2/convert_megatron_gpt2_checkpoint.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError, load, save_huggingface
from ..checkpoint.atomic import atomic_directory
from ..checkpoint.names import OUTPUT_LAYER, WORD_EMBEDDINGS, huggingface_key
from ..checkpoint.reading import first_line
from ..models.config import GPT2Config

_WEIGHTS, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PREFERRED = ("model.safetensors", "model.safetensors.index.json")  # where these are, loaders don't look for _WEIGHTS
STAGED = "staged"  # what the functions of megatron_kernels.checkpoint write, before it gets its final form
_LAST = ("config.json", "latest_checkpointed_iteration.txt")  # they make a directory a checkpoint, so they come last


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other error: as one line."""

    def error(self, message: str) -> NoReturn:
        raise CheckpointError(f"{message} (--help lists the arguments)")


def say(line: str) -> None:
    """A line for the user, on stderr: stdout is the structure's alone. Names from a file can't put control characters in it."""
    print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)


def run(command: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> int:
    """Exit code of a command: 0; 2 with one line on stderr for what a user can put right; 130 after Ctrl-C."""
    try:
        command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes at exit
        return 2
    except (ValueError, OSError, MemoryError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        say(f"error: {' '.join(text.split()) or type(error).__name__}")
        return 2
    return 0


def main(command: Callable[[list[str] | None], None]) -> NoReturn:
    """Run a command as the whole process."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that half-written output is removed
    sys.exit(run(command))


def open_checkpoint(path: Path, config: Path | None = None, *, option: str) -> Checkpoint:
    """Load a GPT-2's checkpoint; its notes and messages name `option` as the one that takes a configuration."""
    def ours(text: str) -> str:
        return text.replace("--config FILE", option)

    try:
        model = load(path, config)
        model.expect(GPT2Config)
    except CheckpointError as error:
        raise CheckpointError(ours(str(error))) from None
    return replace(model, notes=tuple(map(ours, model.notes)))


def report(model: Checkpoint, lines: list[str], wrote: str) -> None:
    """What a command says in the end: the structure on stdout, all else on stderr."""
    for line in lines:
        print(line)
    for note in model.notes:
        say(f"note: {note}")
    say(f"wrote {wrote}")


def structure(tree: Mapping[str, Any], depth: int = 1) -> Iterator[str]:
    """Lines of --print-checkpoint-structure: a name in a column of 48, two dots per level in front, and what it is."""
    for name, value in tree.items():
        line = "." * (2 * depth - 2) + f"# {name:{max(50 - 2 * depth, 0)}s}"
        if isinstance(value, Mapping):
            yield line
            yield from structure(value, depth + 1)
        else:
            yield f"{line} : {value.shape if isinstance(value, Tensor) else value}"


@contextlib.contextmanager
def filled(directory: Path) -> Iterator[Path]:
    """A temporary directory whose entries end up in `directory`, which may hold other things already.

    A new or empty directory appears whole or not at all. Into one with content each entry is moved by a rename of its own, those
    that make it a checkpoint last, replacing an entry of that name; until then an error or Ctrl-C leaves it as it was.
    Raises CheckpointError for what the operating system reports, and words errors of the block as errors of `directory`.
    """
    fresh = not directory.is_dir() or not any(directory.iterdir())
    hidden = root = directory if fresh else directory / f".conversion-{os.getpid()}"
    try:
        with atomic_directory(hidden) as root:
            yield root
    except CheckpointError as error:
        text = str(error)
        for inner in (root / STAGED, root, Path(os.path.realpath(hidden))):
            text = text.replace(str(inner), str(directory))
        raise CheckpointError(text) from error.__cause__
    if fresh:
        return
    try:
        for path in sorted(hidden.iterdir(), key=lambda path: (path.name in _LAST, path.name)):
            target, replaced = directory / path.name, hidden / f".{path.name}"
            try:
                if path.is_dir() and target.exists():
                    os.rename(target, replaced)  # a rename doesn't replace a directory with content
                os.replace(path, target)
            except BaseException:
                if replaced.exists():
                    os.rename(replaced, target)
                raise
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def save_torch(content: Any, path: Path) -> None:
    """torch.save to a new file; OSError for what the operating system reports, CheckpointError for the rest."""
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch.save reports a full disk as an error of its own
        raise cause or CheckpointError(f"{path.name}: cannot write ({first_line(error)})") from None


def write_pytorch_model(model: Checkpoint, directory: Path, **options: Any) -> list[str]:
    """Write a Hugging Face directory with pickled weights, pytorch_model.bin or its shards, and return its structure as lines.

    `options` are those of save_huggingface. As in files of transformers 4, a tied head is in there under its own name, at no
    cost. Raises CheckpointError like save_huggingface, and where safetensors in `directory` would be loaded instead.
    """
    for name in _PREFERRED:
        if (directory / name).exists():
            raise CheckpointError(f"{directory}: holds {name}, which would be loaded instead of the {_WEIGHTS} to be written; "
                                  "move it away")
    tied = not model.config.untie_embeddings_and_output_weights
    embeddings, head = huggingface_key(WORD_EMBEDDINGS), huggingface_key(OUTPUT_LAYER)
    lines: list[str] = []
    with filled(directory) as root:
        made = root / STAGED
        save_huggingface(model, made, **options)
        for path in sorted(made.iterdir()):
            target = root / f"pytorch_{path.name}".replace(".safetensors", ".bin")
            if path.suffix == ".safetensors":
                tensors = load_file(path)  # mapped, so that no more than the pages being written are in memory
                if tied and embeddings in tensors:
                    tensors[head] = tensors[embeddings]
                save_torch(tensors, target)
                lines += structure(tensors)
                del tensors
            elif path.name == _PREFERRED[1]:
                index = json.loads(path.read_text(encoding="utf-8"))
                files = index["weight_map"]
                if tied:
                    files[head] = files[embeddings]
                index["weight_map"] = {key: f"pytorch_{file}".replace(".safetensors", ".bin") for key, file in files.items()}
                target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            else:
                os.rename(path, root / path.name)
        shutil.rmtree(made)
        stale = _WEIGHTS if (root / _INDEX).exists() else _INDEX
    (directory / stale).unlink(missing_ok=True)  # of an earlier run with another --max_shard_size
    return lines


def convert(arguments: list[str] | None = None) -> None:
    """The command itself; raises CheckpointError for what a user can put right."""
    parser = Parser(prog="python -m megatron_kernels.compat.convert_megatron_gpt2_checkpoint",
                    description="Convert a Megatron-LM GPT-2 to Hugging Face: config.json and pytorch_model.bin, beside it.")
    parser.add_argument("--print-checkpoint-structure", action="store_true", help="List the tensors written, on stdout.")
    parser.add_argument("path_to_checkpoint", type=Path, help="The zip archive, or a .pt file.")
    parser.add_argument("--config_file", type=Path, default=None, metavar="FILE", help="A Hugging Face config.json with what the "
                        "checkpoint can't tell: heads, original vocabulary, activation.")
    args = parser.parse_args(arguments)
    path: Path = args.path_to_checkpoint
    if path.is_dir():
        raise CheckpointError(f"{path}: a directory; give the .zip or .pt file, or convert a directory with "
                              "megatron_kernels.compat.checkpoint_reshaping_and_interoperability")
    if path.name == _WEIGHTS:
        raise CheckpointError(f"{path}: the output beside it would have the same name; rename it")
    # Hugging Face's default for the configuration file was an empty string, which scripts pass on.
    config = args.config_file if args.config_file not in (None, Path("")) else None
    model = open_checkpoint(path, config, option="--config_file FILE")
    lines = write_pytorch_model(model, path.parent)
    report(model, lines if args.print_checkpoint_structure else [], f"config.json and {_WEIGHTS} to {path.parent}")
    if not any((path.parent / name).exists() for name in ("tokenizer.json", "vocab.json")):
        say(f"note: no tokenizer is beside them; transformers wants vocab.json and merges.txt in {path.parent}")


if __name__ == "__main__":
    main(convert)
