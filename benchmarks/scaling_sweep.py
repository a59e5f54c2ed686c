"""benchmarks.scaling --sweep: one run after the other with more and more ranks of this machine, each by torchrun."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import files, harness, scaling_report, scaling_run, trainer
from .trainer import Settings

ALONG = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "dp": None}
# Presets by devices: the model grows with the ranks that share every layer. 64 times as many are 64 replicas of the same.
FAMILIES = {"paper": {1: "1.2B", 2: "2.5B", 4: "4.2B", 8: "8.3B"},
            "small": {1: "small-1", 2: "small-2", 4: "small-4", 8: "small-8"}}


def counts(text: str) -> list[int]:
    """The numbers of ranks in "1,2,4"; ValueError for others."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise ValueError(f"--sweep must be different numbers of ranks, such as 1,2,4,8, got {text!r}")
    return found


def settings_for(args: argparse.Namespace, ranks: int) -> Settings:
    """What the sweep runs with so many ranks; ValueError where they can't share it."""
    along = args.along or "dp"
    if args.family and (args.strong or args.along):
        raise ValueError("--family is weak scaling by tensor parallelism, without --strong and --along")
    if args.weak and ALONG[along]:
        raise ValueError(f"--weak --along {along}: the ranks would share one model and batch, which is strong scaling; --family "
                         "has models that grow")
    try:
        settings = trainer.from_args(args, _preset(args.family, ranks) if args.family else None)
        if ALONG[along]:
            settings = replace(settings, **{ALONG[along]: ranks})
        elif args.strong:
            replicas = settings.replicas(ranks)
            if settings.batch % replicas:
                raise ValueError(f"--strong: {replicas} replicas do not divide the batch {settings.batch}")
            settings = replace(settings, batch=settings.batch // replicas)
        scaling_run.check(settings, ranks)
    except ValueError as error:
        raise ValueError(f"--sweep {args.sweep}, {scaling_report.many(ranks, 'rank')}: {error}") from error
    return settings


def _preset(family: str, ranks: int) -> str:
    if ranks not in FAMILIES[family]:
        raise ValueError(f"--family {family} has presets for {', '.join(map(str, FAMILIES[family]))} ranks")
    return FAMILIES[family][ranks]


def command(args: argparse.Namespace, settings: Settings, ranks: int, threads: int, device_type: str, path: Path) -> list[str]:
    options = ["--device", device_type, "--iterations", str(args.iterations), "--warmup", str(args.warmup), "--timeout",
               str(args.timeout), "--threads", str(threads), "--json", str(path.resolve())]
    if args.peak_tflops:
        options += ["--peak-tflops", str(args.peak_tflops)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
            "benchmarks.scaling", *trainer.to_arguments(settings), *options]


def main(args: argparse.Namespace, device_type: str, threads_for: Callable[[argparse.Namespace, int], int]) -> int:
    """All runs, their table and chart. The exit status of the first that fails; what came before it is kept."""
    ranks = counts(args.sweep)
    planned = [(n, settings_for(args, n)) for n in ranks]
    for n in ranks:
        if why := scaling_run.why_not(device_type, n):
            raise ValueError(f"--sweep {args.sweep}: {why}")
    baseline = scaling_run.load(args.baseline) if args.baseline else None
    out, threads, found, status = Path(args.out or scaling_run.DIRECTORY / "sweep"), threads_for(args, max(ranks)), [], 0
    environment = {**harness.allocator_environment(reusing=device_type == "cpu"), **scaling_run.QUIET,
                   "OMP_NUM_THREADS": str(threads)}
    scaling_run.check_writable(out / "table.md")
    for n, settings in planned:
        path = out / f"{n}.json"
        size = scaling_report.many(n, "rank")
        print(f"{size}: {scaling_run.name_of(settings, n)}", file=sys.stderr, flush=True)
        path.unlink(missing_ok=True)
        done = subprocess.run(command(args, settings, n, threads, device_type, path), env=environment, cwd=harness.ROOT,
                              capture_output=True, text=True)
        if path.exists():
            found.append(scaling_run.load(path))
        if done.returncode:
            status = done.returncode
            print(f"benchmarks.scaling: the run with {size} failed:\n{reason(done.stderr)}", file=sys.stderr)
            break
    if not found:
        return status
    first = f"the run with {scaling_report.many(ranks[0], 'device')}"
    baseline, name = (baseline, args.baseline) if baseline else (found[0], first)
    scaling_report.show(found, baseline, name, args.paper)
    files.write(out / "table.md", scaling_report.markdown(found, baseline, name))
    print(f"kept in {out}/")
    scaling_report.draw(args.chart or out / "scaling.svg", found, baseline)
    return status


def reason(log: str) -> str:
    """What a failed run's ranks said, without what torchrun says about them."""
    lines = re.findall(r"^benchmarks\.scaling: .*", log, re.MULTILINE)
    return "\n".join(dict.fromkeys(lines)) or log[-2000:].strip()
