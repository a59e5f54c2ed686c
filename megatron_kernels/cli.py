"""The command line: megatron-kernels inspect | convert | generate | evaluate | train | demo.

Whatever a user can cause ends in one line on stderr, `error: ...`, and exit code 1; Ctrl-C ends in 130. PyTorch and the rest of
the package are imported by the commands that need them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .evaluation import command as evaluation
from .options import DType
from .training.command import train

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoint, WordPiece

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
                  help="""
Fused kernels for Megatron-style transformers, and the GPT-2 made from them: look into checkpoints, convert them between
Megatron-LM and Hugging Face, and write text with them. No Megatron-LM, no network.

    megatron-kernels convert megatron_gpt2_345m_v0_0.zip out/
""")


class Format(str, Enum):
    """What `convert` writes."""

    huggingface = "huggingface"
    megatron = "megatron"


Config = Annotated[Path | None, typer.Option(
    "--config", metavar="FILE", help="A Hugging Face config.json with what the checkpoint can't tell: heads, original "
    "vocabulary, activation. Needed where there are no args and the shapes aren't those of a 345M release.")]
TokenizerDirectory = Annotated[Path | None, typer.Option(
    "--tokenizer", metavar="DIR", help="Directory with tokenizer.json, or vocab.json and merges.txt; for a BERT with vocab.txt.")]
VocabFile = Annotated[Path | None, typer.Option(
    "--vocab-file", metavar="FILE", help="GPT-2 vocabulary (gpt2-vocab.json), or a BERT's (vocab.txt).")]
MergesFile = Annotated[Path | None, typer.Option("--merges-file", metavar="FILE", help="GPT-2 merges (gpt2-merges.txt).")]


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint: zip, .pt, iteration directory, the one above, or Hugging Face's.")],
    config: Config = None,
    all_layers: Annotated[bool, typer.Option("--all", help="List every layer, also where all layers look the same.")] = False,
) -> None:
    """Show what is in a checkpoint: format, layout, configuration, and the tensors with shapes, dtypes and parameter counts."""
    from .checkpoint import MissingConfigurationError, load

    try:
        checkpoint, open_question = load(path, config), None
    except MissingConfigurationError as error:
        checkpoint, open_question = load(path, error.kind(**error.config)), str(error)
    _print_tables(checkpoint, all_layers, open_question)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint to read: the zip, the .pt, the iteration directory, "
                                           "the directory above it, or a Hugging Face directory.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write; it appears whole or not at all.")],
    to: Annotated[Format, typer.Option(help="Format to write.")] = Format.huggingface,
    tensor_parallel: Annotated[int, typer.Option(help="Megatron only: tensor-parallel size.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Megatron only: pipeline-parallel size.")] = 1,
    dtype: Annotated[DType | None, typer.Option(help="Of the weights written; by default they keep their own.")] = None,
    config: Config = None,
    tokenizer: TokenizerDirectory = None,
    vocab_file: VocabFile = None,
    merges_file: MergesFile = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Hugging Face only: split the weights into files of at "
                                                "most this size, such as 500MB.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint, at the very end.")] = False,
) -> None:
    """Convert a checkpoint to Hugging Face (the default) or to Megatron-LM at any tensor- and pipeline-parallel size.

    A GPT-2 or a BERT: which it is the file tells. The defaults suit the 345M releases of Megatron-LM. Weights are copied bit for
    bit unless --dtype says otherwise; rows that pad the vocabulary are dropped where its true size is known. The tokenizer's
    files, if given, go beside the weights, where AutoTokenizer finds them.
    """
    from . import checkpoint as checkpoints
    from .checkpoint.tokenizer import given_tokenizer

    shard_bytes = parse_size(max_shard_size)
    if to is Format.huggingface and (tensor_parallel, pipeline_parallel) != (1, 1):
        raise ValueError("--tensor-parallel and --pipeline-parallel need --to megatron")
    start = time.perf_counter()
    model = _read(source, config)
    files = (_wordpiece if model.config.model == "BERT" else given_tokenizer)(tokenizer, vocab_file, merges_file)
    _say_notes(model)
    common: dict[str, Any] = {"dtype": _torch_dtype(dtype), "tokenizer": files, "force": force, "track": _track("writing")}
    if to is Format.huggingface:
        checkpoints.save_huggingface(model, destination, max_shard_size=shard_bytes, **common)
    else:
        checkpoints.save_megatron(model, destination, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel,
                                  **common)
    size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    _say(f"wrote {destination}: {to.value}, {_count(model):,} parameters, {size / 1e6:,.1f} MB, "
         f"{time.perf_counter() - start:.1f} s")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint, of either format.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add at most.")] = 50,
    temperature: Annotated[float | None, typer.Option(help="Draw with this temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens that together are this probable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    dtype: Annotated[DType, typer.Option(help="To compute in.")] = DType.float32,
    config: Config = None,
    tokenizer: TokenizerDirectory = None,
    vocab_file: VocabFile = None,
    merges_file: MergesFile = None,
) -> None:
    """Continue a prompt, greedily unless a temperature, --top-k, --top-p or a seed is given.

    The tokenizer is the one beside the model, or the one named by --tokenizer or by --vocab-file and --merges-file.
    """
    import torch

    from .checkpoint.tokenizer import find_tokenizer, given_tokenizer
    from .models import GPT2, GPT2Config

    checkpoint = _read(model, config)
    settings = checkpoint.expect(GPT2Config)
    files = given_tokenizer(tokenizer, vocab_file, merges_file) or find_tokenizer(model)[0]
    _say_notes(checkpoint)
    files.check(settings.padded_vocab_size or settings.vocab_size)
    words = files.load()
    ids = words.encode(prompt).ids
    if not ids:
        raise ValueError("--prompt is empty; give at least one token to continue")
    end = settings.eos_token_id
    end = files.end_of_text if end is None else end
    gpt2 = GPT2.from_checkpoint(checkpoint, _torch_dtype(dtype))
    sample = temperature != 0 and any(value is not None for value in (temperature, top_k, top_p, seed))
    out = gpt2.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens, temperature=temperature or 1.0, top_k=top_k,
                        top_p=top_p, do_sample=sample, seed=seed, eos_token_id=end)[0].tolist()
    while end is not None and len(out) > len(ids) and out[-1] == end:
        out.pop()
    typer.echo(words.decode(out))


app.add_typer(evaluation.app, name="evaluate")


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep what it makes in this new directory: tokenizer, Megatron "
                                             "checkpoint, Hugging Face directory.")] = None,
) -> None:
    """Train a small GPT-2, save it as a Megatron checkpoint, convert it, load it back, write text, and time the fused ops."""
    from .demo import main as run

    run(out)


app.command()(train)


def _open(path: Path, config: Path | None) -> Checkpoint:
    """Load a checkpoint and say what the user should know."""
    checkpoint = _read(path, config)
    _say_notes(checkpoint)
    return checkpoint


def _read(path: Path, config: Path | None) -> Checkpoint:
    """Load a checkpoint, with a spinner on a terminal (archives take a while to unpack)."""
    from .checkpoint import load

    with contextlib.ExitStack() as stack:
        if sys.stderr.isatty():
            from rich.console import Console

            stack.enter_context(Console(stderr=True).status(f"reading {path}"))
        return load(path, config)


def _say_notes(checkpoint: Checkpoint) -> None:
    for note in checkpoint.notes:
        _say(f"note: {note}")


def _wordpiece(directory: Path | None, vocab_file: Path | None, merges_file: Path | None) -> WordPiece | None:
    """The vocabulary of a BERT that the options name."""
    from .checkpoint import WordPiece

    if merges_file is not None or (directory is not None and vocab_file is not None):
        raise ValueError("a BERT takes a WordPiece vocabulary: --vocab-file FILE or --tokenizer DIR, and no merges")
    path = directory if vocab_file is None else vocab_file
    return None if path is None else WordPiece(path)


def _torch_dtype(dtype: DType | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def parse_size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"--max-shard-size: expected a size such as 5GB or 500MB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def _count(checkpoint: Checkpoint) -> int:
    import math

    return sum(math.prod(checkpoint.meta(name)[0]) for name in checkpoint.tensors)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _track(action: str) -> Callable[[list[Any]], Iterable[Any]]:
    """A progress bar over a list of things to do, on stderr; nothing but the list where that is no terminal."""
    if not sys.stderr.isatty():
        return iter
    from rich.console import Console
    from rich.progress import track

    return lambda things: track(things, description=action, console=Console(stderr=True), transient=True)


def _print_tables(checkpoint: Checkpoint, all_layers: bool, open_question: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    facts = Table(title=str(checkpoint.source), show_header=False, title_justify="left")
    rows: dict[str, Any] = {"format": checkpoint.format, **checkpoint.details}
    if checkpoint.iteration is not None:
        rows["iteration"] = checkpoint.iteration
    config = checkpoint.config
    guessed = ("num_attention_heads", "vocab_size", "gelu_approximate") if open_question else ()
    rows |= {name: "unknown" if name in guessed else value for name, value in vars(config).items() if name != "attention"}
    for name, value in rows.items():
        facts.add_row(name, str(value), style=None)
    console.print(facts)
    tensors = Table("tensor", "shape", "dtype", "parameters", title="tensors, as assembled", title_justify="left")
    for label, shape, dtype, count in _tensor_rows(checkpoint, all_layers):
        tensors.add_row(label, str(list(shape)), dtype, f"{count:,}")
    tensors.add_section()
    tensors.add_row(f"{len(checkpoint.tensors)} tensors", "", "", f"{_count(checkpoint):,}")
    console.print(tensors)
    for note in (open_question, *checkpoint.notes):
        if note:
            console.print(f"note: {note}", markup=False, soft_wrap=True)


def _tensor_rows(checkpoint: Checkpoint, all_layers: bool) -> list[tuple[str, tuple[int, ...], str, int]]:
    """A row per tensor, or per group of tensors that differ in nothing but the layer."""
    import math

    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for name in checkpoint.tensors:
        shape, dtype = checkpoint.meta(name)
        general = name if all_layers else re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
        groups.setdefault((general, shape, str(dtype).removeprefix("torch.")), []).append(name)
    return [(name if len(found) == 1 else f"{name}  x {len(found)}", shape, dtype, len(found) * math.prod(shape))
            for (name, shape, dtype), found in groups.items()]


def _printable(text: str) -> str:
    """One line without control characters: names from a file end up in messages."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split("\n")))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors that a user can cause become one line on stderr."""
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="megatron-kernels", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes at exit
        return 1
    except (ValueError, OSError, MemoryError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        _say(f"error: {_printable(message or type(error).__name__)}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # what click raises for a wrong command line
            raise
        if text := error.format_message():
            _say(f"error: {_printable(text)}")
    return 1


def main() -> None:
    """Entry point of `megatron-kernels`."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that half-written output is removed
    sys.exit(run())


if __name__ == "__main__":
    main()
