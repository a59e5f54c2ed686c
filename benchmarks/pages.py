"""The parts of README.md and docs/benchmarks.md that hold the op benchmark's results, between marks of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import files, tables
from .rows import BUSY, TORCH, Results, Row
from .tables import Lines

BEGIN = {"cpu": "<!-- results: written by python -m benchmarks.ops --readme -->",
         "cuda": "<!-- GPU results: written by python -m benchmarks.ops --readme -->"}
END = {"cpu": "<!-- results end -->", "cuda": "<!-- GPU results end -->"}
README_HEADER = ["op", "shape", "", "ours", "GB/s", "of copy", *TORCH, "x faster", "MiB/eager"]


def markdown_table(header: Sequence[str], lines: Lines, left: int = 2) -> list[str]:
    rules = ["---" if place < left else "---:" for place in range(len(header))]
    return ["| " + " | ".join(line) + " |" for line in (list(header), rules, *lines)]


def short(found: Results, charts: Sequence[str]) -> str:
    """For the README: the main shapes in few rows, the charts that show most, and where it was measured."""
    dtypes = ("fp32", "bf16") if found.kind == "cpu" else ("bf16",)
    rows = tables.together([row for row in found.rows if row.group == "main" and row.allocator != "default" and row.timings
                     and row.dtype in dtypes and (row.mode != "backward" or found.kind == "cuda")])
    lines = [[row.title, row.dimensions, f"{row.dtype} {row.mode}", tables.number(row.timings["ours"].median),
              tables.number(row.gigabytes_per_second("ours")), tables.of_copy(row), *(tables.time_of(row, name) for name in TORCH),
              tables.faster(row, row.peers), tables.mebibytes(row)] for row in rows]
    parts = ["Milliseconds, behind a flushed cache.", "", *markdown_table(README_HEADER, lines, left=3), ""]
    header, lines = tables.libraries_table(rows)
    if lines:
        parts += ["Libraries, milliseconds and in brackets how many times ours.", "", *markdown_table(header, lines, left=3), ""]
    parts += [part for chart in charts[:2] for part in (f"![{Path(chart).stem}]({chart})", "")]
    return "\n".join([*parts, *_footer(found, rows)])


def long(found: Results, charts: Sequence[str]) -> str:
    """For docs/benchmarks.md: the main shapes whole, GPT-2's in both directions, and all charts."""
    parts: list[str] = []
    titles = {"reusing": "One shape for each op, milliseconds, freed memory reused.",
              "default": "The same with the allocator as it ships, page faults included.",
              "": "One shape for each op, milliseconds."}
    shown: list[Row] = []
    for allocator, title in titles.items():
        if rows := tables.together([row for row in found.rows if row.group == "main" and row.allocator == allocator]):
            parts += [title, "", *markdown_table(tables.SHAPES_HEADER, tables.shapes_lines(rows)), ""]
            shown += rows
    if rows := tables.together([row for row in found.rows if row.group == "gpt2" and row.mode == "both"]):
        parts += ["GPT-2 from 124M to 8.3B parameters, forward and backward, milliseconds.", "",
                  *markdown_table(tables.SHAPES_HEADER, tables.shapes_lines(rows)), ""]
        shown += rows
    header, lines = tables.libraries_table([row for row in shown if row.timings])
    if lines:
        parts += ["Libraries, milliseconds and in brackets how many times ours.", "", *markdown_table(header, lines, left=3), ""]
    if found.kind == "cuda" and (rows := [row for row in found.rows if row.group == "columns" and row.dtype == "bf16"]):
        parts += ["bf16 by columns, GB/s.", "", *markdown_table(*tables.sweep_table(rows, "GB/s", found.on_h100), left=3), ""]
    parts += [part for chart in charts for part in (f"![{Path(chart).stem}]({chart})", "")]
    return "\n".join([*parts, *_footer(found, shown)])


def _footer(found: Results, rows: Sequence[Row]) -> list[str]:
    said = [*tables.remarks(found, rows), *tables.inexact(rows), *(text for text in tables.noise(rows) if text.startswith("Too"))]
    compared = [f"{name} {known['version']}" for name, known in found.peers.items() if not known["why_not"] and name not in TORCH]
    peers = f" Compared with {', '.join(compared)}." if compared else ""
    return [*([". ".join(said) + ".", ""] if said else []), f"Measured on {found.described()}.{peers}"]


def write_pages(root: Path, found: Results, charts: Sequence[Path]) -> None:
    """Replace what stands between the marks of this kind of device in README.md and docs/benchmarks.md under `root`.

    ValueError, before anything is written, when a page lacks the marks, when an op is wrong, when results were not measured at the
    main shapes, and when other processes were busy.
    """
    if wrong := [row.name for row in found.rows if row.failure]:
        raise ValueError(f"these results are not for README.md: {len(wrong)} rows are wrong, among them {wrong[0]}")
    if found.others > BUSY:
        raise ValueError(f"these results are not for README.md: other processes took {found.others:.0%} of the processors while "
                         f"they were measured, at most {BUSY:.0%} are accepted")
    if not any(row.group == "main" and row.timings for row in found.rows):
        raise ValueError("these results are not for README.md: they lack the main shapes (--shapes main)")
    texts = {}
    for page, section in ((root / "README.md", short), (root / "docs" / "benchmarks.md", long)):
        links = [os.path.relpath(chart, page.parent) for chart in charts]
        texts[page] = between(page, BEGIN[found.kind], END[found.kind], section(found, links))
    for page, text in texts.items():
        files.write(page, text)


def between(page: Path, begin: str, end: str, section: str) -> str:
    """The text of a page with the section between two marks. ValueError where they are not in it."""
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page}: expected the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"
