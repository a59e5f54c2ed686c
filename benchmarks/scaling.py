"""Throughput of GPT-2's training at any mix of tensor, sequence, pipeline and data parallelism.

    torchrun --nproc-per-node 2 -m benchmarks.scaling --preset tiny --tensor-parallel 2
    python -m benchmarks.scaling --preset tiny                                   one device, without torchrun
    python -m benchmarks.scaling --sweep 1,2,4,8 --family paper                  starts torchrun itself: weak scaling
    python -m benchmarks.scaling --sweep 1,2,4,8 --strong --preset 1.2B --along tp
    python -m benchmarks.scaling --show runs/*.json --chart scaling.svg          runs that were kept, the first is the baseline
    torchrun --nproc-per-node 2 -m benchmarks.scaling --measure-rates rates.json what benchmarks.plan predicts from

Every run prints a table and keeps itself as JSON, with a chart beside it. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import files, harness, rates, scaling_report, scaling_run, scaling_sweep, trainer
from .scaling_run import DIRECTORY, QUIET
from .trainer import Settings


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", metavar="N,N", help="run with so many ranks each, one run after the other, on this machine")
    mode.add_argument("--show", nargs="+", metavar="FILE", help="tabulate and draw runs that were kept")
    mode.add_argument("--measure-rates", metavar="FILE", help="how fast products and collectives are, for benchmarks.plan")
    trainer.add_arguments(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    run.add_argument("--iterations", type=int, default=20, help="timed steps, at least 1; default 20")
    run.add_argument("--warmup", type=int, default=5, help="steps before them; default 5")
    run.add_argument("--threads", type=int, help="of a rank on a CPU; default: the processors shared out to the machine's ranks")
    run.add_argument("--timeout", type=float, default=600.0, help="seconds that a rank waits for another; default 600")
    run.add_argument("--peak-tflops", type=float, help="peak of a device, for MFU, in place of the table's")
    out = parser.add_argument_group("results")
    out.add_argument("--baseline", metavar="FILE", help="the run that efficiency is against; default: itself, of a sweep the first")
    out.add_argument("--json", metavar="FILE", help=f"keep the run there; default: under its name in {DIRECTORY}/")
    out.add_argument("--chart", metavar="FILE", help="an SVG file; default: beside the run")
    out.add_argument("--out", metavar="DIR", help=f"of a sweep: where its runs, table and chart go; default: {DIRECTORY}/sweep")
    out.add_argument("--paper", action="store_true", help="print what the paper reports below")
    sweep = parser.add_argument_group("sweep")
    kind = sweep.add_mutually_exclusive_group()
    kind.add_argument("--weak", action="store_true", help="every device has the same work; the default")
    kind.add_argument("--strong", action="store_true", help="the devices share the work of one")
    sweep.add_argument("--along", choices=list(scaling_sweep.ALONG), help="what the ranks are used for; default dp")
    sweep.add_argument("--family", choices=list(scaling_sweep.FAMILIES), help="weak scaling whose model grows, tensor-parallel")
    parser.add_argument_group("rates").add_argument("--rates-for", nargs="+", metavar="PRESET", choices=list(trainer.PRESETS),
                                                    help="presets whose products are measured; default: the settings' own")
    args = parser.parse_args(argv)
    for name, least in (("iterations", 1), ("warmup", 0), ("threads", 1), ("timeout", 1), ("peak_tflops", 0.001)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value:g}")
    if not args.sweep and (args.weak or args.strong or args.along or args.family or args.out):
        parser.error("--weak, --strong, --along, --family and --out are for --sweep")
    return args


def threads_for(args: argparse.Namespace, ranks_here: int) -> int:
    return args.threads or max(1, scaling_run.processors() // ranks_here)


def run(args: argparse.Namespace, settings: Settings, device: torch.device, ranks_here: int, path: Path) -> int:
    """This rank's part of a run; the first rank shows and keeps it. 1 where the FLOPs are not what they must be."""
    found = scaling_run.measure(settings, settings.mesh(device.type), device, iterations=args.iterations, warmup=args.warmup,
                                ranks_here=ranks_here, peak_tflops=args.peak_tflops)
    if dist.get_rank() == 0:
        keep(args, found, scaling_run.load(args.baseline) if args.baseline else None, path)
    return int(found["flops"]["wrong"])


def measure_rates(wanted: list[Settings], device: torch.device, ranks_here: int, path: Path) -> int:
    """This rank's part; the first rank keeps what was found."""
    found = rates.measure(wanted, device, ranks_here)
    if dist.get_rank() == 0:
        files.write_json(path, found)
        print(", ".join(f"{len(found[name])} of {name}" for name in ("matmul", "batched_matmul", "collectives")) + f": {path}")
    return 0


def keep(args: argparse.Namespace, found: dict[str, Any], baseline: dict[str, Any] | None, path: Path) -> None:
    """Show the run, write its file, and draw it."""
    name = args.baseline if baseline else "itself"
    efficiency = scaling_report.compare(found, baseline or found)
    files.write_json(path, {**found, "efficiency": {"baseline": name, **efficiency._asdict()}})
    scaling_report.show([found], baseline or found, name, args.paper)
    print(f"kept as {path}")
    scaling_report.draw(args.chart or path.with_suffix(".svg"), [baseline, found] if baseline else [found], baseline or found)


def show(args: argparse.Namespace) -> int:
    runs = [scaling_run.load(path) for path in args.show]
    baseline, name = (scaling_run.load(args.baseline), args.baseline) if args.baseline else (runs[0], args.show[0])
    scaling_report.show(runs, baseline, name, args.paper)
    if args.chart:
        scaling_report.draw(args.chart, runs, baseline)
    return 0


def one_rank(args: argparse.Namespace, argv: list[str], device_type: str, world: int, rank: int) -> int:
    """What this process does, alone or as one that torchrun started. ValueError for what can't be run, before anything is sent."""
    ranks_here, local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    settings = trainer.from_args(args)
    wanted = [trainer.from_args(args, name) for name in args.rates_for or [settings.preset]]
    if not args.measure_rates:
        scaling_run.check(settings, world)
    if why := scaling_run.why_not(device_type, ranks_here):
        raise ValueError(why)
    if args.baseline:
        scaling_run.load(args.baseline)
    path = Path(args.measure_rates or args.json or DIRECTORY / f"{scaling_run.name_of(settings, world)}.json")
    if rank == 0:
        scaling_run.check_writable(path)
    if device_type == "cpu":
        os.environ.update(QUIET)
        harness.restart_reusing("benchmarks.scaling", argv)
    torch.set_num_threads(threads_for(args, ranks_here))
    device = scaling_run.start(device_type, local_rank, datetime.timedelta(seconds=args.timeout))
    if args.measure_rates:
        status = measure_rates(wanted, device, ranks_here, path)
    else:
        status = run(args, settings, device, ranks_here, path)
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    dist.destroy_process_group()
    return status


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device_type = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.show:
            return show(args)
        if args.sweep:
            return scaling_sweep.main(args, device_type, threads_for)
        return one_rank(args, argv, device_type, world, rank)
    except ValueError as error:
        if rank > 0:
            time.sleep(10)  # as a rule all refuse alike: the first says why, and torchrun ends the others when it ends
        print(f"benchmarks.scaling: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        traceback.print_exc()
        print(f"benchmarks.scaling: rank {rank} of {world} failed: {type(error).__name__}: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the others may wait for this rank: torchrun ends them


if __name__ == "__main__":
    raise SystemExit(main())
