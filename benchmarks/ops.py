"""Each op beside PyTorch eager and torch.compile, and beside the time that its bytes take: `python -m benchmarks.ops`.

On a CPU, and with --device cuda on a GPU (gpu.py).

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
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import megatron_kernels as mk

from . import gpu, gpu_report, harness, report
from .cases import CASES, DTYPES, Case, incoming_gradient, mismatch, results, with_gradients
from .harness import Contestant

MEASURED = "what this run measures"  # --readme without a file


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
        timings = harness.interleave(running, seconds=args.seconds, min_rounds=args.rounds, clock=harness.cpu_clock)
        others = share()
    clone_bytes = 2 * math.prod(case.shape) * dtype.itemsize  # read and written
    return {"floor": timings.pop("clone").times(case.nbytes(dtype, mode) / clone_bytes),
            "in cache": timings.pop("piece").times(math.prod(case.shape) / math.prod(case.piece)), **timings}, others


def run(args: argparse.Namespace) -> report.Results:
    rows: list[report.Row] = []
    chosen = [(case, dtype) for case in CASES if case.op in args.ops for dtype in args.dtypes]
    with report.progress_bar(len(chosen) * (1 + len(args.modes))) as announce:
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)}; default all")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default fp32 bf16, on a GPU bf16 fp32 fp16")
    parser.add_argument("--modes", nargs="+", choices=["forward", "backward", "both"],
                        help="default forward and both; on a GPU also backward, alone")
    parser.add_argument("--peers", nargs="*", choices=report.PEERS,
                        help="default both; on a GPU eager, and compile at GPT-2's shapes and every other number of columns")
    parser.add_argument("--implementation", help="as in megatron_kernels.use; default that of the device")
    parser.add_argument("--rounds", type=int, help="at least so many samples a row; default 20, with --quick 7")
    parser.add_argument("--seconds", type=float,
                        help="and for at least so long; default 3, with --quick 0.5; on a GPU 0.2, with --quick 0.1")
    parser.add_argument("--quick", action="store_true", help="fewer samples (on a GPU also fewer rows): under two minutes in all")
    parser.add_argument("--csv", metavar="FILE", help="one line per row and contestant")
    parser.add_argument("--json", metavar="FILE", help="everything, samples' quantiles and environment included")
    parser.add_argument("--readme", metavar="FILE", nargs="?", const=MEASURED,
                        help="measure nothing: put FILE, written by --json, into README.md; on a GPU, without FILE: measure first")
    only_cpu = parser.add_argument_group("on a CPU")
    only_cpu.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                          else os.cpu_count(), help="default: the processors this process may use")
    only_cpu.add_argument("--allocator", choices=["both", "reusing", "default"], default="both",
                          help="glibc keeping freed blocks, as it ships, or a table for each (default)")
    gpu.add_arguments(parser.add_argument_group("on a GPU"))
    args = parser.parse_args(argv)
    if args.device == "cpu" and "backward" in (args.modes or ()):
        parser.error("--modes backward is for --device cuda")
    if args.device == "cpu" and args.readme is MEASURED:
        parser.error("--readme without FILE is for --device cuda")
    defaults = gpu.defaults(args.quick) if args.device == "cuda" else {
        "dtypes": ["fp32", "bf16"], "modes": ["forward", "both"], "peers": report.PEERS, "seconds": 0.5 if args.quick else 3.0}
    for name, value in {**defaults, "implementation": args.device}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.rounds = args.rounds or (7 if args.quick else 20)
    args.peers = None if args.peers is None else tuple(args.peers)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.readme and args.readme is not MEASURED:
        data = json.loads(Path(args.readme).read_text())
        pages = gpu_report if data["environment"].get("kind") == "cuda" else report
        pages.write_readme(harness.ROOT / "README.md", pages.Results.from_json(data))
        return 0
    if args.device == "cuda":
        return gpu.main(args)
    if args.allocator != "default":
        harness.restart_reusing("benchmarks.ops", argv)
    if why := harness.why_unavailable(args.implementation):
        print(why, file=sys.stderr)
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
