"""The whole job on a small scale: train a GPT-2, save it as Megatron-LM would, convert it, load it, write text, time the ops.

Needs no network and no data: the text is the documentation of Python's own library.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from . import bias_gelu, checkpoint, cross_entropy, layer_norm, scaled_masked_softmax
from .models import GPT2, GPT2Config

END_OF_TEXT = "<|endoftext|>"
LENGTH, BATCH = 128, 8
TOLERANCE = 1e-4  # of logits computed in float32 by another implementation
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
_EXPECTED = (SyntaxError, ValueError, UnicodeError, RecursionError)


def main(out: str | Path | None = None, *, steps: int = 600, compiled: bool = True, console: Console | None = None) -> None:
    """Run the demo and print what happens.

    Args:
        out: directory that receives the tokenizer, the Megatron checkpoint and the Hugging Face directory. None: a temporary
            directory, removed at the end.
        steps: of training, each on 8 sequences of 128 tokens.
        compiled: also time torch.compile, which has to compile eight functions first.

    Raises:
        FileExistsError: out holds something already.
        RuntimeError: a model that was loaded back gives other logits.
    """
    console = console or Console()
    start = time.perf_counter()
    if out is not None and Path(out).exists() and any(Path(out).iterdir()):
        raise FileExistsError(f"{out}: not empty; the demo writes into a new or empty directory")
    with contextlib.nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        text = documentation(console)
        tokenizer, ids = tokenize(text, root / "tokenizer", console)
        model = train(ids, tokenizer, steps, console)
        model = save_and_load(model, ids[None, :LENGTH], root, console)
        write_text(model, tokenizer, "Return a list of", console)
        compare_ops(compiled, console)
        if out is not None:
            _say(console, f"\nThe tokenizer and both checkpoints are in {root}.")
    _say(console, f"\nDone in {time.perf_counter() - start:.0f} s.")


def documentation(console: Console, limit: int | None = None) -> list[str]:
    """The documentation strings of the standard library's modules, classes and functions; at most `limit` files are read."""
    console.rule("Text")
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not _SKIPPED & set(path.relative_to(root).parts)][:limit]
    texts: list[str] = []
    with _progress(console, "reading Python's library") as (advance, _):
        for path in advance(paths):
            with contextlib.suppress(*_EXPECTED):
                nodes = ast.walk(ast.parse(path.read_bytes()))
                found = (ast.get_docstring(node) for node in nodes
                         if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
                texts += [text for text in found if text]
    _say(console, f"{len(texts):,} documentation strings, {sum(map(len, texts)):,} characters, from {root}")
    return texts


def tokenize(texts: list[str], directory: Path, console: Console, vocab_size: int = 2000) -> tuple[Any, Tensor]:
    """Train a byte-level BPE, as GPT-2's, on the texts and save it; the tokenizer, and all texts as one row of token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in (*encoding.ids, end)]
    _say(console, f"byte-level BPE of {tokenizer.get_vocab_size():,} tokens; the text is {len(ids):,} of them")
    return tokenizer, torch.tensor(ids)


def train(ids: Tensor, tokenizer: Any, steps: int, console: Console) -> GPT2:
    """A small GPT-2, trained with AdamW on random pieces of the text; the last 5% are kept apart to score it."""
    vocab_size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(num_layers=4, hidden_size=128, num_attention_heads=4, max_position_embeddings=LENGTH,
                        vocab_size=vocab_size, padded_vocab_size=-(-vocab_size // 128) * 128, hidden_dropout=0.0,
                        embedding_dropout=0.0, attention_dropout=0.0, bos_token_id=end, eos_token_id=end)
    model = GPT2(config, seed=0)
    console.rule("Training")
    _say(console, f"{config.num_layers} layers, {config.hidden_size} hidden, {config.num_attention_heads} heads: "
                  f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    split = len(ids) - max(len(ids) // 20, LENGTH)
    held_out = ids[split:][:32 * LENGTH]
    held_out = held_out[:len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 3e-3 * min((step + 1) / 20, 1) * (
        0.55 + 0.45 * math.cos(math.pi * step / max(steps, 1))))
    before, draws, begin = score(model, held_out), torch.Generator().manual_seed(0), time.perf_counter()
    with _progress(console, "training") as (advance, note):
        for step in advance(range(steps)):
            first = torch.randint(split - LENGTH, (BATCH, 1), generator=draws)
            batch = ids[first + torch.arange(LENGTH)]
            loss = model(batch, labels=batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            note(f"loss {loss.item():.2f}, {BATCH * (step + 1) / (time.perf_counter() - begin):.0f} samples/s")
    seconds = time.perf_counter() - begin
    _say(console, f"{steps} steps in {seconds:.0f} s, {BATCH * steps / seconds:.0f} samples/s; loss on text it was not trained "
                  f"on: {before:.2f} before, {score(model, held_out):.2f} after")
    return model.eval()


@torch.no_grad()
def score(model: GPT2, rows: Tensor) -> float:
    model.eval()
    loss = model(rows, labels=rows).item()
    model.train()
    return loss


def save_and_load(model: GPT2, ids: Tensor, root: Path, console: Console) -> GPT2:
    """Save for two tensor-parallel ranks, convert to Hugging Face, load both, compare logits; returns the converted model."""
    console.rule("Checkpoints")
    tokenizer = checkpoint.Tokenizer(directory=root / "tokenizer")
    model.save_megatron(root / "megatron", tensor_parallel=2, tokenizer=tokenizer)
    for path in sorted((root / "megatron").rglob("*.pt")):
        _say(console, f"Megatron-LM: {path.relative_to(root)}, {path.stat().st_size:,} bytes")
    checkpoint.save_huggingface(checkpoint.load(root / "megatron"), root / "huggingface", tokenizer=tokenizer)
    path = root / "huggingface" / "model.safetensors"
    _say(console, f"converted to Hugging Face: {path.relative_to(root)}, {path.stat().st_size:,} bytes")
    converted = GPT2.from_huggingface(root / "huggingface")
    with torch.no_grad():
        expected = model(ids)
        found = {"loaded from the Megatron-LM checkpoint": (GPT2.from_megatron(root / "megatron")(ids), 0.0),
                 "loaded from the Hugging Face directory": (converted(ids), 0.0)}
        try:
            from transformers import GPT2LMHeadModel
            from transformers.utils.logging import disable_progress_bar
        except ImportError:
            _say(console, "transformers is not installed, so its GPT-2 is not compared")
        else:
            disable_progress_bar()
            theirs = GPT2LMHeadModel.from_pretrained(root / "huggingface").eval()
            found["Hugging Face's own model of that directory"] = (theirs(ids).logits, TOLERANCE)
    for name, (logits, allowed) in found.items():
        difference = (logits - expected).abs().max().item()
        if not difference <= allowed:
            raise RuntimeError(f"{name}: logits differ from the trained model's by {difference:.1e}, allowed {allowed:.0e}")
        agree = "identical" if torch.equal(logits, expected) else f"largest difference {difference:.1e} (allowed {allowed:.0e})"
        _say(console, f"logits of the model {name}: {agree}")
    return converted


def write_text(model: GPT2, tokenizer: Any, prompt: str, console: Console) -> None:
    console.rule("Writing")
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    for seed in (1, 2):
        row = model.generate(ids, max_new_tokens=60, do_sample=True, top_p=0.9, temperature=0.7, seed=seed,
                             eos_token_id=model.config.eos_token_id)[0].tolist()
        console.print(f"[bold]temperature 0.7, top-p 0.9, seed {seed}:[/bold] ", end="")
        _say(console, tokenizer.decode(row))


def compare_ops(compiled: bool, console: Console) -> None:
    """Print forward + backward of each op beside PyTorch eager and torch.compile, taking turns, medians."""
    console.rule("Fused ops, forward + backward, milliseconds")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # the compiler's remarks on machines without a GPU
    table = Table("op", "shape", "", "ours", "eager", "compiled", "speedup", box=box.SIMPLE)
    for column in table.columns:
        column.no_wrap, column.justify = True, "left" if column.header in ("op", "shape", "") else "right"
    problem = "" if compiled else "not asked for"
    for name, shape, ours, plain, make in _ops():
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            inputs = make(shape, dtype)
            gradient = torch.randn_like(ours(*inputs).detach())
            contestants = {"ours": _both(ours, inputs, gradient), "eager": _both(plain, inputs, gradient)}
            if not problem:
                contestants["compiled"] = _both(torch.compile(plain, dynamic=False), inputs, gradient)
                try:
                    with console.status(f"compiling PyTorch's {name}"):
                        contestants["compiled"]()
                except Exception as error:  # whatever keeps the compiler from working is the machine's affair, and is shown
                    problem = str(error).strip().splitlines()[0]
                    del contestants["compiled"]
            times = _medians(contestants)
            best = min(times[peer] for peer in times if peer != "ours")
            shown = (f"{times[column]:.3g}" if column in times else "-" for column in ("ours", "eager", "compiled"))
            table.add_row(name, "x".join(map(str, shape)), short, *shown, f"{best / times['ours']:.1f}")
    console.print(table)
    _say(console, f"Medians of turns on {torch.get_num_threads()} threads; the speedup is over the better of the others."
                  + (f" torch.compile was not timed: {problem}." if problem else ""))


def _ops() -> Iterator[tuple[str, tuple[int, ...], Callable[..., Tensor], Callable[..., Tensor], Callable[..., list[Tensor]]]]:
    """Name, shape, our op, the same in PyTorch, and what makes the inputs."""
    def floats(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]

    def future(x: Tensor) -> Tensor:
        query, key = torch.arange(x.shape[-2]), torch.arange(x.shape[-1])
        return key > query[:, None]

    yield ("causal softmax", (2, 8, 512, 512), lambda x: scaled_masked_softmax(x, scale=0.125, causal=True),
           lambda x: (x * 0.125).masked_fill(future(x), -math.inf).softmax(-1),
           lambda shape, dtype: floats(shape, dtype=dtype))
    yield ("bias-GeLU", (1024, 4096), bias_gelu, lambda x, bias: F.gelu(x + bias, approximate="tanh"),
           lambda shape, dtype: floats(shape, shape[-1:], dtype=dtype))
    yield ("layer norm", (2048, 1024), layer_norm, lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
           lambda shape, dtype: floats(shape, shape[-1:], shape[-1:], dtype=dtype))
    yield ("cross-entropy", (256, 50304), cross_entropy, F.cross_entropy,
           lambda shape, dtype: [*floats(shape, dtype=dtype), torch.randint(shape[-1], shape[:-1])])


def _both(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> Callable[[], object]:
    leaves = [x for x in inputs if x.requires_grad]

    def step() -> object:
        out = function(*inputs)
        return torch.autograd.grad(out, leaves, gradient.to(out.dtype))  # a loss can be float32 here and bfloat16 there
    return step


def _medians(contestants: dict[str, Callable[[], object]], seconds: float = 0.4) -> dict[str, float]:
    """Median milliseconds of each, taking turns for at least `seconds` and five rounds after one that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for step in contestants.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples["ours"]) < 5:
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


@contextlib.contextmanager
def _progress(console: Console, title: str) -> Iterator[tuple[Callable[..., Any], Callable[[str], None]]]:
    """A progress bar: a wrapper for what is iterated, and a function that shows a note beside the bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None, note="")

        def advance(items: Any) -> Iterator[Any]:
            progress.update(task, total=len(items))
            for item in items:
                yield item
                progress.advance(task)

        yield advance, lambda note: progress.update(task, note=note)


def _say(console: Console, text: str) -> None:
    """Plain text, never cut at the console's width."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
