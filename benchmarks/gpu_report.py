"""Results of the op benchmark on a GPU: tables for people, CSV and JSON for programs, and a generated part of README.md."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

from . import report
from .harness import Timing
from .report import PEERS

# Milliseconds that a row may take on an H100.
MOST = {("cross_entropy", "8192x131072", "bf16", "both"): 2.6}
# GB/s that quack 0.6.4 published for an H100 and 256 to 262144 columns, read off its media/bf16_kernel_benchmarks_single_row.svg.
PUBLISHED = {
    ("scaled_masked_softmax", "bf16", "forward"): (1900, 2344, 2630, 2813, 2889, 2938, 2974, 2985, 3004, 3009, 3012),
    ("cross_entropy", "bf16", "forward"): (1113, 1600, 1902, 2320, 2692, 2942, 3061, 3021, 3182, 3163, 3034)}
BEGIN, END = "<!-- GPU results: written by python -m benchmarks.ops --readme -->", "<!-- GPU results end -->"


@dataclass(frozen=True)
class Row:
    """One op at one shape and dtype, in one mode: `timings` of copy, ours and the peers, or why there are none."""

    op: str
    title: str
    group: str  # "gpt2" or "columns"
    shape: list[int]
    dtype: str
    mode: str
    bytes: float
    limit: float | None  # the share of the copy's rate that is expected
    timings: dict[str, Timing] = field(default_factory=dict)
    failure: str = ""  # how the op is wrong
    skipped: str = ""  # what the row was lacking
    missing: dict[str, str] = field(default_factory=dict)  # peers that could not run, and why
    late: list[str] = field(default_factory=list)  # contestants whose time may be that of the host

    @property
    def dimensions(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        return f"{self.title} {self.dimensions} {self.dtype} {self.mode}"

    @property
    def share(self) -> float:
        """Of the rate at which a copy moves as many bytes."""
        return self.timings["copy"].median / self.timings["ours"].median

    @property
    def peers(self) -> list[str]:
        """Those of the tables, and other ways to write the op for them."""
        return [name for name in self.timings if name not in ("copy", "ours")]

    def speedup(self, peer: str) -> float:
        return self.timings[peer].median / self.timings["ours"].median

    def gigabytes_per_second(self, name: str) -> float:
        return self.bytes / self.timings[name].median / 1e6

    def as_json(self) -> dict[str, object]:
        derived: dict[str, object] = {} if not self.timings else {
            "share_of_copy": self.share, "speedup": {name: self.speedup(name) for name in self.peers},
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

    def as_json(self) -> dict[str, object]:
        return {"environment": self.environment, "rows": [row.as_json() for row in self.rows]}

    @classmethod
    def from_json(cls, data: dict) -> Results:
        return cls(data["environment"], [Row.from_json(row) for row in data["rows"]])

    @property
    def on_h100(self) -> bool:
        return "H100" in str(self.environment["device"])

    def described(self) -> str:
        e = self.environment
        return (f"{e['device']} ({e['multiprocessors']} multiprocessors, {e['memory_gib']} GiB, L2 {e['l2_mib']} MiB; "
                f"{e['clocks']}), driver {e['driver']}, CUDA {e['cuda']}; torch {e['torch']}, Triton {e['triton']}, "
                f"megatron_kernels {e['megatron_kernels']} at {e['commit']}, Python {e['python']}; {e['date']}")


def verdict(row: Row) -> str:
    """The share of the copy's rate, and whether it is the expected one, where one is expected."""
    mark = "" if row.limit is None else " ✓" if row.share >= row.limit else " ✗"
    return f"{row.share:.0%}{mark}"


def why_empty(row: Row) -> str:
    return "wrong" if row.failure else "-"


SHAPES_HEADER = ["op", "shape", "", "ours", "p20-p80", "copy", *PEERS, "GB/s", "of copy", *(f"x {peer}" for peer in PEERS)]


def shapes_lines(rows: list[Row]) -> list[list[str]]:
    """One line per row, in milliseconds: what SHAPES_HEADER says."""
    def cells(row: Row) -> list[str]:
        if not row.timings:
            return [why_empty(row), *[""] * (len(SHAPES_HEADER) - 4)]
        ours, peers = row.timings["ours"], [row.timings.get(name) for name in PEERS]
        return [f"{ours.median:.3f}", f"{ours.p20:.3f}-{ours.p80:.3f}", f"{row.timings['copy'].median:.3f}",
                *(f"{peer.median:.3f}" if peer else "-" for peer in peers),
                f"{row.gigabytes_per_second('ours'):.0f}", verdict(row),
                *(f"{peer.median / ours.median:.2f}" if peer else "-" for peer in peers)]

    return [[row.title, row.dimensions, f"{row.dtype} {row.mode}", *cells(row)] for row in rows]


def columns_table(rows: list[Row], with_published: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines of GB/s with a column for each number of columns: ours, its share of the copy's rate, the peers."""
    columns = sorted({row.shape[-1] for row in rows})
    kinds = dict.fromkeys((row.op, row.title, row.dtype, row.mode) for row in rows)
    lines = []
    for op, title, dtype, mode in kinds:
        by_columns = {row.shape[-1]: row for row in rows if (row.op, row.dtype, row.mode) == (op, dtype, mode)}
        here = [by_columns.get(n) for n in columns]

        def rates(name: str, here=here) -> list[str]:
            return [f"{row.gigabytes_per_second(name):.0f}" if row and name in row.timings else
                    "wrong" if row and row.failure and name == "ours" else "-" for row in here]

        lines.append([title, f"{dtype} {mode}", "ours", *rates("ours")])
        lines.append(["", "", "of copy", *(verdict(row) if row and row.timings else "-" for row in here)])
        lines += [["", "", peer, *rates(peer)] for peer in PEERS if any(row and peer in row.timings for row in here)]
        if with_published and (published := PUBLISHED.get((op, dtype, mode))):
            known = {2**(8 + i): f"{value}" for i, value in enumerate(published)}
            lines.append(["", "", "quack, published", *(known.get(n, "-") for n in columns)])
    return ["op", "", "GB/s", *map(str, columns)], lines


def notes(results: Results, rows: list[Row]) -> tuple[list[str], list[str]]:
    """Sentences about what the tables don't show of these rows, and about the ops that are wrong."""
    remarks: list[str] = []
    together: dict[str, list[Row]] = {}
    for row in rows:
        most = MOST.get((row.op, row.dimensions, row.dtype, row.mode))
        if most and row.timings and results.on_h100 and row.group == "gpt2":
            ms = row.timings["ours"].median
            remarks.append(f"{row.name}: {ms:.2f} ms, at most {most:g} expected {'✓' if ms <= most else '✗'}")
        remarks += [f"{row.name}, {name}: {row.timings[name].median:.3f} ms, {row.speedup(name):.2f} x ours"
                    for name in row.peers if name not in PEERS]
        for name, why in row.missing.items():
            together.setdefault(f"{name} is missing ({why})", []).append(row)
        for name in row.late:
            together.setdefault(f"The GPU may have waited for the host ({name})", []).append(row)
        if row.skipped:
            together.setdefault(f"Skipped, {row.skipped}", []).append(row)
    remarks += [f"{what}: {', '.join(names(those))}" for what, those in together.items()]
    wrong: dict[str, list[Row]] = {}
    for row in rows:
        if row.failure:
            wrong.setdefault(row.failure, []).append(row)
    return remarks, [f"{', '.join(names(those))} is wrong, so it was not timed: {why}" for why, those in wrong.items()]


def names(rows: list[Row]) -> list[str]:
    """Op, shape, dtype and modes of these rows, those that differ in mode alone together."""
    modes: dict[str, list[str]] = {}
    for row in rows:
        modes.setdefault(f"{row.title} {row.dimensions} {row.dtype}", []).append(row.mode)
    return [f"{name} {'/'.join(dict.fromkeys(those))}" for name, those in modes.items()]


def show(results: Results) -> None:
    """Print a table of GPT-2's shapes and one per dtype by columns, then remarks, every failed check in full, the environment."""
    out = report.console()
    shapes = [row for row in results.rows if row.group == "gpt2"]
    over_columns = [row for row in results.rows if row.group == "columns"]
    tables = [("GPT-2's shapes, milliseconds", SHAPES_HEADER, shapes_lines(shapes))] if shapes else []
    for dtype in dict.fromkeys(row.dtype for row in over_columns):
        rows = [row for row in over_columns if row.dtype == dtype]
        tables.append((f"{dtype} by columns, GB/s", *columns_table(rows, results.on_h100)))
    for title, header, lines in tables:
        table = Table(title=f"GPU: {title}", title_justify="left", box=box.SIMPLE)
        for number, column in enumerate(header):
            table.add_column(column, justify="right" if number > 2 else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        out.print(table)
    remarks, wrong = notes(results, results.rows)
    for text in (*remarks, *wrong):
        out.print(text, style="bold red" if text in wrong else None, highlight=False, markup=False)
    out.print(results.described(), style="dim", highlight=False, markup=False)


def write_csv(path: Path, results: Results) -> None:
    """One line per row and contestant, and one for a row without times; the environment is repeated on every line."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["op", "title", "group", "shape", "dtype", "mode", "contestant", "median_ms", "p20_ms", "p80_ms", "samples",
                         "gb_per_s", "of_copy", "expected_of_copy", "remark", *results.environment])
        for row in results.rows:
            start = [row.op, row.title, row.group, row.dimensions, row.dtype, row.mode]
            limit = "" if row.limit is None else row.limit
            for name, timing in row.timings.items():
                writer.writerow([*start, name, *(f"{value:.5g}" for value in (timing.median, timing.p20, timing.p80)),
                                 timing.samples, f"{row.gigabytes_per_second(name):.5g}",
                                 f"{row.timings['copy'].median / timing.median:.4g}", limit if name == "ours" else "",
                                 "may be the host's time" if name in row.late else "", *results.environment.values()])
            for name, why in (row.missing if row.timings else {"ours": row.failure or row.skipped}).items():
                writer.writerow([*start, name, *[""] * 7, why, *results.environment.values()])


def _markdown_table(header: list[str], lines: list[list[str]]) -> list[str]:
    rules = ["---" if number < 3 else "---:" for number in range(len(header))]
    return ["| " + " | ".join(line) + " |" for line in (header, rules, *lines)]


def markdown(results: Results) -> str:
    """The rows of one dtype, bf16 if it was measured: by columns in GB/s, GPT-2's shapes in milliseconds, and where."""
    dtypes = list(dict.fromkeys(row.dtype for row in results.rows))
    rows = [row for row in results.rows if row.dtype == ("bf16" if "bf16" in dtypes else dtypes[0])]
    by_columns = [row for row in rows if row.group == "columns" and row.mode != "both"]
    shapes = [row for row in rows if row.group == "gpt2" and row.mode != "backward"]
    parts: list[str] = []
    if by_columns:
        parts += ["By number of columns, GB/s; \"of copy\" is the share of the rate at which a copy moves as many bytes.", "",
                  *_markdown_table(*columns_table(by_columns, results.on_h100)), ""]
    if shapes:
        parts += ["GPT-2's shapes, milliseconds.", "", *_markdown_table(SHAPES_HEADER, shapes_lines(shapes)), ""]
    remarks, _ = notes(results, [*by_columns, *shapes])
    return "\n".join([*parts, *([". ".join(remarks) + ".", ""] if remarks else []), f"Measured on {results.described()}."])


def write_readme(path: Path, results: Results) -> None:
    """Replace what stands between the two marks of GPU results. ValueError where they are missing, and where an op is wrong."""
    if wrong := [row.name for row in results.rows if row.failure]:
        raise ValueError(f"these results are not for {path.name}: {len(wrong)} rows are wrong, among them {wrong[0]}")
    report.replace_between(path, BEGIN, END, markdown(results))
