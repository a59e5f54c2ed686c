"""The output layer's loss without its logits, beside logits and then their loss: `python -m benchmarks.linear_cross_entropy`.

Forward and backward of `megatron_kernels.parallel.vocab_parallel_linear_cross_entropy` on one rank, against `linear.project`
followed by `cross_entropy(inplace_backward=True)`: 2048 tokens, 1024 hidden, vocabulary 50257 padded to 50304, gradients of hidden
states and table. Loss and gradients are first compared with each other. Then the contestants take turns in one process, with the
same number of threads; "products" are the three matrix products alone. What is held beyond inputs and returned gradients is taken
for each contestant in a process of its own, as a part of what the float32 logits of all tokens take.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from rich import box
from rich.table import Table

import megatron_kernels as mk
from megatron_kernels.linear import project
from megatron_kernels.parallel import vocab_parallel_linear_cross_entropy

from . import files, harness, memory, report
from .gpt2 import DTYPES

LIMITS = {"mean": 1.15, "sum": 1.15, "none": 1.5}  # times the time of logits + cross_entropy
HELD = 0.1  # of the float32 logits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the loss, and of a gradient's norm
PADDING = 47


class Problem:
    """Tensors of one size and dtype, and the steps that are timed on them. Each returns the loss and leaves gradients in .grad."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype):
        draw = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(args.tokens, args.hidden, generator=draw).to(dtype).requires_grad_()
        self.table = (torch.randn(args.vocabulary, args.hidden, generator=draw) * 0.02).to(dtype).requires_grad_()
        self.classes = max(args.vocabulary - PADDING, 1)
        self.target = torch.randint(0, self.classes, (args.tokens,), generator=draw)
        self.weights = torch.rand(args.tokens, generator=draw)  # of the tokens' losses where they come one by one

    def step(self, how: str, reduction: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            self.hidden.grad = self.table.grad = None
            loss = self.linear(reduction) if how == "linear" else self.logits(reduction)
            loss.backward(self.weights if reduction == "none" else None)
            return loss.detach()
        return run

    def linear(self, reduction: str) -> torch.Tensor:
        return vocab_parallel_linear_cross_entropy(self.hidden, self.table, self.target, vocab_size=self.classes,
                                                   reduction=reduction)

    def logits(self, reduction: str) -> torch.Tensor:
        return mk.cross_entropy(project(self.hidden, self.table), self.target, vocab_size=self.classes, reduction=reduction,
                                inplace_backward=True)

    def products(self) -> Callable[[], None]:
        hidden, table = self.hidden.detach(), self.table.detach()
        dlogits = torch.randn(hidden.shape[0], table.shape[0]).to(hidden.dtype)

        def run() -> None:
            hidden @ table.T
            dlogits @ table
            dlogits.T @ hidden
        return run

    def disagreement(self, reduction: str) -> str:
        """How the two ways differ; empty within TOLERANCE."""
        found = {}
        for how in ("linear", "logits"):
            loss = self.step(how, reduction)()
            found[how] = {"loss": loss, "gradient of hidden": self.hidden.grad, "gradient of the table": self.table.grad}
        for name, expected in found["logits"].items():
            error = ((found["linear"][name].float() - expected.float()).norm() / expected.float().norm()).item()
            if not error <= TOLERANCE[expected.dtype if name != "loss" else self.hidden.dtype]:
                return f"{name} for {reduction} differs by {error:.1e} of its norm"
        return ""


def held(args: argparse.Namespace, how: str, reduction: str, dtype: torch.dtype) -> float:
    """MiB that the third step holds at its highest beyond the inputs and the gradients that it returns."""
    problem = Problem(args, dtype)
    step = problem.step(how, reduction)
    for _ in range(2):
        step()
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in (problem.hidden, problem.table))
    problem.hidden.grad = problem.table.grad = None
    return memory.peak_of(step)["step"] - gradients / 2**20


def held_in_own_process(args: argparse.Namespace, how: str, reduction: str, dtype: str) -> float:
    arguments = ["--held-by", how, "--reduction", reduction, "--dtype", dtype]
    for name in ("tokens", "vocabulary", "hidden", "threads"):
        arguments += [f"--{name}", getattr(args, name)]
    return memory.in_own_process("benchmarks.linear_cross_entropy", arguments, f"{how}, {reduction}")



def run(args: argparse.Namespace, dtype: str) -> dict:
    problem = Problem(args, DTYPES[dtype])
    for reduction in args.reduction:
        if failure := problem.disagreement(reduction):
            return {"dtype": dtype, "failure": failure}
    steps = {f"{how} {reduction}": problem.step(how, reduction) for reduction in args.reduction for how in ("logits", "linear")}
    contestants = [harness.Contestant(*item) for item in (steps | {"products": problem.products()}).items()]
    timings = harness.interleave(contestants, seconds=args.seconds, min_rounds=args.rounds, warmup=1)
    del problem, contestants
    logits = args.tokens * args.vocabulary * 4 / 2**20
    held = {} if args.no_memory else {name: held_in_own_process(args, *name.split(), dtype) / logits for name in steps}
    ratios = {r: timings[f"linear {r}"].median / timings[f"logits {r}"].median for r in args.reduction}
    return {"dtype": dtype, "failure": "", "tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden,
            "timings_ms": {name: asdict(timing) for name, timing in timings.items()}, "ratio": ratios, "held": held}


def show(rows: list[dict]) -> None:
    out = report.console()
    table = Table(title="Loss of the output layer on the CPU, forward and backward (median of interleaved steps)",
                  title_justify="left", box=box.SIMPLE)
    for column in ("", "ms", "p20-p80", "x logits", "limit", "held / fp32 logits", "limit "):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    titles = {"logits": "logits, then cross_entropy", "linear": "linear cross-entropy", "products": "matrix products alone"}
    for row in rows:
        if row["failure"]:
            out.print(f"{row['dtype']} is wrong, so it was not timed: {row['failure']}", style="bold red")
            continue
        for name, t in row["timings_ms"].items():
            how, _, reduction = name.partition(" ")
            ours = how == "linear"
            table.add_row(f"{row['dtype']} {titles[how]} {reduction}", f"{t['median']:.0f}", f"{t['p20']:.0f}-{t['p80']:.0f}",
                          f"{row['ratio'][reduction]:.3f}" if ours else "", str(LIMITS[reduction]) if ours else "",
                          f"{row['held'][name]:.3f}" if name in row["held"] else "", str(HELD) if ours else "")
        table.add_section()
    out.print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_cross_entropy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--reduction", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=50304, help=f"rows of the table; the last {PADDING} are padding")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all this process may use")
    parser.add_argument("--rounds", type=int, help="at least so many steps of each; default 11, with --quick 3")
    parser.add_argument("--seconds", type=float, default=0.0, help="and for at least so long")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--held-by", choices=["logits", "linear"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 11)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.held_by:
        print(json.dumps(held(args, args.held_by, args.reduction[0], DTYPES[args.dtype[0]])))
        return 0
    harness.restart_reusing("benchmarks.linear_cross_entropy", argv)
    rows = [run(args, dtype) for dtype in args.dtype]
    environment = asdict(harness.environment())
    show(rows)
    settings = " ".join(f"{name}={value}" for name, value in harness.REUSING_ALLOCATOR.items())
    report.console().print(f"{args.tokens} tokens, {args.hidden} hidden, vocabulary {args.vocabulary}; every contestant with "
                           f"{args.threads} threads, timed in a process restarted with {settings}; memory in processes where "
                           f"every large block is mapped for itself.\n{report.Results(environment, []).described()}",
                           style="dim", highlight=False)
    if args.json:
        files.write_json(args.json, {"environment": environment, "rows": rows})
    return 1 if any(row["failure"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
