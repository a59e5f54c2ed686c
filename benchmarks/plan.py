"""What a training step of GPT-2 will need, before it is started: `python -m benchmarks.plan`.

    python -m benchmarks.plan --preset 8.3B --tensor-parallel 8 --data-parallel 64
    python -m benchmarks.plan --preset 8.3B --pipeline-parallel 4 --microbatches 8 --world 4096 --data-parallel fsdp
    python -m benchmarks.plan --preset small-2 --target cpu --rates rates.json
    python -m benchmarks.plan --rates rates.json --check scaling-runs/*.json

One process pretends to be one rank (of a pipeline the first, a middle and the last) and runs the step that benchmarks.scaling
times, on tensors that have shapes and no memory. FLOPs, bytes and the peak of memory are counted, beside closed forms. Times are
printed only with --rates, a file that `benchmarks.scaling --measure-rates` wrote, and are modelled; --check sets them beside runs
that benchmarks.scaling measured. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_kernels.parallel.collectives import CollectiveError

from . import files, plan_fake, plan_report, plan_time, report, scaling_efficiency, scaling_report, scaling_run, trainer
from .plan_report import Checked, Compared
from .plan_time import Rates
from .plan_trace import trace
from .trainer import Settings

KIND = "benchmarks.plan"
BUSY = 0.05  # of the processors' time: from there on a measured run is remarked upon


def replicas_or_kind(text: str) -> int | str:
    if text in ("ddp", "fsdp"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected the number of replicas, ddp or fsdp, got {text!r}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__, conflict_handler="resolve",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    trainer.add_arguments(parser)
    parser.set_defaults(preset=None)
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--data-parallel", nargs="+", type=replicas_or_kind, metavar="N|ddp|fsdp", default=[], dest="replicas",
                       help="how many replicas (default: one), and how they are kept equal (default: the preset's)")
    ranks.add_argument("--world", type=int, metavar="N", help="all ranks, in place of the number of replicas")
    ranks.add_argument("--rank", type=int, metavar="R", help="trace this one alone")
    ranks.add_argument("--target", choices=plan_fake.TARGETS, default="gpu",
                       help="whose paths are taken where they differ; default gpu")
    times = parser.add_argument_group("times")
    times.add_argument("--rates", metavar="FILE", help="what benchmarks.scaling --measure-rates wrote: model how long a step takes")
    times.add_argument("--check", nargs="+", metavar="RUN", help="runs that benchmarks.scaling kept: measured beside modelled")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="write everything there")
    out.add_argument("--paper", action=argparse.BooleanOptionalAction, default=None,
                     help="print the paper's table; default: with the paper's presets")
    args = parser.parse_args(argv)
    kinds, numbers = ([one for one in args.replicas if isinstance(one, kind)] for kind in (str, int))
    if len(kinds) > 1 or len(numbers) > 1:
        parser.error("--data-parallel takes one number and one of ddp and fsdp")
    if numbers and args.world is not None:
        parser.error("--data-parallel with a number, and --world: only one of them")
    if args.check and not args.rates:
        parser.error("--check needs --rates")
    asked = (args.preset, args.world, args.rank, *args.replicas, *(getattr(args, one.name, None) for one in fields(Settings)))
    args.plan = not args.check or any(one is not None for one in asked)
    args.preset = args.preset or "tiny"
    args.data_parallel, args.replicas = kinds[0] if kinds else None, numbers[0] if numbers else 1
    return args


def ranks_of(settings: Settings, world: int, rank: int | None) -> list[int]:
    """Which ranks are traced: of a pipeline the first, a middle and the last; replicas and tensor-parallel ranks are alike."""
    if rank is not None:
        if not 0 <= rank < world:
            raise ValueError(f"--rank must be in [0, {world}), got {rank}")
        return [rank]
    p = settings.pipeline_parallel
    return [place * (world // p) for place in sorted({0, p // 2, p - 1})]


def traced(settings: Settings, world: int, ranks: Sequence[int], target: str) -> list[Compared]:
    return [plan_report.compare(trace(settings, world, rank, target), settings, world, target) for rank in ranks]


def check(paths: Sequence[str], rates: Rates) -> list[Checked]:
    """Measured runs beside the model of each. Raises ValueError for a file that is no run."""
    rows = []
    for path in paths:
        run = scaling_run.load(path)
        settings, world, modelled = Settings.from_json(run["settings"]), run["world"], None
        what, why = f"{settings.preset}, {scaling_report.layout(run)}", plan_time.comparable(run["environment"], rates)
        if not why:
            target = "cpu" if run["environment"]["kind"] == "cpu" else "gpu"
            try:
                found = traced(settings, world, ranks_of(settings, world, None), target)
                modelled = plan_time.estimate([one.trace for one in found], settings, rates)
            except ValueError as error:
                why = str(error)
        rows.append(Checked(Path(path).stem, what, run["median_ms"] / 1e3, modelled, why, run.get("others")))
    return rows


def show(settings: Settings, world: int, target: str, found: Sequence[Compared], seconds: float, with_paper: bool) -> None:
    out = report.console()
    out.print(plan_report.title(settings, world), style="bold", highlight=False)
    out.print(f"Traced in {seconds:.0f} s, with the paths of a {target.upper()}. Bytes of a tensor are those of the whole one; on "
              "the wire: what a rank sends round a ring.", highlight=False)
    for one in found:
        out.print(f"\n{plan_report.rank_title(one)}", style="bold", highlight=False)
        out.print(report.table(["", "traced", "closed form", ""], plan_report.flops_lines(one), left=1, sections=False), "")
        if sent := plan_report.sent_lines(one):
            out.print(report.table(["group", "phase", "", "calls", "tensors", "on the wire", "closed form"], sent, left=3,
                                   sections=False), "")
        out.print(report.table(["memory", "traced", "closed form", ""], plan_report.memory_lines(one), left=1, sections=False), "")
        if one.korthikanti is not None:
            out.print("The last line's form is that of Korthikanti et al. 2022 (arXiv 2205.05198) for the layers alone, of another "
                      "implementation.", highlight=False)
    for note in notes(settings, found):
        out.print(note, highlight=False)
    if with_paper:
        out.print("\nThe paper's weak scaling, beside what these models need by closed form", style="bold", highlight=False)
        out.print(report.table(["model", "GPUs", "tp x dp", "FLOP a rank", "sent in tp", "sent in dp", "without activations",
                                "paper: efficiency"], plan_report.paper_lines(), left=1, sections=False), "")
        out.print(scaling_efficiency.PAPER_SOURCE, highlight=False)
        out.print("The plan does not predict these: it knows no rate of that machine. FLOPs are without recomputation, bytes in tp "
                  "with it; dp is DDP.", highlight=False)


def notes(settings: Settings, found: Sequence[Compared]) -> list[str]:
    lines = ["Memory is what tensors hold: no fragments, no buffers of NCCL, no workspaces of libraries."]
    if any(line.name == ("backward", "all_reduce", "dp") for one in found for line in one.sent):
        lines.append("DDP's all-reduces are its buckets from the second step on, by the order in which gradients arrived.")
    if settings.attention == "sdpa" and settings.dropout > 0:
        lines.append("scaled_dot_product_attention with dropout is traced as a CPU computes it, which holds the probabilities.")
    if settings.recompute:
        lines.append("torch stops to compute a layer again where the backward has what it needs.")
    return lines


def show_times(found: plan_time.Estimate, rates: Rates) -> None:
    out = report.console()
    out.print(f"\nModelled, not measured: milliseconds of a step, from {rates.path}", style="bold", highlight=False)
    out.print(report.table(["", "ms"], plan_report.time_lines(found), left=1, sections=False), "")
    for note in plan_report.time_notes(found):
        out.print(note, highlight=False)


def show_check(rows: Sequence[Checked], rates: Rates) -> None:
    out = report.console()
    out.print(f"\nMeasured runs beside the model, milliseconds; rates from {rates.path}", style="bold", highlight=False)
    out.print(report.table(["run", "", "measured", "modelled", "dp hidden", "error", "from measured rates"],
                           plan_report.check_lines(rows), left=2, sections=False, fold=True), "")
    for row in rows:
        if row.others is not None and row.others > BUSY:
            out.print(f"{row.name}: other processes took {row.others:.0%} of the processors: its time says little.",
                      highlight=False)
    errors = [abs(row.error) for row in rows if row.error is not None]
    if errors:
        out.print(f"Nothing was fitted to these runs. Error of the modelled step: {sum(errors) / len(errors):.0%} on average, at "
                  f"most {max(errors):.0%}, of {len(errors)} runs.", highlight=False)


def run(args: argparse.Namespace) -> int:
    rates = Rates.load(args.rates) if args.rates else None
    data: dict[str, Any] = {"kind": KIND, "rates": args.rates}
    differing: list[str] = []
    if args.plan:
        data |= plan(args, rates, differing)
    if rates and args.check:
        rows = check(args.check, rates)
        show_check(rows, rates)
        data["check"] = [row.as_json() for row in rows]
    if args.json:
        files.write_json(Path(args.json), data)
    if differing:
        print(f"benchmarks.plan: trace and closed form differ: {'; '.join(differing)}", file=sys.stderr)
    return int(bool(differing))


def plan(args: argparse.Namespace, rates: Rates | None, differing: list[str]) -> dict[str, Any]:
    """Trace and show; what the file holds of it. What differs from its closed form is added to `differing`."""
    settings = trainer.from_args(args)
    world = args.world if args.world is not None else args.replicas * settings.tensor_parallel * settings.pipeline_parallel
    settings.replicas(world)
    start = time.perf_counter()
    found = traced(settings, world, ranks_of(settings, world, args.rank), args.target)
    seconds = time.perf_counter() - start
    times = plan_time.estimate([one.trace for one in found], settings, rates) if rates else None
    show(settings, world, args.target, found, seconds, settings.preset in plan_report.PAPER if args.paper is None else args.paper)
    if rates and times:
        show_times(times, rates)
    differing += [f"rank {one.trace.rank}: {name}" for one in found for name in one.differing]
    return {"settings": settings.as_json(), "world": world, "target": args.target, "seconds": seconds,
            "ranks": [one.as_json() for one in found], "modelled": None if times is None else asdict(times)}


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of things that its private modules do
            return run(args)
    except (ValueError, CollectiveError) as error:
        print(f"benchmarks.plan: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"benchmarks.plan: {error.filename or args.json}: {os.strerror(error.errno) if error.errno else error}",
              file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
