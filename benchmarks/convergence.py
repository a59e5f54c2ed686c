"""Training Hugging Face's GPT-2 and ours from the same weights on the same data: `python -m benchmarks.convergence`.

300 steps in float32 of a model with 4 layers, 256 hidden, 4 heads, on 4 x 128 tokens of the documentation of Python's library under
a vocabulary of 4000, which is trained on it. No dropout; AdamW with the same groups, learning rates and clipping. The two take each
step one after the other, in an order drawn anew; every loss of ours must be within 0.001 of theirs. A third contestant is Hugging
Face's model with torch's scaled_dot_product_attention, its default, where "eager" is attention written out, as ours is by default.
Peak memory is taken for each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megatron_kernels import demo
from megatron_kernels.models import GPT2, GPT2Config
from megatron_kernels.training.data import Samples
from megatron_kernels.training.options import Options
from megatron_kernels.training.schedule import decay_groups, learning_rate
from megatron_kernels.training.tokens import TokenFile, Tokens

from . import charts, files, gpt2, harness, memory, report

LIMIT = 1e-3  # of the losses' difference, at every step
TITLES = {"ours": "megatron_kernels", "eager": "Hugging Face, eager attention", "sdpa": "Hugging Face, sdpa"}
RESULT = harness.ROOT / "benchmarks" / "results" / "convergence.json"


@dataclass(frozen=True)
class Size:
    """What is trained on what."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    seq: int = 128
    batch: int = 4
    vocab: int = 4000
    files: int | None = 500  # of the library; None is all
    steps: int = 300


def corpus(size: Size) -> tuple[Samples, int]:
    """The samples, and the size of the vocabulary."""
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
    with tempfile.TemporaryDirectory() as directory:
        words, ids = demo.tokenize(demo.documentation(quiet, size.files), Path(directory) / "words", quiet, size.vocab)
    tokens = Tokens([TokenFile(Path("documentation"), ids.numpy(), words.get_vocab_size(), "")])
    return Samples(tokens, size.seq, (len(tokens) - 1) // size.seq, seed=0), words.get_vocab_size()


def batches(samples: Samples, size: Size) -> list[Tensor]:
    return [samples[range(step * size.batch, (step + 1) * size.batch)][:, :-1].contiguous() for step in range(size.steps)]


def model_of(name: str, size: Size, vocab: int) -> nn.Module:
    """The named contestant with the initial weights, which are ours of seed 0."""
    config = GPT2Config(num_layers=size.layers, hidden_size=size.hidden, num_attention_heads=size.heads, vocab_size=vocab,
                        max_position_embeddings=size.seq, hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)
    ours = GPT2(config, seed=0)
    if name == "ours":
        return ours
    theirs = gpt2.huggingface(config, torch.float32, dict(ours.state_dict()))
    theirs.set_attn_implementation(name)
    return theirs


def trainer(model: nn.Module, size: Size) -> Callable[[int, Tensor], float]:
    """A function that makes a training step and returns the loss before it."""
    schedule = Options(data=[], lr=1e-3, min_lr=1e-4, warmup=min(20, size.steps // 4), iterations=size.steps)
    optimizer = torch.optim.AdamW(decay_groups([model], 0.1), betas=(0.9, 0.95), eps=1e-8)
    parameters = list(model.parameters())

    def step(number: int, ids: Tensor) -> float:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, number)
        optimizer.zero_grad()
        out = model(input_ids=ids, labels=ids)
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()
    return step


def train(names: list[str], size: Size, data: list[Tensor], vocab: int, watch: Callable[[int], None] = lambda step: None
          ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Losses and milliseconds of every step, by contestant."""
    steps = {name: trainer(model_of(name, size, vocab), size) for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    order, draw = list(names), random.Random(0)
    for number, ids in enumerate(data):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            losses[name].append(steps[name](number, ids))
            times[name].append((time.perf_counter() - start) * 1e3)
        watch(number + 1)
    return losses, times


def differences(losses: dict[str, list[float]]) -> list[float]:
    """How far ours is from Hugging Face's, step by step."""
    return [abs(ours - theirs) for ours, theirs in zip(losses["ours"], losses["eager"], strict=True)]


def peak_of_a_step(name: str, size: Size) -> dict[str, float]:
    """MiB that a step holds at its highest beyond what is kept between steps: parameters, optimizer state and program."""
    data = torch.randint(size.vocab, (3, size.batch, size.seq), generator=torch.Generator().manual_seed(0))
    model = model_of(name, size, size.vocab)
    step = trainer(model, size)
    for number in (0, 1):
        step(number, data[number])
    model.zero_grad(set_to_none=True)
    return memory.peak_of(lambda: step(2, data[2]))


def peak_in_own_process(name: str, threads: int) -> dict[str, float]:
    return memory.in_own_process("benchmarks.convergence", ["--peak-of", name, "--threads", threads], name)


def show(found: dict) -> None:
    out = report.console()
    table = Table(title="Training step (median of interleaved steps)", title_justify="left", box=box.SIMPLE)
    for column in ("", "last loss", "ms", "p20-p80", "x ours", "peak of a step, MiB", "x ours"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    ours, memory = found["timings_ms"]["ours"]["median"], found["memory_mib"]
    for name, t in found["timings_ms"].items():
        peak = [f"{memory[name]['step']:.0f}", f"{memory[name]['step'] / memory['ours']['step']:.2f}"] if memory else ["", ""]
        table.add_row(TITLES[name], f"{statistics.mean(found['losses'][name][-10:]):.4f}", f"{t['median']:.1f}",
                      f"{t['p20']:.1f}-{t['p80']:.1f}", f"{t['median'] / ours:.2f}", *peak)
    out.print(table)
    e, worst = found["environment"], found["largest_difference"]
    verdict = "within" if worst <= LIMIT else "NOT within"
    out.print(f"Losses of {found['size']['steps']} steps differ by {worst:.1e} at most (step {found['at_step']}), {verdict} "
              f"{LIMIT:g}. The last loss is the mean of the last ten.", highlight=False)
    out.print(f"{e['device']}, {e['threads']} threads, {e['instruction_set']}; torch {e['torch']}, transformers "
              f"{found['transformers']}, megatron_kernels {e['megatron_kernels']} at {e['commit']}; {e['date']}", style="dim",
              highlight=False)


def draw(path: Path, found: dict) -> None:
    """The two curves above each other, and how far they are apart."""
    curves = [charts.Series(TITLES[name], list(enumerate(found["losses"][name], 1)), dashed=name != "ours")
              for name in ("eager", "ours")]
    apart = charts.Series("|ours - Hugging Face|", [(i, max(d, 1e-9)) for i, d in enumerate(differences(found["losses"]), 1)])
    charts.grid(path, [charts.Panel(curves, "training loss", "step", "loss"),
                       charts.Panel([apart], "difference", "step", "loss", log_y=True, level=(LIMIT, "what is allowed"))],
                title="GPT-2 from the same weights on the same data, float32")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all this process may use")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", metavar="FILE", help=f"the results; {RESULT.relative_to(harness.ROOT)} is the one that is shown")
    parser.add_argument("--chart", metavar="FILE", help="the curves, an SVG file")
    parser.add_argument("--peak-of", choices=list(TITLES), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    torch.set_num_threads(args.threads)
    size = Size(steps=args.steps)
    if args.peak_of:
        print(json.dumps(peak_of_a_step(args.peak_of, size)))
        return 0
    if args.chart and charts.why_not():
        raise SystemExit(charts.why_not())
    harness.restart_reusing("benchmarks.convergence", argv)
    import transformers

    samples, vocab = corpus(size)
    losses, times = train(list(TITLES), size, batches(samples, size), vocab,
                          lambda step: None if step % 25 else print(f"  step {step}", file=sys.stderr, flush=True))
    apart = differences(losses)
    found = {"environment": asdict(harness.environment()), "transformers": transformers.__version__, "size": asdict(size),
             "tokens": len(samples.tokens), "vocab": vocab, "limit": LIMIT, "largest_difference": max(apart),
             "at_step": apart.index(max(apart)) + 1, "losses": losses,
             "timings_ms": {name: asdict(harness.Timing.of(those[5:])) for name, those in times.items()},
             "memory_mib": {} if args.no_memory else {name: peak_in_own_process(name, args.threads) for name in TITLES}}
    show(found)
    if args.json:
        files.write_json(args.json, found)
    if args.chart:
        draw(Path(args.chart), found)
    return 0 if max(apart) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
