"""Results of the op benchmark: a table for people, CSV and JSON for programs, and the generated part of README.md."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .harness import Timing

# Times the floor that a row should stay under, by dtype and mode. bf16 rows may take more: half the bytes, the same arithmetic.
FLOOR_LIMITS = {("fp32", "forward"): 1.5, ("fp32", "both"): 1.8, ("bf16", "forward"): 2.2, ("bf16", "both"): 2.5}
# How many times faster than the better peer a row should be; 1 elsewhere.
LEADS = {("scaled_masked_softmax", dtype, mode): 3.0 for dtype in ("fp32", "bf16") for mode in ("forward", "both")} | {
    ("bias_gelu", "fp32", "forward"): 2.0, ("bias_gelu", "fp32", "both"): 2.0,
    ("bias_gelu", "bf16", "forward"): 3.0, ("bias_gelu", "bf16", "both"): 3.0,
    ("cross_entropy", "fp32", "both"): 1.3, ("cross_entropy", "bf16", "both"): 2.0}
PEERS = ("eager", "compile")
BUSY = 0.05  # above this share for others, a row is not worth keeping
BEGIN, END = "<!-- results: written by python -m benchmarks.ops --readme -->", "<!-- results end -->"


@dataclass(frozen=True)
class Row:
    """One op at one dtype, forward or both: `timings` of floor, in cache, ours and the peers, or a `failure` instead."""

    op: str
    title: str
    shape: list[int]
    dtype: str
    mode: str
    bytes: float
    allocator: str
    timings: dict[str, Timing] = field(default_factory=dict)
    failure: str = ""
    others: float | None = None  # share of the processors' time that went to other processes

    @property
    def times_floor(self) -> float:
        return self.timings["ours"].median / self.timings["floor"].median

    @property
    def floor_limit(self) -> float | None:
        """None where the row has no limit: other dtypes, and the default allocator, whose page faults drown the kernel."""
        return FLOOR_LIMITS.get((self.dtype, self.mode)) if self.allocator == "reusing" else None

    @property
    def lead(self) -> float | None:
        limited = self.allocator == "reusing" and (self.dtype, self.mode) in FLOOR_LIMITS
        return LEADS.get((self.op, self.dtype, self.mode), 1.0) if limited else None

    @property
    def peers(self) -> list[str]:
        return [name for name in PEERS if name in self.timings]

    @property
    def variants(self) -> list[str]:
        """Further ways to write the op for a peer: reported, but not what the lead is taken over."""
        return [name for name in self.timings if name not in ("floor", "in cache", "ours", *PEERS)]

    def speedup(self, peer: str) -> float:
        return self.timings[peer].median / self.timings["ours"].median

    @property
    def lead_over_best(self) -> float | None:
        return min((self.speedup(peer) for peer in self.peers), default=None)

    def gigabytes_per_second(self, name: str) -> float:
        return self.bytes / self.timings[name].median / 1e6

    def as_json(self) -> dict[str, object]:
        derived: dict[str, object] = {} if self.failure else {
            "times_floor": self.times_floor, "floor_limit": self.floor_limit, "lead_over_best_peer": self.lead_over_best,
            "lead_expected": self.lead, "speedup": {name: self.speedup(name) for name in (*self.peers, *self.variants)},
            "gigabytes_per_second": {name: self.gigabytes_per_second(name) for name in self.timings}}
        return asdict(self) | derived

    @classmethod
    def from_json(cls, data: dict) -> Row:
        stored = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(**stored | {"timings": {name: Timing(**timing) for name, timing in data["timings"].items()}})


@dataclass(frozen=True)
class Results:
    environment: dict[str, object]
    rows: list[Row]

    def followed_by(self, other: Results) -> Results:
        return Results(self.environment, self.rows + other.rows)

    def as_json(self) -> dict[str, object]:
        return {"environment": self.environment, "rows": [row.as_json() for row in self.rows]}

    @classmethod
    def from_json(cls, data: dict) -> Results:
        return cls(data["environment"], [Row.from_json(row) for row in data["rows"]])

    @property
    def others(self) -> float:
        """The largest share of the processors' time that went to other processes while a row was measured."""
        return max((row.others or 0.0 for row in self.rows), default=0.0)

    def described(self) -> str:
        e = self.environment
        return (f"{e['device']}, {e['threads']} threads, {e['instruction_set']}; torch {e['torch']}, megatron_kernels "
                f"{e['megatron_kernels']} at {e['commit']}, Python {e['python']}; {e['date']}")


def console(stderr: bool = False) -> Console:
    """A console that keeps the table whole where the output is no terminal."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that announces the next row: a moving bar on a terminal, a line elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: print(f"  {text}", file=sys.stderr, flush=True)
        return
    columns = TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda text: progress.update(task, description=text, advance=1)


def against(value: float | None, limit: float | None, at_most: bool) -> str:
    """The value, and where there is a limit, the limit and whether the value keeps it."""
    if value is None:
        return "-"
    if limit is None:
        return f"{value:.2f}"
    kept = value <= limit if at_most else value >= limit
    return f"{value:.2f} {'≤' if at_most else '≥'}{limit:g} {'✓' if kept else '✗'}"


def cells(row: Row, peers: list[str]) -> list[str]:
    """What a table shows of a row: milliseconds, GB/s, times the floor, times faster than each peer and than the better one."""
    if row.failure:
        return [f"{row.dtype} {row.mode}", "wrong", *[""] * (6 + 2 * len(peers))]
    ours = row.timings["ours"]
    return [f"{row.dtype} {row.mode}", f"{ours.median:.2f}", f"{ours.p20:.2f}-{ours.p80:.2f}",
            *(f"{row.timings[name].median:.2f}" for name in ("floor", "in cache", *peers)),
            f"{row.gigabytes_per_second('ours'):.1f}", against(row.times_floor, row.floor_limit, at_most=True),
            *(f"{row.speedup(peer):.2f}" for peer in peers), against(row.lead_over_best, row.lead, at_most=False)]


def header(peers: list[str]) -> list[str]:
    return ["", "ours", "p20-p80", "floor", "in cache", *peers, "GB/s", "x floor",
            *(f"x {peer}" for peer in peers), "x better"]


def dimensions(row: Row) -> str:
    return "x".join(map(str, row.shape))


TITLES = {"reusing": "freed memory is reused (the kernels' own speed)", "default": "default allocator (page faults included)"}


def show(results: Results) -> None:
    """Print a table for each allocator, the environment below, and every failed check in full."""
    out = console()
    for allocator, title in TITLES.items():
        rows = [row for row in results.rows if row.allocator == allocator]
        if not rows:
            continue
        peers = next((row.peers for row in rows if row.timings), [])
        table = Table(title=f"CPU, milliseconds: {title}", title_justify="left", box=box.SIMPLE)
        table.add_column("op", no_wrap=True)
        for column in header(peers):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for _, group in itertools.groupby(rows, key=lambda row: row.op):
            for position, row in enumerate(group):
                table.add_row([row.title, dimensions(row)][position] if position < 2 else "", *cells(row, peers))
            table.add_section()
        out.print(table)
        for row in rows:
            for name in row.variants:
                out.print(f"{row.title} {row.dtype} {row.mode}, {name}: {row.timings[name].median:.2f} ms, "
                          f"{row.speedup(name):.2f} x ours", highlight=False)
            if row.failure:
                out.print(f"{row.title} {row.dtype} {row.mode} is wrong, so it was not timed: {row.failure}", style="bold red")
    out.print(results.described(), style="dim", highlight=False)
    if results.others > BUSY:
        out.print(f"Other processes took up to {results.others:.0%} of the processors while a row was measured: parallel code "
                  f"waits for them, so these figures say little.", style="bold yellow", highlight=False)


def write_csv(path: Path, results: Results) -> None:
    """One line per row and contestant; the environment is repeated on every line, so that files can be appended."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["op", "shape", "dtype", "mode", "allocator", "contestant", "median_ms", "p20_ms", "p80_ms", "samples",
                         "gb_per_s", "x_floor", "others", *results.environment])
        for row in results.rows:
            for name, timing in row.timings.items():
                writer.writerow([row.op, dimensions(row), row.dtype, row.mode, row.allocator, name,
                                 *(f"{value:.5g}" for value in (timing.median, timing.p20, timing.p80)), timing.samples,
                                 f"{row.gigabytes_per_second(name):.5g}",
                                 f"{timing.median / row.timings['floor'].median:.4g}",
                                 "" if row.others is None else f"{row.others:.3f}", *results.environment.values()])


def markdown(results: Results) -> str:
    """The rows measured with reused memory as a Markdown table, and where they were measured."""
    rows = [row for row in results.rows if row.allocator == "reusing" and not row.failure]
    peers = rows[0].peers if rows else []
    lines = [["op", "shape", *header(peers)]]
    lines += [["---"] * 3 + ["---:"] * (len(lines[0]) - 3)]
    lines += [[row.title, dimensions(row), *cells(row, peers)] for row in rows]
    notes = [f"{row.title} {row.dtype} {row.mode}, {name}: {row.timings[name].median:.2f} ({row.speedup(name):.2f} x ours)"
             for row in rows for name in row.variants]
    return "\n".join(["Milliseconds.", "", *("| " + " | ".join(line) + " |" for line in lines), "",
                      *([". ".join(notes) + ".", ""] if notes else []), f"Measured on {results.described()}."])


def write_readme(path: Path, results: Results) -> None:
    """Replace what stands between the two result marks of a Markdown file.

    ValueError when it lacks them, and when the results were measured on a busy machine.
    """
    if results.others > BUSY:
        raise ValueError(f"these results are not for {path.name}: other processes took {results.others:.0%} of the processors "
                         f"while they were measured, at most {BUSY:.0%} are accepted")
    replace_between(path, BEGIN, END, markdown(results))


def replace_between(path: Path, begin: str, end: str, section: str) -> None:
    """ValueError where the two marks are not in the file."""
    before, found, rest = path.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{path}: expected the lines {begin!r} and {end!r}")
    path.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}")
