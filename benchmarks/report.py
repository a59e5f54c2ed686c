"""What the benchmarks show on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import tables
from .rows import Results, Row
from .tables import Lines

TITLES = {"reusing": "CPU, freed memory is reused (the kernels' own speed)",
          "default": "CPU, default allocator (page faults included)", "": "GPU"}
SWEEPS = {"columns": ("by columns, GB/s", "GB/s"), "vocabulary": ("by vocabulary, milliseconds", "ms")}


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


def table(header: Sequence[str], lines: Lines, left: int = 2, sections: bool = True, fold: bool = False) -> Table:
    """As narrow as can be; the first `left` columns to the left. A line with a first cell begins a section."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, show_header=any(header))
    for place, column in enumerate(header):
        made.add_column(column, justify="left" if place < left else "right")
    for place, line in enumerate(lines):
        if sections and place and line[0] and not lines[place - 1][0]:
            made.add_row()
        *most, last = [Text(cell, no_wrap=True) for cell in line]
        made.add_row(*most, line[-1] if fold else last)
    return made


def sweep(rows: Sequence[Row], unit: str, with_published: bool) -> Table:
    """Op and mode on a line of their own, so that many columns fit."""
    header, lines = tables.sweep_table(rows, unit, with_published)
    folded: Lines = []
    for op, mode, what, *figures in lines:
        if op:
            folded.append([f"{op}, {mode}", *[""] * len(figures)])
        folded.append([f"  {what}", *figures])
    return table(["", *header[3:]], folded, left=1, sections=False)


def show(found: Results) -> None:
    """Print the tables, then remarks, every failed check in full, the peers and the environment."""
    out = console()

    def titled(title: str, made: Table) -> None:
        out.print(title, style="bold", highlight=False)
        out.print(made, "")

    for allocator in dict.fromkeys(row.allocator for row in found.rows):
        rows, title = [row for row in found.rows if row.allocator == allocator], TITLES[allocator]
        for group, what in (("main", "milliseconds"), ("gpt2", "GPT-2 from 124M to 8.3B parameters, milliseconds")):
            if those := tables.together([row for row in rows if row.group == group]):
                titled(f"{title}: {what}", table(tables.SHAPES_HEADER, tables.shapes_lines(those)))
        for op in dict.fromkeys(row.title for row in rows):
            those = [row for row in rows if row.group in ("main", "gpt2") and row.title == op and row.timings]
            header, lines = tables.libraries_table(those, times=False)
            if lines:
                header = [name.replace("-", "-\n") for name in header[1:]]  # narrow
                titled(f"{title}: {op}, libraries, times ours", table(header, [line[1:] for line in lines], sections=False))
        for group, (what, unit) in SWEEPS.items():
            for dtype in dict.fromkeys(row.dtype for row in rows if row.group == group):
                those = [row for row in rows if (row.group, row.dtype) == (group, dtype)]
                titled(f"{title}, {dtype} {what}", sweep(those, unit, found.on_h100 and group == "columns"))
    for texts, style in ((tables.remarks(found, found.rows), None), (tables.inexact(found.rows), None),
                         (tables.wrong(found.rows), "bold red"), (tables.noise(found.rows), "yellow"),
                         ([tables.busy(found)] if tables.busy(found) else [], "bold yellow")):
        for text in texts:
            out.print(text, style=style, highlight=False, markup=False)
    if found.peers:
        out.print("", table(["", "", ""], tables.peers_lines(found), left=3, sections=False, fold=True), "")
    out.print(found.described(), style="dim", highlight=False, markup=False)
