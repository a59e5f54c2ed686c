"""The op benchmark's results as SVG charts: GB/s and time against size, with the rate of a copy as the roof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import charts
from .charts import Panel, Series
from .harness import Timing
from .rows import Results, Row, counted

ROOF = "copy (roofline)"
MAIN_DTYPE = {"cpu": "fp32", "cuda": "bf16"}


def draw(directory: str | Path, found: Results) -> list[Path]:
    """Write the charts for which there are rows, and name them, the one that shows most first. RuntimeError without matplotlib."""
    rows = [row for row in found.rows if row.timings and row.allocator != "default"]
    dtypes = sorted(dict.fromkeys(row.dtype for row in rows), key=lambda dtype: dtype != MAIN_DTYPE[found.kind])
    written: list[Path] = []

    def grid(name: str, title: str, panels: list[Panel]) -> None:
        if panels:
            path = Path(directory) / f"{found.kind}-{name}.svg"
            charts.grid(path, panels, columns=2, title=f"{title}. {_where(found)}")
            written.append(path)

    for dtype in dtypes:
        these = [row for row in rows if row.dtype == dtype]
        for mode in ("forward", "backward"):
            by_columns = [row for row in these if row.group == "columns" and row.mode == mode]
            grid(f"columns-{dtype}-{mode}", f"{dtype} {mode}, GB/s by columns",
                 [panel(those, title, "columns", "GB/s") for title, those in by_title(by_columns).items()])
    for dtype in dtypes:
        these = [row for row in rows if row.dtype == dtype]
        vocabulary = [row for row in these if row.group == "vocabulary"]
        tokens = max((row.shape[0] for row in vocabulary), default=0)
        grid(f"vocabulary-{dtype}", f"Cross-entropy of {tokens} tokens, {dtype}",
             [panel([row for row in vocabulary if row.mode == mode], mode, "vocabulary", unit)
              for unit in ("ms", "GB/s") for mode in ("forward", "both") if any(row.mode == mode for row in vocabulary)])
        models = [row for row in these if row.group in ("main", "gpt2") and row.mode == "both" and row.op != "cross_entropy"]
        grid(f"gpt2-{dtype}", f"Ops of GPT-2, {dtype}, forward and backward",
             [panel(those, title, "elements of the tensor", "ms", size=elements) for title, those in by_title(models).items()
              if len(those) > 1])
    return written


def by_title(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {title: [row for row in rows if row.title == title] for title in dict.fromkeys(row.title for row in rows)}


def elements(row: Row) -> float:
    product = 1
    for size in row.shape:
        product *= size
    return product


def panel(rows: Sequence[Row], title: str, x_label: str, unit: str,
          size: Callable[[Row], float] = lambda row: row.shape[-1]) -> Panel:
    """Ours, the peers and the roof over the size; the band is the interval of the median."""
    def value(row: Row, ms: float) -> float:
        return row.bytes / ms / 1e6 if unit == "GB/s" else ms

    def series(name: str, label: str, dashed: bool = False) -> Series:
        here = [row for row in rows if name in row.timings]
        ends: list[tuple[float, float]] = [_ends(row, row.timings[name], value) for row in here]
        return Series(label, [(size(row), value(row, row.timings[name].median)) for row in here],
                      None if dashed else [low for low, _ in ends], None if dashed else [high for _, high in ends], dashed)

    peers = dict.fromkeys(name for row in rows for name in row.peers if not name.startswith("compile, "))
    lines = [series("ours", "ours"), *(series(name, name) for name in peers), series("copy", ROOF, dashed=True)]
    return Panel(lines, title, x_label, unit, log_x=True, log_y=unit == "ms")


def _ends(row: Row, timing: Timing, value: Callable[[Row, float], float]) -> tuple[float, float]:
    ends = value(row, timing.low), value(row, timing.high)
    return min(ends), max(ends)


def _where(found: Results) -> str:
    e = found.environment
    threads = f", {counted(e['threads'], 'thread')}" if "threads" in e else ""
    return f"{e['device']}{threads}, torch {e['torch']}"
