"""Runs of benchmarks.scaling side by side: a table for people, the same in Markdown, and the scaling chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from . import charts, report, scaling_efficiency
from .scaling_efficiency import Efficiency, compare

Run = dict[str, Any]


def significant(value: float) -> str:
    """Three significant digits, as a plain number with separated thousands."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}" if abs(value) >= 0.01 else f"{value:.2g}"


def layout(run: Run) -> str:
    s, mesh = run["settings"], run["mesh"]
    parts = [f"tp {mesh['tp']}" + (" sp" if s["sequence_parallel"] and mesh["tp"] > 1 else "")] if mesh["tp"] > 1 else []
    parts += [f"pp {mesh['pp']} {s['schedule']}"] if mesh["pp"] > 1 else []
    parts += [f"dp {mesh['dp']} {s['data_parallel']}"] if mesh["dp"] > 1 else []
    return ", ".join(parts) or "one device"


def operations(count: float) -> str:
    """FLOPs in billions, or thousands or millions of them."""
    for unit, size in (("P", 1e15), ("T", 1e12)):
        if count >= size:
            return f"{count / size:,.2f} {unit}FLOP"
    return f"{count / 1e9:,.3f} GFLOP"


def _counted(run: Run) -> str:
    f = run["flops"]
    if f["wrong"]:
        return f"WRONG: {operations(f['counted'])}"
    return "the same" if f["exact"] else f"{operations(f['counted'])}, {f['counted'] / f['model']:.3f} x"


def _memory(run: Run) -> str:
    peaks = [peak for peak in run["memory"]["peak_bytes"] if peak is not None]
    return f"{max(peaks) / 2**20:,.0f} MiB" if peaks else "-"


def _exposed(run: Run) -> str:
    found = run["exposed"]
    return "none" if found is None else f"{found['exposed_ms']:.1f} ms, {found['share']:.0%}"


def many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _devices(run: Run) -> str:
    return many(run["world"], "device")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# A line of the table: its title, and the run's and its efficiency's value.
LINES: tuple[tuple[str, Callable[[Run, Efficiency], str]], ...] = (
    ("preset", lambda run, e: run["settings"]["preset"]),
    ("ranks share it by", lambda run, e: layout(run)),
    ("layers / hidden / heads", lambda run, e: " / ".join(str(run["settings"][name]) for name in ("layers", "hidden", "heads"))),
    ("parameters", lambda run, e: f"{run['parameters'] / 1e6:,.1f} M"),
    ("batch x sequence", lambda run, e: f"{run['global_batch']} x {run['settings']['sequence']}"),
    ("dtype", lambda run, e: run["settings"]["dtype"] + (", fp32 master" if run["settings"]["master_weights"] else "")),
    ("ms a step, median", lambda run, e: f"{run['median_ms']:.1f}"),
    ("   p10 - p90", lambda run, e: f"{run['p10_ms']:.1f} - {run['p90_ms']:.1f}"),
    ("tokens/s", lambda run, e: significant(run["tokens_per_second"])),
    ("   per device", lambda run, e: significant(run["tokens_per_second_per_device"])),
    ("model TFLOP/s per device", lambda run, e: significant(run["model_tflops_per_device"])),
    ("   hardware TFLOP/s", lambda run, e: significant(run["hardware_tflops_per_device"])),
    ("a replica's step, 72 form", lambda run, e: operations(run["flops"]["model"])),
    ("   counted", lambda run, e: _counted(run)),
    ("   96 form", lambda run, e: operations(run["flops"]["hardware_form"])),
    ("MFU", lambda run, e: _share(run["mfu"])),
    ("exposed communication", lambda run, e: _exposed(run)),
    ("peak memory of a device", lambda run, e: _memory(run)),
    ("weak efficiency", lambda run, e: _share(e.weak)),
    ("strong efficiency", lambda run, e: _share(e.strong)),
)


def rows(runs: Sequence[Run], baseline: Run) -> list[list[str]]:
    """A header and the lines, one column for each run."""
    efficiencies = [compare(run, baseline) for run in runs]
    header = ["", *map(_devices, runs)]
    return [header, *([title, *(value(*pair) for pair in zip(runs, efficiencies, strict=True))] for title, value in LINES)]


def notes(runs: Sequence[Run], baseline: Run, baseline_name: str) -> list[str]:
    """What the table can't say, each thing once, with the runs that it is about."""
    said: dict[str, list[str]] = {}
    for run in runs:
        efficiency, n = compare(run, baseline), _devices(run)
        said.setdefault(f"Efficiency is against {baseline_name}.", []).append(n)
        for what, why in (("weak", efficiency.weak_why), ("strong", efficiency.strong_why)):
            if why:
                said.setdefault(f"No {what} efficiency: {why}.", []).append(n)
        if run["mfu"] is None:
            said.setdefault(f"No MFU: {run['mfu_why']}.", []).append(n)
        else:
            said.setdefault(f"MFU is of {run['peak']['tflops']:g} TFLOP/s ({run['peak']['source']}).", []).append(n)
        if run["flops"]["why"] and not run["flops"]["wrong"]:
            said.setdefault(f"The count is not the 72 form: {run['flops']['why']}.", []).append(n)
        if run["exposed"]:
            said.setdefault("Exposed communication is of a step under the profiler, the ranks' mean.", []).append(n)
        said.setdefault(f"Memory is the {run['memory']['what']}; of the rank that has most.", []).append(n)
        for note in run["notes"]:
            said.setdefault(f"{note[0].upper()}{note[1:]}.", []).append(n)
    return [text if len(which) == len(runs) else f"{text[:-1]} ({', '.join(dict.fromkeys(which))})."
            for text, which in said.items()]


def described(run: Run) -> str:
    e = run["environment"]
    host = (f"{many(e['threads'], 'thread')} a rank, {many(e['processors'], 'processor')}" if e["kind"] == "cpu"
            else f"CUDA {e['cuda']}, NCCL {e['nccl']}")
    return (f"{e['device']}, {host}, {e['backend']}; {many(run['iterations'], 'timed step')} after {run['warmup']}; "
            f"torch {e['torch']}, megatron_kernels {e['megatron_kernels']} at {e['commit']}; {e['date']}")


def _where(runs: Sequence[Run]) -> list[str]:
    """Where the runs took place, each place once."""
    return list(dict.fromkeys(map(described, runs)))


def show(runs: Sequence[Run], baseline: Run, baseline_name: str, paper: bool = False) -> None:
    out = report.console()
    header, *lines = rows(runs, baseline)
    table = Table(title="GPT-2 training", title_justify="left", box=box.SIMPLE)
    for column in header:
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for line in lines:
        table.add_row(*line)
    out.print(table)
    for note in notes(runs, baseline, baseline_name):
        out.print(note, style="bold red" if note.startswith("WRONG") else None, highlight=False)
    if paper:
        head, *reported = scaling_efficiency.paper()
        theirs = Table(box=box.SIMPLE)
        for column in head:
            theirs.add_column(column, justify="right" if column != head[0] else "left")
        for line in reported:
            theirs.add_row(*line)
        out.print(theirs)
        out.print(scaling_efficiency.PAPER_SOURCE, highlight=False)
    for where in _where(runs):
        out.print(where, style="dim", highlight=False)


def markdown(runs: Sequence[Run], baseline: Run, baseline_name: str) -> str:
    header, *lines = rows(runs, baseline)
    table = [header, ["---", *["---:"] * len(runs)], *lines]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in table), "", " ".join(notes(runs, baseline, baseline_name)), "",
                      f"Measured on {'; and on '.join(_where(runs))}."]) + "\n"


def chart(path: str | Path, runs: Sequence[Run], baseline: Run) -> None:
    """Efficiency and tokens/s against devices, beside the baseline's rate on as many. Both count model FLOPs: where the model grows
    with the devices, a token costs more. RuntimeError without matplotlib."""
    runs = sorted(runs, key=lambda run: run["world"])
    rate = baseline["model_tflops_per_device"] * 1e12
    measured, ideal, low, high = [], [], [], []
    for run in runs:
        n, tokens = run["world"], run["global_batch"] * run["settings"]["sequence"]
        measured.append((n, run["tokens_per_second"]))
        low.append(tokens / run["p90_ms"] * 1e3)
        high.append(tokens / run["p10_ms"] * 1e3)
        ideal.append((n, rate * n * tokens / (run["flops"]["model"] * run["mesh"]["dp"])))
    ticks, lines = [run["world"] for run in runs], []
    for what in ("weak", "strong"):
        found = [(run, getattr(compare(run, baseline), what)) for run in runs]
        points = [(run["world"], 100 * value) for run, value in found if value is not None]
        if len(points) > 1 or (points and not lines):  # the baseline's own 100% is in both
            lines.append(charts.Series(f"{what} efficiency", points))
    log = len(ticks) > 1
    panels = [charts.Panel(lines, "Scaling efficiency", "devices", "percent", log_x=log, level=(100.0, "ideal"), ticks=ticks)]
    charts.grid(path, [
        *(panels if lines else []),  # none of them may be comparable with the baseline
        charts.Panel([charts.Series("measured", measured, low, high), charts.Series("at the baseline's FLOP/s per device", ideal,
                                                                                 dashed=True)],
                     "Throughput", "devices", "tokens/s", log_x=log, ticks=ticks)],
        columns=2, title=f"GPT-2 training, {runs[-1]['environment']['device']}")


def draw(path: str | Path, runs: Sequence[Run], baseline: Run) -> None:
    """The chart, or why there is none."""
    if why := charts.why_not():
        print(f"no chart: {why}")
        return
    chart(path, runs, baseline)
    print(f"chart: {path}")
