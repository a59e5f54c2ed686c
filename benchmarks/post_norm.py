"""Where the layer norm stands, in miniature: `python -m benchmarks.post_norm`.

Small encoders learn masked-language modelling on a synthetic language, at several depths and in both orderings of layer norm and
residual (config.apply_residual_connection_post_layernorm), with the same initial weights, batches and hyperparameters for either.
Megatron-LM's paper (arXiv 1909.08053, section 5.3) found that deep encoders in the original BERT's ordering, post-norm, train
badly where pre-norm trains well.

A model that ignores the context has at best the entropy of the word frequencies as its loss, one that knows the language `bound`.
What counts was decided before the seeds of a run were tried:

- a run failed when over the last tenth of its steps it has, on average, learned less than a tenth of what lies between the two, or
  a loss was not finite;
- a spike is a gradient norm above SPIKE times the median of the WINDOW steps before it.

There is no warm-up, and the initial weights are those that make such nets hard to train: as wide for their size as BERT-large's
(std x sqrt(hidden) is that of 0.02 at 1024 hidden), and without Megatron-LM's smaller weights for the projections that write to
the residual, which the original BERT does not have either.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_kernels.models import Bert, BertConfig

from . import charts, files

SPIKE, WINDOW = 10.0, 20
MASKED = 0.15
LEARNED = 0.1  # of what the context tells, or the run failed
DEPTHS = (4, 12, 24)
ORDERINGS = ("pre-norm", "post-norm")


@dataclass(frozen=True)
class Setting:
    """All that a run depends on beside its depth, ordering and seed."""

    hidden: int = 64
    heads: int = 4
    words: int = 64
    topics: int = 32
    length: int = 16
    batch: int = 16
    steps: int = 100
    lr: float = 3e-3
    warmup: int = 0
    clip: float = 1.0
    std: float = 0.08


class Language:
    """Sentences that keep to one topic each: the vocabulary is dealt out to `topics`, and a sentence draws from its topic's words.

    All words are equally frequent, so that a model that ignores the context has at best a loss of `entropy`; one that knows the
    topic has `bound`. Both in nats."""

    def __init__(self, words: int, topics: int):
        self.words = torch.randperm(words, generator=torch.Generator().manual_seed(0)).view(topics, -1)
        self.entropy, self.bound = math.log(words), math.log(words // topics)

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        topic = torch.randint(len(self.words), (batch, 1), generator=generator)
        return self.words[topic, torch.randint(self.words.shape[1], (batch, length), generator=generator)]


def build(setting: Setting, depth: int, ordering: str, seed: int) -> Bert:
    """The model of a run: the same weights in either ordering, of one size in all layers."""
    config = BertConfig(
        num_layers=depth, hidden_size=setting.hidden, num_attention_heads=setting.heads, max_position_embeddings=setting.length,
        vocab_size=setting.words + 1, num_tokentypes=0, add_binary_head=False, init_method_std=setting.std,
        apply_residual_connection_post_layernorm=ordering == "post-norm", hidden_dropout=0.0, embedding_dropout=0.0,
        attention_dropout=0.0)
    model = Bert(config, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                parameter.mul_((2 * depth) ** 0.5)
    return model


def train(setting: Setting, depth: int, ordering: str, seed: int) -> dict[str, Any]:
    """One run: the loss and the gradient norm of each step; it ends early where a loss is not finite."""
    torch.set_num_threads(1)
    language, model = Language(setting.words, setting.topics), build(setting, depth, ordering, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    norms: list[float] = []
    while len(losses) < setting.steps and (not losses or math.isfinite(losses[-1])):
        warm = min(1.0, (len(losses) + 1) / setting.warmup) if setting.warmup else 1.0
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * warm
        ids = language.draw(setting.batch, setting.length, generator)
        masked = torch.rand(ids.shape, generator=generator) < MASKED
        loss = model(ids.masked_fill(masked, setting.words), ids.masked_fill(~masked, -100))
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), setting.clip).item())
        optimizer.step()
        losses.append(loss.item())
    return {"depth": depth, "ordering": ordering, "seed": seed, "losses": losses, "norms": norms}


def judge(run: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """What the definitions above say of a run: its final loss, the share learned, whether it failed, and its spikes."""
    language, losses, norms = Language(setting.words, setting.topics), run["losses"], run["norms"]
    final = statistics.mean(losses[-max(1, setting.steps // 10):])
    learned = (language.entropy - final) / (language.entropy - language.bound)
    finite = len(losses) == setting.steps and math.isfinite(final)
    spikes = sum(norms[i] > SPIKE * statistics.median(norms[i - WINDOW:i]) for i in range(WINDOW, len(norms)))
    return {"final": final, "learned": learned if finite else 0.0, "failed": not finite or learned < LEARNED, "spikes": spikes}


def run_all(setting: Setting, depths: Sequence[int], seeds: Sequence[int], jobs: int) -> list[dict[str, Any]]:
    """Every run, the longest first, each in a process with one thread; a line on stderr for each that is done."""
    wanted = [(depth, ordering, seed) for depth in sorted(depths, reverse=True) for seed in seeds for ordering in ORDERINGS]
    runs = []
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        pending = [pool.submit(train, setting, *each) for each in wanted]
        for done in as_completed(pending):
            run = done.result()
            runs.append(run | judge(run, setting))
            print(f"  {len(runs)}/{len(wanted)}: {run['depth']} layers, {run['ordering']}, seed {run['seed']}: loss "
                  f"{runs[-1]['final']:.2f}", file=sys.stderr, flush=True)
    return sorted(runs, key=lambda run: (run["depth"], ORDERINGS.index(run["ordering"]), run["seed"]))


def of(runs: list[dict[str, Any]], depth: int, ordering: str) -> list[dict[str, Any]]:
    return [run for run in runs if (run["depth"], run["ordering"]) == (depth, ordering)]


def verdict(runs: list[dict[str, Any]]) -> str:
    """In one line, whether this run of the miniature shows what the paper found."""
    depths = sorted({run["depth"] for run in runs})
    def failed(ordering: str, *depths: int) -> int:
        return sum(run["failed"] for depth in depths for run in of(runs, depth, ordering))

    count, deepest, shallowest = len(of(runs, depths[0], ORDERINGS[0])), depths[-1], depths[0]
    deep, shallow, pre = failed("post-norm", deepest), failed("post-norm", shallowest), failed("pre-norm", *depths)
    shown = deep > count / 2 and not shallow and not pre
    return (f"post-norm failed in {deep} of {count} runs at {deepest} layers and in {shallow} at {shallowest}, pre-norm in {pre} "
            f"of {count * len(depths)} at all depths: {'as the paper found' if shown else 'not what the paper found'}")


def table(runs: list[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("layers", "ordering", "final loss, by seed", "learned", "failed", "spikes"):
        shown.add_column(column, justify="left" if column in ("ordering", "final loss, by seed") else "right", no_wrap=True)
    for depth in sorted({run["depth"] for run in runs}):
        for ordering in ORDERINGS:
            here = of(runs, depth, ordering)
            losses = "  ".join(f"{run['final']:.2f}" for run in here)
            shown.add_row(str(depth) if ordering == ORDERINGS[0] else "", ordering, losses,
                          f"{statistics.mean(run['learned'] for run in here):.0%}",
                          f"{sum(run['failed'] for run in here)} of {len(here)}", str(sum(run["spikes"] for run in here)))
    return shown


def smooth(values: list[float], width: int) -> list[tuple[float, float]]:
    """Means of each `width` steps, at the middle of them; only what is finite."""
    blocks = [values[i:i + width] for i in range(0, len(values) - width + 1, width)]
    return [(i * width + width / 2, mean) for i, block in enumerate(blocks) if math.isfinite(mean := statistics.mean(block))]


def chart(path: Path, runs: list[dict[str, Any]], setting: Setting) -> None:
    """Loss curves, a panel for each depth: the mean over the seeds, and a band from the lowest to the highest."""
    language, width, panels = Language(setting.words, setting.topics), max(1, setting.steps // 30), []
    for depth in sorted({run["depth"] for run in runs}):
        series = []
        for ordering in ORDERINGS:
            curves = [smooth(run["losses"], width) for run in of(runs, depth, ordering)]
            length = min(map(len, curves))
            columns = [[curve[i][1] for curve in curves] for i in range(length)]
            series.append(charts.Series(ordering, [(curves[0][i][0], statistics.mean(columns[i])) for i in range(length)],
                                        [min(column) for column in columns], [max(column) for column in columns]))
        panels.append(charts.Panel(series, f"{depth} layers", "step", "masked-LM loss (nats)",
                                   level=(language.entropy, "context ignored")))
    charts.grid(path, panels, columns=len(panels), size=(3.4, 3.0))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.post_norm", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train small BERTs of several depths in both orderings of layer norm and residual.")
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="layers")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="of a run")
    parser.add_argument("--lr", type=float, default=Setting.lr, help="of Adam, constant after the warm-up")
    parser.add_argument("--warmup", type=int, default=Setting.warmup, help="steps over which the learning rate rises")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each with one thread")
    parser.add_argument("--quick", action="store_true", help="2 and 3 layers, 2 seeds, 12 steps: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and every loss and gradient norm")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write the loss curves as SVG (needs matplotlib)")
    args = parser.parse_args(arguments)
    if args.quick:
        args.depths, args.seeds, args.steps = [2, 3], 2, 12
    for name in ("depths", "seeds", "steps", "jobs"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.chart and (why := charts.why_not()):
        parser.error(f"--chart: {why}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    setting = replace(Setting(), steps=args.steps, lr=args.lr, warmup=args.warmup)
    language = Language(setting.words, setting.topics)
    start = time.perf_counter()
    runs = run_all(setting, sorted(set(args.depths)), range(1, args.seeds + 1), args.jobs)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(f"masked-LM loss after {setting.steps} steps of Adam at {setting.lr:g}, "
                  f"{f'warm-up {setting.warmup}' if setting.warmup else 'no warm-up'}; {language.entropy:.2f} without the context, "
                  f"{language.bound:.2f} at best", highlight=False)
    console.print(table(runs))
    console.print(verdict(runs), highlight=False)
    if args.json:
        content = {"setting": asdict(setting), "entropy": language.entropy, "bound": language.bound, "torch": torch.__version__,
                   "definitions": {"spike": SPIKE, "window": WINDOW, "learned": LEARNED}, "verdict": verdict(runs),
                   "seconds": round(time.perf_counter() - start, 1), "runs": runs}
        files.write(args.json, json.dumps(content) + "\n")
    if args.chart:
        chart(args.chart, runs, setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
