"""Each op beside PyTorch eager and torch.compile, and beside the time that its bytes take: `python -m benchmarks.ops`.

The floor of a row is its bytes at the rate of x.clone() for its own shape and dtype, measured in turn with the contestants.
Every op is compared with the float64 reference before it is timed; one that fails is not timed, and the exit status is 1.
See docs/benchmarks.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import megatron_kernels as mk

from . import harness, report
from .harness import Contestant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One op at one shape: what is computed, by whom, and the bytes it moves.

    Every function takes the tensors that `inputs(shape, dtype)` makes, and returns one tensor. Gradients are asked for every
    floating input. forward and both count the reads and writes of the one large tensor.
    """

    op: str
    title: str
    shape: tuple[int, ...]
    piece: tuple[int, ...]  # the same rows, but so few that everything stays in cache
    inputs: Callable[[tuple[int, ...], torch.dtype, str], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    forward: float
    both: float
    variants: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)  # other ways to write it, for torch.compile
    rounds_output: bool = False  # the backward starts from the output as it was rounded
    small_beside_large: bool = False  # elements far below the largest of their tensor matter

    def nbytes(self, dtype: torch.dtype, mode: str) -> float:
        return math.prod(self.shape) * dtype.itemsize * (self.forward if mode == "forward" else self.both)


def _normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, device=device).to(dtype)


def _eager_causal_softmax(x: Tensor, future: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(future, float("-inf")), -1)


def _traced_causal_softmax(x: Tensor, future: Tensor) -> Tensor:
    """For the compiler a comparison of indices is faster than a mask that it must read, as models hold one."""
    query, key = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    return torch.softmax(x.masked_fill(key > query[:, None], float("-inf")), -1)


def _softmax_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return _normal(*shape, dtype=dtype, device=device), torch.ones(*shape[-2:], dtype=torch.bool, device=device).triu(1)


def _bias_gelu_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return _normal(*shape, dtype=dtype, device=device), _normal(shape[-1], dtype=dtype, device=device)


def _layer_norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    weight, bias = (_normal(shape[-1], dtype=dtype, device=device) for _ in range(2))
    return _normal(*shape, dtype=dtype, device=device), 1 + 0.1 * weight, bias


def _cross_entropy_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return _normal(*shape, dtype=dtype, device=device), torch.randint(shape[-1], shape[:-1], device=device)


CASES = (
    Case("scaled_masked_softmax", "causal softmax", (2, 16, 1024, 1024), (1, 1, 1024, 1024), _softmax_inputs,
         ours=lambda x, future: mk.scaled_masked_softmax(x, causal=True),
         reference=lambda x, future: mk.reference.scaled_masked_softmax(x, causal=True),
         eager=_eager_causal_softmax, variants={"compile, mask from indices": _traced_causal_softmax},
         forward=1.5, both=3.5, rounds_output=True),
    Case("bias_gelu", "bias-GeLU", (2048, 4096), (256, 4096), _bias_gelu_inputs,
         ours=lambda x, bias: mk.bias_gelu(x, bias),
         reference=lambda x, bias: mk.reference.bias_gelu(x, bias),
         eager=lambda x, bias: F.gelu(x + bias, approximate="tanh"), forward=2, both=5),
    Case("layer_norm", "layer norm", (4096, 1024), (1024, 1024), _layer_norm_inputs,
         ours=lambda x, weight, bias: mk.layer_norm(x, weight, bias),
         reference=lambda x, weight, bias: mk.reference.layer_norm(x, weight, bias),
         eager=lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias), forward=2, both=5),
    Case("cross_entropy", "cross-entropy", (512, 50304), (16, 50304), _cross_entropy_inputs,
         ours=lambda logits, target: mk.cross_entropy(logits, target),
         reference=lambda logits, target: mk.reference.cross_entropy(logits, target),
         eager=lambda logits, target: F.cross_entropy(logits, target), forward=1, both=3, small_beside_large=True),
)


def results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor | None) -> tuple[Tensor, ...]:
    """function(*inputs), followed by the gradients of its floating inputs when there is an incoming gradient."""
    if gradient is None:
        return (function(*inputs),)
    output = function(*inputs)
    return output, *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], gradient)


def with_gradients(inputs: tuple[Tensor, ...], mode: str) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_(mode == "both" and x.is_floating_point()) for x in inputs)


def incoming_gradient(case: Case, inputs: tuple[Tensor, ...], mode: str) -> Tensor | None:
    """Contiguous and of the output's dtype: normal for a tensor, one for a loss."""
    if mode == "forward":
        return None
    with torch.no_grad():
        output = case.eager(*inputs)
    return torch.randn_like(output) if output.dim() else torch.ones_like(output)


def mismatch(case: Case, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor | None,
             slack: float = 1.0) -> str:
    """How function departs from the float64 reference on these inputs; empty when every element is within the tolerance.

    An element may be off by slack times 2 eps(its dtype) of its size (one rounding) plus 32 eps(float32) of the largest element
    of its tensor (the arithmetic, which happens in float32). Where a backward starts from rounded probabilities p, a gradient's
    size is p max|incoming gradient|, of which the true value is a small difference.
    """
    exact_inputs = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)
    exact = results(case.reference, exact_inputs, None if gradient is None else gradient.double())
    names = ("output", *(f"gradient of input {i}" for i, x in enumerate(inputs) if x.requires_grad))
    for name, got, want in zip(names, results(function, inputs, gradient), exact, strict=True):
        got, want = got.detach(), want.detach()
        size = want.abs()
        if case.rounds_output and gradient is not None and name != "output":
            size = exact[0].detach() * gradient.double().abs().max()
        largest = size if case.small_beside_large else want.abs().max()
        allowed = slack * (2 * torch.finfo(got.dtype).eps * size + 32 * torch.finfo(torch.float32).eps * largest)
        excess = ((got.double() - want).abs() / allowed).nan_to_num(nan=float("inf")).masked_fill(got == want, 0.0)
        if excess.max() > 1:
            at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
            return f"{name}{list(at)} is {got[at].item():.6g}, the float64 reference {want[at].item():.6g}: " \
                   f"{excess.max().item():.3g} times the tolerance"
    return ""


def prepare(case: Case, shape: tuple[int, ...], dtype: torch.dtype, mode: str,
            device: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Inputs of that shape, asking for gradients where mode is "both", and then the incoming gradient."""
    torch.manual_seed(0)
    inputs = with_gradients(case.inputs(shape, dtype, device), mode)
    return inputs, incoming_gradient(case, inputs, mode)


def contestants(case: Case, dtype: torch.dtype, mode: str, device: str, peers: tuple[str, ...]) -> list[Contestant]:
    inputs, gradient = prepare(case, case.shape, dtype, mode, device)
    piece, piece_gradient = prepare(case, case.piece, dtype, mode, device)
    torch.compiler.reset()
    functions = {"ours": case.ours, "eager": case.eager}
    if "compile" in peers:
        to_compile = {"compile": case.eager, **case.variants}
        functions |= {name: torch.compile(function, fullgraph=True, dynamic=False) for name, function in to_compile.items()}
        peers = (*peers, *case.variants)
    wanted = ("ours", *peers)
    x = inputs[0].detach()
    return [Contestant("clone", x.clone), Contestant("piece", lambda: results(case.ours, piece, piece_gradient), warm=True),
            *(Contestant(name, lambda f=functions[name]: results(f, inputs, gradient)) for name in wanted)]


def check(case: Case, dtype: torch.dtype, args: argparse.Namespace) -> str:
    """What is wrong with our op at this shape and dtype, forward and backward; empty when nothing is."""
    inputs, gradient = prepare(case, case.shape, dtype, "both", args.device)
    with mk.use(args.implementation):
        return mismatch(case, case.ours, inputs, gradient)


def measure(case: Case, dtype: torch.dtype, mode: str,
            args: argparse.Namespace) -> tuple[dict[str, harness.Timing], float | None]:
    """The timings of the floor, of ours without and with memory in its way, and of the peers; and the others' share of time."""
    with mk.use(args.implementation):
        running = contestants(case, dtype, mode, args.device, args.peers)
        for contestant in running:  # compiles
            contestant.step()
        share = harness.others()
        timings = harness.interleave(running, seconds=args.seconds, min_rounds=args.rounds, clock=harness.CLOCKS[args.device])
        others = share()
    clone_bytes = 2 * math.prod(case.shape) * dtype.itemsize  # read and written
    return {"floor": timings.pop("clone").times(case.nbytes(dtype, mode) / clone_bytes),
            "in cache": timings.pop("piece").times(math.prod(case.shape) / math.prod(case.piece)), **timings}, others


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that announces the next row: a moving bar on a terminal, a line elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: print(f"  {text}", file=sys.stderr, flush=True)
        return
    columns = TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=report.console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda text: progress.update(task, description=text, advance=1)


def run(args: argparse.Namespace) -> report.Results:
    rows: list[report.Row] = []
    chosen = [(case, dtype) for case in CASES if case.op in args.ops for dtype in args.dtypes]
    with progress_bar(len(chosen) * (1 + len(args.modes))) as announce:
        for case, name in chosen:
            dtype = DTYPES[name]
            announce(f"{case.title} {name}: checking")
            failure = check(case, dtype, args)
            for mode in args.modes:
                announce(f"{case.title} {name}: timing {mode}")
                timings, others = ({}, None) if failure else measure(case, dtype, mode, args)
                rows.append(report.Row(case.op, case.title, list(case.shape), name, mode, case.nbytes(dtype, mode),
                                       args.allocator, timings, failure, others))
    return report.Results(asdict(harness.environment()), rows)


def run_with_default_allocator(argv: list[str]) -> report.Results:
    """The same rows in a child process whose allocator is as glibc ships it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "results.json"
        command = [sys.executable, "-m", "benchmarks.ops", *argv, "--allocator", "default", "--json", str(path), "--csv", ""]
        subprocess.run(command, env=harness.allocator_environment(reusing=False), cwd=harness.ROOT)
        if not path.exists():
            raise SystemExit("the run with the default allocator ended without results")
        return report.Results.from_json(json.loads(path.read_text()))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    ops = [case.op for case in CASES]
    parser.add_argument("--device", choices=sorted(harness.CLOCKS), default="cpu")
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)}; default all")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", choices=["forward", "both"], default=["forward", "both"])
    parser.add_argument("--peers", nargs="*", choices=report.PEERS, default=report.PEERS, help="default both")
    parser.add_argument("--implementation", default="cpu", help="as in megatron_kernels.use; default cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                        else os.cpu_count(), help="default: the processors this process may use")
    parser.add_argument("--allocator", choices=["both", "reusing", "default"], default="both",
                        help="glibc keeping freed blocks, as it ships, or a table for each (default)")
    parser.add_argument("--rounds", type=int, help="at least so many samples a row; default 20, with --quick 7")
    parser.add_argument("--seconds", type=float, help="and for at least so long; default 3, with --quick 0.5")
    parser.add_argument("--quick", action="store_true", help="fewer samples: under two minutes for everything")
    parser.add_argument("--csv", metavar="FILE", help="one line per row and contestant")
    parser.add_argument("--json", metavar="FILE", help="everything, samples' quantiles and environment included")
    parser.add_argument("--readme", metavar="FILE", help="measure nothing: put FILE, written by --json, into README.md")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (7 if args.quick else 20)
    args.seconds = args.seconds if args.seconds is not None else (0.5 if args.quick else 3.0)
    args.peers = tuple(args.peers)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.readme:
        report.write_readme(harness.ROOT / "README.md", report.Results.from_json(json.loads(Path(args.readme).read_text())))
        return 0
    if args.allocator != "default" and not harness.is_reusing_allocator():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.ops", *argv], harness.allocator_environment(reusing=True))
    available = mk.implementations().get(args.implementation)
    if available is None or not available.available:
        known = ", ".join(mk.implementations())
        print(f"{args.implementation}: {available.detail if available else f'unknown implementation; known are {known}'}",
              file=sys.stderr)
        return 1
    for file in filter(None, (args.csv, args.json)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    both = args.allocator == "both"
    args.allocator = "default" if args.allocator == "default" else "reusing"
    torch.set_num_threads(args.threads)
    outcome = run(args)
    report.show(outcome)
    if both:
        outcome = outcome.followed_by(run_with_default_allocator(argv))
    if args.csv:
        report.write_csv(Path(args.csv), outcome)
    if args.json:
        Path(args.json).write_text(json.dumps(outcome.as_json(), indent=1) + "\n")
    return 1 if any(row.failure for row in outcome.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
