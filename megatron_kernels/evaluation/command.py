"""`megatron-kernels evaluate wikitext103 | lambada | text`, alone or as every rank that torchrun starts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..options import signature
from .options import Lambada, Options, Text, WikiText

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from ..checkpoint import Checkpoint
    from ..checkpoint.together import Ranks
    from .datasets import Task
    from .ledger import Ledger

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="""
Score a model as Megatron-LM's zero-shot tasks do: the perplexity of WikiText-103 or of any text, and the accuracy of LAMBADA.

    megatron-kernels evaluate wikitext103 --model gpt2-345m --data wiki.test.tokens --json wikitext103.json
""")
Encode = Callable[[str], list[int]]
Results = Callable[["Ledger"], dict[str, Any]]


def _command(options: type[Options]) -> Callable[[Callable], Callable]:
    """Register a function as the command of its name, with the fields of options for its options."""
    def register(function: Callable) -> Callable:
        def command(**given: Any) -> None:
            function(options(**given))

        command.__doc__ = function.__doc__
        command.__signature__ = signature(options)  # type: ignore[attr-defined]
        app.command(function.__name__)(command)
        return function
    return register


@_command(WikiText)
def wikitext103(options: WikiText) -> None:
    """Perplexity on WikiText-103, per token and per word. Published figures are the latter, "adjusted".

    FILE is wiki.test.tokens of wikitext-103-v1.zip (the word-level text, with `<unk>`), from
    https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip or a copy of it; any text of that kind will do.
    """
    _perplexity(options, "wikitext103", options.overlapping_eval, "wiki")


@_command(Lambada)
def lambada(options: Lambada) -> None:
    """Accuracy on LAMBADA: how often the last word of a passage is the most likely one.

    FILE has JSON lines with "text": lambada_test.jsonl, from https://github.com/cybertronai/bflm, or from
    https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl.
    """
    from .datasets import read_last_words
    from .scoring import accuracy

    def prepare(encode: Encode, length: int) -> tuple[Task, dict[str, Any], Results]:
        task = read_last_words(options.data, options.strict, encode, length + 1)
        return task, {"strict": options.strict}, lambda ledger: accuracy(ledger) | {"scored_targets": task.targets}

    _evaluate(options, "lambada", prepare)


@_command(Text)
def text(options: Text) -> None:
    """Perplexity of any text, as of WikiText-103.

    FILE is plain text in UTF-8. Words, for the adjusted perplexity, are what is between spaces.
    """
    _perplexity(options, "text", options.overlapping_eval, options.detokenizer.value)


def _perplexity(options: Options, name: str, stride: int | None, detokenizer: str) -> None:
    from .datasets import Windows, read_stream
    from .scoring import perplexity

    def prepare(encode: Encode, length: int) -> tuple[Task, dict[str, Any], Results]:
        stream = read_stream(options.data, detokenizer, encode)
        task = Windows(stream.tokens, length, min(32, length) if stride is None else stride)
        return (task, {"overlapping_eval": task.stride, "detokenizer": detokenizer},
                lambda ledger: perplexity(ledger, len(stream.tokens), stream.words) | {
                    "windows": len(task), "scored_targets": task.targets})

    _evaluate(options, name, prepare)


def _evaluate(options: Options, name: str, prepare: Callable[[Encode, int], tuple[Task, dict[str, Any], Results]]) -> None:
    """Load, score, report: one process alone or all ranks together."""
    import torch
    import torch.distributed as dist

    from ..checkpoint.together import ranks_of
    from ..parallel import CollectiveError, failures

    device = _device(options.device)
    started = not dist.is_initialized()
    mesh = _mesh(options.tensor_parallel, device)
    if mesh is not None and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        with ranks_of(mesh) as ranks, failures(mesh):
            _together(options, name, prepare, device, mesh, ranks)
    except torch.OutOfMemoryError:
        raise MemoryError(f"{device}: out of memory with --batch-size {options.batch_size}; a smaller one needs less") from None
    except CollectiveError as error:
        raise ConnectionError(str(error)) from error
    if mesh is not None and started:
        dist.destroy_process_group()


def _together(options: Options, name: str, prepare: Callable[[Encode, int], tuple[Task, dict[str, Any], Results]],
              device: torch.device, mesh: DeviceMesh | None, ranks: Ranks) -> None:
    import torch

    from .. import __version__, cli
    from ..models import GPT2
    from ..parallel import group_of
    from .datasets import encoder
    from .ledger import Ledger, write_json
    from .scoring import evaluate, fingerprint

    replicas = group_of(mesh, "dp")

    def open_ledger() -> Ledger:
        if path is None or ranks.rank:
            return Ledger(len(task))
        own = {"task": name, **settings, "torch": torch.__version__, "megatron_kernels": __version__,
               "model": fingerprint(checkpoint), "data": task.fingerprint()}
        ledger = Ledger(len(task), path, own)
        ledger.save()
        return ledger

    with _one_voice(ranks):
        ranks.guarded(lambda: _check_outputs(options))
        checkpoint = ranks.guarded(lambda: _load(options, ranks.rank == 0))
        length = ranks.guarded(lambda: _length(options, checkpoint))
        tokenizer, where = ranks.guarded(lambda: _tokenizer(options, checkpoint, ranks.rank == 0))
        task, settings, results = ranks.guarded(lambda: prepare(encoder(tokenizer), length))
        settings = {"sequence_length": length, **settings, "batch_size": options.batch_size, "dtype": options.dtype.value,
                    "attention": options.attention.value, "device": device.type, "tensor_parallel": options.tensor_parallel}
        path = options.resume or (options.json and options.json.with_name(f"{options.json.name}.partial"))
        ledger = ranks.guarded(open_ledger)
        ledger.values = ranks.tell(ledger.values)
        if ledger.done and ranks.rank == 0:
            cli._say(f"going on from {path}: {ledger.done:,} of {len(task):,} {task.noun}s")
        model = ranks.guarded(lambda: GPT2.from_checkpoint(checkpoint, getattr(torch, options.dtype.value), mesh=mesh,
                                                           attention=options.attention.value).to(device))
    evaluate(model, task, ledger, options.batch_size, replicas,
             cli._track(f"scoring {len(task):,} {task.noun}s") if ranks.rank == 0 else iter)
    if ranks.rank:
        return
    tokens = sum(task.lengths())
    found = {"task": name, **results(ledger), "settings": {
        "model": str(options.model), "data": str(options.data), "tokenizer": where, **settings, "data_parallel": replicas.size},
        "model_tokens": tokens, "seconds": ledger.seconds, "tokens_per_second": tokens / ledger.seconds}
    _print(found, options.data)
    if options.json is not None:
        write_json(options.json, found)
        if options.resume is None and path is not None:
            path.unlink()


def _device(text: str | None) -> torch.device:
    import torch

    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text}: there are {torch.cuda.device_count()} CUDA devices here")
    return device


def _mesh(tensor_parallel: int, device: torch.device) -> DeviceMesh | None:
    """Of the ranks that torchrun started, tensor parallelism innermost; None for a process alone."""
    import torch.distributed as dist

    from ..parallel import make_mesh

    if not dist.is_torchelastic_launched():
        if tensor_parallel > 1:
            raise ValueError(f"--tensor-parallel {tensor_parallel} needs that many ranks: torchrun --nproc-per-node "
                             f"{tensor_parallel} -m megatron_kernels.cli evaluate ...")
        return None
    if device.index is not None:
        raise ValueError(f"--device {device}: under torchrun each rank takes a device of its own, give cuda")
    try:
        return make_mesh(tensor_parallel=tensor_parallel, device_type=device.type)
    except ValueError:
        if dist.get_rank():
            raise typer.Exit(1) from None
        raise ValueError(f"--tensor-parallel {tensor_parallel} does not divide the {dist.get_world_size()} ranks that torchrun "
                         "started") from None


@contextlib.contextmanager
def _one_voice(ranks: Ranks) -> Any:
    """What goes wrong inside goes wrong on every rank, by `Ranks.guarded`; the first one says it."""
    try:
        yield
    except (ValueError, OSError, MemoryError):
        if ranks.rank == 0:
            raise
        raise typer.Exit(1) from None


def _check_outputs(options: Options) -> None:
    for option, path in (("--json", options.json), ("--resume", options.resume)):
        if path is not None and path.is_dir():
            raise ValueError(f"{option} {path}: is a directory, expected a file")
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{option} {path}: there is no directory {path.parent}")


def _load(options: Options, speaks: bool) -> Checkpoint:
    from .. import cli
    from ..checkpoint import load

    checkpoint = cli._open(options.model, options.config) if speaks else load(options.model, options.config)
    if checkpoint.config.model != "GPT-2":
        raise ValueError(f"{options.model}: a {checkpoint.config.model}, which predicts no next token; expected a GPT-2")
    return checkpoint


def _length(options: Options, checkpoint: Checkpoint) -> int:
    most = checkpoint.config.max_position_embeddings
    length = min(1024, most) if options.sequence_length is None else options.sequence_length
    if length > most:
        raise ValueError(f"--sequence-length {length} is more than the {most} positions of {options.model}")
    return length


def _tokenizer(options: Options, checkpoint: Checkpoint, speaks: bool) -> tuple[Any, str]:
    from .. import cli
    from ..checkpoint.tokenizer import find_tokenizer, given_tokenizer

    given = given_tokenizer(options.tokenizer, options.vocab_file, options.merges_file)
    tokenizer, where = find_tokenizer(options.model) if given is None else (given, str(options.tokenizer or options.vocab_file))
    classes = checkpoint.config.vocab_size
    tokenizer.check(classes)
    ids = tokenizer.load().get_vocab_size()
    if speaks and given is None and where.startswith("the package"):
        cli._say(f"note: no tokenizer beside {options.model}; taking GPT-2's from {where}")
    if speaks and ids + 1024 <= classes:
        cli._say(f"note: the tokenizer has {ids:,} ids, the model {classes:,} classes: is it the model's own?")
    return tokenizer, where


def _print(found: dict[str, Any], data: Path) -> None:
    settings, rows = found["settings"], []
    if "examples" in found:
        what = "whole last word" if settings["strict"] else "last token"
        lines = [f"{data.name}: {found['examples']:,} passages, {what}"]
        rows = [("correct", f"{found['correct']:,}"), ("accuracy", f"{found['accuracy']:.2%}")]
    else:
        lines = [f"{data.name}: {found['tokens']:,} tokens of {found['original_tokens']:,} words; {found['windows']:,} windows of "
                 f"{settings['sequence_length']:,}, moving by {settings['overlapping_eval']:,}"]
        rows = [("loss", f"{found['loss']:.6f}"), ("perplexity", _figure(found["perplexity"])),
                ("adjusted perplexity", _figure(found["adjusted_perplexity"], found["token_ratio"]))]
    lines += [f"  {label:<20} {value}" for label, value in rows]
    lines += [f"  {found['model_tokens']:,} tokens through the model in {found['seconds']:,.1f} s, "
              f"{found['tokens_per_second']:,.0f} a second"]
    typer.echo("\n".join(lines))
    sys.stdout.flush()


def _figure(value: float | None, ratio: float | None = 1.0) -> str:
    if value is not None:
        return f"{value:,.4f}" if value < 1e9 else f"{value:.6g}"
    return "undefined for one word" if ratio is None else "beyond 1e308"
