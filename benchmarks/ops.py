"""Each op beside PyTorch eager, torch.compile and the libraries that are installed: `python -m benchmarks.ops`.

Forward, backward alone and both, on a GPU where there is one and on the CPU elsewhere. The roof of a row is a copy of as many bytes
as the op has to move, measured in turn with the contestants. Every op is compared with the float64 reference before it is timed;
one that fails is not timed, and the exit status is 1. See docs/benchmarks.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from . import charts, compare, cuda, device, harness, measure, pages, peers, plots, report, rows, shapes
from .cases import CASES, DTYPES, MODES
from .rows import Results

THRESHOLD = 5.0  # percent


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    ops = [case.op for case in CASES]
    which = parser.add_argument_group("which rows")
    which.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where torch finds a GPU")
    which.add_argument("--quick", action="store_true", help="fewer shapes and samples: minutes instead of tens of minutes")
    which.add_argument("--ops", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)}")
    which.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)}")
    which.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=f"of {', '.join(MODES)}")
    which.add_argument("--shapes", nargs="+", choices=shapes.SETS, metavar="SET",
                      help="main (one for each op), gpt2 (124M to 8.3B), columns, vocabulary; default all, on a CPU with --quick "
                           "main")
    which.add_argument("--columns", nargs="+", type=positive, metavar="N", help="of the matrices; default 256 to 262144")
    which.add_argument("--vocabulary", nargs="+", type=positive, metavar="N", help="of the cross-entropies; default 4096 to 262144")
    which.add_argument("--peers", nargs="+", choices=peers.NAMES, metavar="PEER",
                      help=f"of {', '.join(peers.NAMES)}; default all on a GPU, eager and compile on a CPU")
    how = parser.add_argument_group("how")
    how.add_argument("--implementation", help="ours: cpu, cuda, triton or reference; default the device's name")
    how.add_argument("--threads", type=positive, default=harness.processors(),
                     help="on a CPU; default: the processors this process may use")
    how.add_argument("--allocator", choices=["both", "reusing", "default"],
                     help="on a CPU: glibc keeping freed blocks (the default with --quick), as it ships, or a table for each "
                          "(otherwise)")
    how.add_argument("--sittings", type=positive, help="of each row, spread over the run; default 2 on a CPU, 1 on a GPU")
    how.add_argument("--rounds", type=positive, help="at least, in a sitting")
    how.add_argument("--seconds", type=float, help="at least, in a sitting")
    how.add_argument("--minutes", type=float, help="what has not begun by then is skipped, by name")
    what = parser.add_argument_group("what to do with the results")
    what.add_argument("--csv", metavar="FILE", help="one line per row and contestant")
    what.add_argument("--json", metavar="FILE", help="everything; written anew after every shape, so that nothing is lost")
    what.add_argument("--plot", metavar="DIR", help="SVG charts (needs matplotlib)")
    what.add_argument("--readme", action="store_true",
                      help="put tables and the charts of --plot into README.md and docs/benchmarks.md, unless an op is wrong")
    what.add_argument("--from", metavar="FILE", dest="source", help="measure nothing: take what --json wrote into FILE")
    what.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="measure nothing: show what moved, beyond noise")
    what.add_argument("--threshold", type=float, default=THRESHOLD, metavar="PERCENT",
                      help="for --compare: what moved by less is not shown; default %(default)g")
    args = parser.parse_args(argv)
    args.peers_given = args.peers is not None
    args.device = args.device or ("cpu" if cuda.why_not() else "cuda")
    for name, value in defaults(args.device, args.quick).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda":
        args.allocator = ""
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def defaults(kind: str, quick: bool) -> dict[str, object]:
    size = shapes.sizes(kind, quick)
    common = {"columns": size.columns, "vocabulary": size.vocabulary, "peers": peers.by_default(kind), "implementation": kind}
    if kind == "cpu":
        return common | {"dtypes": ["fp32", "bf16"], "shapes": ["main"] if quick else list(shapes.SETS), "sittings": 2,
                         "allocator": "reusing" if quick else "both", "rounds": 5 if quick else 8,
                         "seconds": 0.1 if quick else 0.4, "minutes": 10.0 if quick else 30.0}
    return common | {"dtypes": ["bf16"] if quick else ["bf16", "fp32", "fp16"], "shapes": list(shapes.SETS), "sittings": 1,
                     "rounds": 7 if quick else 20, "seconds": 0.1 if quick else 0.2, "minutes": 1.5 if quick else 9.0}


def with_default_allocator(argv: Sequence[str]) -> Results:
    """The main shapes once more, in one sitting of a child process whose allocator is as glibc ships it."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "results.json"
        command = [sys.executable, "-m", "benchmarks.ops", *without_outputs(argv), "--allocator", "default", "--shapes", "main",
                   "--sittings", "1", "--json", str(file)]
        subprocess.run(command, env=harness.allocator_environment(reusing=False), cwd=harness.ROOT, stdout=subprocess.DEVNULL)
        if not file.exists():
            raise ValueError("the run with the default allocator ended without results")
        return Results.load(file)


def without_outputs(argv: Sequence[str]) -> list[str]:
    """The arguments without what is to be done with the results, which is the parent's."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if word.startswith("--"):
            name = word.partition("=")[0]
            skip = name in ("--csv", "--json", "--plot", "--readme")
        if not skip:
            kept.append(word)
    return kept


def main(argv: Sequence[str] | None = None, on: device.Device | None = None) -> int:
    """Measures on that device, the one that --device names if None, shows and writes the results. 1 where an op is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    try:
        if args.compare:
            return compared(args)
        if args.plot and (why := charts.why_not()):
            raise ValueError(f"--plot: {why}")
        found = Results.load(args.source) if args.source else measured(args, argv, on)
        report.show(found)
        if args.csv:
            rows.write_csv(args.csv, found)
        if args.json:
            rows.write_json(args.json, found)
        drawn = plots.draw(args.plot, found) if args.plot else []
        if any(row.failure for row in found.rows):
            return 1
        if args.readme:
            pages.write_pages(harness.ROOT, found, [path.resolve() for path in drawn])
    except ValueError as error:
        print(f"benchmarks.ops: {error}", file=sys.stderr)
        return 1
    return 0


def compared(args: argparse.Namespace) -> int:
    a, b = (Results.load(file) for file in args.compare)
    if why := compare.why_not(a, b):
        raise ValueError(f"--compare {args.compare[0]} {args.compare[1]}: {why}")
    compare.show(a, b, args.threshold / 100)
    return 0


def measured(args: argparse.Namespace, argv: Sequence[str], on: device.Device | None) -> Results:
    """ValueError, in one line, where there is nothing to measure on or with."""
    if args.device == "cuda" and on is None and (why := cuda.why_not()):
        raise ValueError(f"--device cuda: {why}")
    if args.device == "cpu" and args.allocator != "default":
        harness.restart_reusing("benchmarks.ops", argv)
    if why := harness.why_unavailable(args.implementation):
        raise ValueError(f"--implementation {why}")
    both = args.allocator == "both"
    if args.device == "cpu":
        args.allocator = "default" if args.allocator == "default" else "reusing"
        torch.set_num_threads(args.threads)
    on = on or (device.cpu() if args.device == "cpu" else cuda.device())

    def so_far(found: Results) -> None:
        if args.json:
            rows.write_json(args.json, found)

    found = measure.run(list(shapes.entries(args)), args, on, so_far)
    return found.followed_by(with_default_allocator(argv)) if both else found


if __name__ == "__main__":
    sys.exit(main())
