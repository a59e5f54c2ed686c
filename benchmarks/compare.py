"""What moved between two runs of the op benchmark, beyond their noise: `python -m benchmarks.ops --compare A.json B.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import report, tables
from .harness import Timing
from .rows import BUSY, Results, Row

SAME = ("kind", "device", "threads")  # results that differ in these say nothing about the code
TOLD = ("torch", "triton", "cuda", "driver", "clocks", "python", "instruction_set", "huge_pages", "megatron_kernels", "commit")
HEADER = ["op", "", "by", "A", "B", "B / A", "interval A", "interval B"]


@dataclass(frozen=True)
class Change:
    row: Row
    name: str
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median

    def moved(self, threshold: float) -> bool:
        """Beyond noise: the intervals of the two medians have nothing in common, and they differ by more than the threshold."""
        apart = self.after.low > self.before.high or self.before.low > self.after.high
        return apart and abs(self.ratio - 1) > threshold


def why_not(a: Results, b: Results) -> str:
    """Why two runs can't be compared, or nothing."""
    different = [f"{name} {a.environment.get(name)!r} and {b.environment.get(name)!r}" for name in SAME
                 if a.environment.get(name) != b.environment.get(name)]
    if different:
        return f"measured on different machines or settings: {', '.join(different)}"
    if not {row.key for row in a.rows} & {row.key for row in b.rows}:
        return "they have no row in common"
    return ""


def differences(a: Results, b: Results) -> list[str]:
    """Versions and settings that are not the same, which may be what moved a row."""
    both = [(f"{name}", a.environment.get(name), b.environment.get(name)) for name in TOLD]
    both += [(name, a.settings.get(name), b.settings.get(name)) for name in {**a.settings, **b.settings}]
    both += [(f"peer {name}", known["version"], b.peers.get(name, {}).get("version")) for name, known in a.peers.items()
             if name not in ("eager", "compile")]
    return [f"{name}: {before} in A, {after} in B" for name, before, after in both if before != after]


def changes(a: Results, b: Results) -> list[Change]:
    """Every contestant that has a time in both runs."""
    after = {row.key: row for row in b.rows}
    return [Change(row, name, timing, after[row.key].timings[name]) for row in a.rows if row.key in after
            for name, timing in row.timings.items() if name in after[row.key].timings]


def lines(those: Sequence[Change]) -> tables.Lines:
    allocators = {"default": ", default allocator"}
    return [[f"{c.row.title} {c.row.dimensions}", f"{c.row.dtype} {c.row.mode}{allocators.get(c.row.allocator, '')}", c.name,
             tables.number(c.before.median), tables.number(c.after.median), f"{c.ratio:.2f}", tables.interval(c.before),
             tables.interval(c.after)] for c in those]


def show(a: Results, b: Results, threshold: float) -> None:
    """Print what moved, ours first and the largest change on top, how much did not, and what only one of the runs has."""
    out = report.console()
    those = changes(a, b)
    moved = sorted((c for c in those if c.moved(threshold)), key=lambda c: (c.name != "ours", -abs(c.ratio - 1)))
    if moved:
        out.print(f"Moved by more than {threshold:.0%} and beyond noise, milliseconds", style="bold", highlight=False)
        out.print(report.table(HEADER, lines(moved), left=3, sections=False), "")
    noisy = [c for c in those if not c.moved(threshold) and abs(c.ratio - 1) > threshold]
    out.print(f"{len(moved)} of {len(those)} figures moved; {len(noisy)} differ by more than {threshold:.0%} within their noise; "
              f"{len(those) - len(moved) - len(noisy)} differ by less.", highlight=False)
    keys = {row.key for row in a.rows}, {row.key for row in b.rows}
    for name, found, there, elsewhere in (("A", a, keys[0], keys[1]), ("B", b, keys[1], keys[0])):
        if only := there - elsewhere:
            rows = [row for row in found.rows if row.key in only]
            out.print(f"Only in {name}: {', '.join(tables.names(rows))}", highlight=False, markup=False)
        if found.others > BUSY:
            out.print(f"{name}: {tables.busy(found)}", style="yellow", highlight=False, markup=False)
    for text in differences(a, b):
        out.print(text, style="dim", highlight=False, markup=False)
