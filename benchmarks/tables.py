"""The figures of the op benchmark as lines of text cells, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence

from .harness import FAR, Timing
from .rows import BUSY, LONG, TORCH, WIDE, Results, Row

# Milliseconds that a row may take on an H100.
MOST = {("cross_entropy", "8192x131072", "bf16", "both"): 2.6}
# GB/s that quack 0.6.4 published for an H100 and 256 to 262144 columns, read off its media/bf16_kernel_benchmarks_single_row.svg.
PUBLISHED = {
    ("scaled_masked_softmax", "bf16", "forward"): (1900, 2344, 2630, 2813, 2889, 2938, 2974, 2985, 3004, 3009, 3012),
    ("cross_entropy", "bf16", "forward"): (1113, 1600, 1902, 2320, 2692, 2942, 3061, 3021, 3182, 3163, 3034)}
PUBLISHED_COLUMNS = tuple(2**n for n in range(8, 19))
Lines = list[list[str]]


def number(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}" if value >= 1 else f"{value:.{3 if value >= 0.1 else 4}f}"


def against(value: str, expected: float | None, kept: bool) -> str:
    """The value, and where something is expected of it, whether it keeps that."""
    return value if expected is None else f"{value} {'✓' if kept else '✗'}"


def of_copy(row: Row) -> str:
    return against(f"{row.share:.0%}", row.expected_share, row.expected_share is None or row.share >= row.expected_share)


def faster(row: Row, peers: Sequence[str]) -> str:
    """How many times, than the best of those peers; the expected lead is over PyTorch alone."""
    lead = row.lead_over(peers)
    if lead is None:
        return "-"
    over_torch = row.lead_over(TORCH)
    return against(f"{lead:.2f}", row.expected_lead, over_torch is None or over_torch >= (row.expected_lead or 0.0))


def mebibytes(row: Row) -> str:
    def of(name: str) -> str:
        return f"{row.peak[name] / 2**20:.0f}" if name in row.peak else "-"

    return f"{of('ours')}/{of('eager')}"


def together(rows: Sequence[Row]) -> list[Row]:
    """The dtypes of one op at one shape side by side, as runs go through one dtype after the other."""
    keys = list(dict.fromkeys((row.title, row.dimensions) for row in rows))
    return sorted(rows, key=lambda row: keys.index((row.title, row.dimensions)))


SHAPES_HEADER = ["op", "", "ours", "p20-p80", "GB/s", "of copy", "MiB/eager", *TORCH, "x faster"]


def shapes_lines(rows: Sequence[Row]) -> Lines:
    """One line per row, in milliseconds, title and shape beside the first two of a shape: what SHAPES_HEADER says."""
    lines, before, place = [], None, 0
    for row in rows:
        place = place + 1 if (row.title, row.shape) == before else 0
        before = row.title, row.shape
        lines.append([[row.title, row.dimensions, ""][min(place, 2)], f"{row.dtype} {row.mode}", *_cells(row)])
        following = rows[len(lines)] if len(lines) < len(rows) else None
        if place == 0 and (following is None or (following.title, following.shape) != before):
            lines[-1][0] = f"{row.title} {row.dimensions}"
    return lines


def _cells(row: Row) -> list[str]:
    if not row.timings:
        return ["wrong" if row.failure else "-", *[""] * (len(SHAPES_HEADER) - 3)]
    ours = row.timings["ours"]
    noise = "~" if "ours" in row.noisy else ""
    return [f"{noise}{number(ours.median)}", f"{number(ours.p20)}-{number(ours.p80)}", number(row.gigabytes_per_second("ours")),
            of_copy(row), mebibytes(row), *(time_of(row, name) for name in TORCH), faster(row, row.peers)]


def time_of(row: Row, name: str) -> str:
    """Milliseconds, with a star where a peer is inexact."""
    return f"{number(row.timings[name].median)}{'*' if name in row.inexact else ''}" if name in row.timings else "-"


def libraries_table(rows: Sequence[Row], times: bool = True) -> tuple[list[str], Lines]:
    """How many times ours each library takes, with `times` behind its milliseconds; a line for each row that has one."""
    names = list(dict.fromkeys(name for row in rows for name in row.libraries))

    def cell(row: Row, name: str) -> str:
        if name not in row.timings:
            return "-"
        ratio = f"{row.speedup(name):.2f}"
        return f"{time_of(row, name)} ({ratio})" if times else f"{ratio}{'*' if name in row.inexact else ''}"

    lines = [[row.title, row.dimensions, f"{row.dtype} {row.mode}", number(row.timings["ours"].median),
              *(cell(row, name) for name in names)] for row in rows if row.libraries]
    return ["op", "shape", "", "ours", *names], lines


def sweep_table(rows: Sequence[Row], unit: str, with_published: bool = False) -> tuple[list[str], Lines]:
    """Ours, its share of the copy's rate and the peers, side by side over the last dimension: milliseconds, or GB/s."""
    over = sorted({row.shape[-1] for row in rows})
    by_place = {(row.title, row.mode, row.shape[-1]): row for row in rows}
    lines: Lines = []
    for op, title, mode, dtype in dict.fromkeys((row.op, row.title, row.mode, row.dtype) for row in rows):
        here = [by_place.get((title, mode, n)) for n in over]

        def figures(name: str, here: list[Row | None] = here) -> list[str]:
            def figure(row: Row) -> str:
                value = number(row.gigabytes_per_second(name) if unit == "GB/s" else row.timings[name].median)
                return f"~{value}" if name in row.noisy else value
            return [figure(row) + ("*" if name in row.inexact else "") if row and name in row.timings else
                    "wrong" if row and row.failure else "-" for row in here]

        lines.append([title, mode, "ours", *figures("ours")])
        lines.append(["", "", "of copy", *(of_copy(row) if row and row.timings else "-" for row in here)])
        peers = dict.fromkeys(name for row in here if row for name in row.peers)
        lines += [["", "", peer, *figures(peer)] for peer in peers]
        if with_published and (published := PUBLISHED.get((op, dtype, mode))):
            known = dict(zip(PUBLISHED_COLUMNS, map(str, published), strict=True))
            lines.append(["", "", "quack, published", *(known.get(n, "-") for n in over)])
    return ["op", "", unit, *map(str, over)], lines


def by_shape(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that differ in mode alone, by what they have in common."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        allocator = ", default allocator," if row.allocator == "default" else ""
        found.setdefault(f"{row.title} {row.dimensions} {row.dtype}{allocator}", []).append(row)
    return found


def names(rows: Sequence[Row]) -> list[str]:
    """Op, shape, dtype and modes of these rows, those that differ in mode alone together."""
    return [f"{name} {'/'.join(dict.fromkeys(row.mode for row in those))}" for name, those in by_shape(rows).items()]


def remarks(found: Results, rows: Sequence[Row]) -> list[str]:
    """Sentences about what the tables don't show of these rows."""
    said: list[str] = []
    together: dict[str, list[Row]] = {}
    for row in rows:
        most = MOST.get((row.op, row.dimensions, row.dtype, row.mode))
        if most and row.timings and found.on_h100:
            ms = row.timings["ours"].median
            said.append(f"{row.name}: {ms:.2f} ms, at most {most:g} expected {'✓' if ms <= most else '✗'}")
        said += [f"{row.name}, {name}: {number(row.timings[name].median)} ms, {row.speedup(name):.2f} x ours"
                 for name in row.peers if name.startswith("compile, ")]
        for name, why in row.missing.items():
            together.setdefault(f"{name} is missing ({why})", []).append(row)
        for name in row.late:
            together.setdefault(f"The GPU may have waited for the host ({name})", []).append(row)
        if row.skipped:
            together.setdefault(f"Skipped, {row.skipped}", []).append(row)
    return [*said, *(f"{what}: {', '.join(names(those))}" for what, those in together.items())]


def wrong(rows: Sequence[Row]) -> list[str]:
    """A sentence for each way in which an op is wrong."""
    together: dict[str, list[Row]] = {}
    for row in rows:
        if row.failure:
            together.setdefault(row.failure, []).append(row)
    return [f"{', '.join(names(those))} is wrong, so it was not timed: {why}" for why, those in together.items()]


def inexact(rows: Sequence[Row]) -> list[str]:
    """A sentence for each peer, with the first of the ways in which it is off."""
    together: dict[str, list[Row]] = {}
    for row in rows:
        for name in row.inexact:
            together.setdefault(name, []).append(row)
    return [f"* {name} is further from float64 than a peer should be: {', '.join(names(those))} "
            f"({'' if len({row.inexact[name] for row in those}) == 1 else 'first: '}{those[0].inexact[name]})"
            for name, those in together.items()]


def noise(rows: Sequence[Row], most: int = 12) -> list[str]:
    """Which rows are too noisy, the widest alone where they are many, and how many samples are outliers."""
    said = []
    if noisy := [row for row in rows if row.noisy]:
        described = []
        for name, those in by_shape(noisy).items():
            who, timing = max((item for row in those for item in row.noisy.items()), key=lambda item: item[1].width)
            modes = "/".join(dict.fromkeys(row.mode for row in those))
            described.append((timing.width, f"{name} {modes} ({who} {timing.width:.0%})"))
        kept = described if len(described) <= most else sorted(described, reverse=True)[:most]
        rest = f"; and {len(described) - most} shapes more" if len(described) > most else ""
        said.append(f"Too noisy, ~ (an interval of the median wider than {WIDE:.0%}, from {LONG:g} ms on), {len(noisy)} of "
                    f"{len(rows)} rows: {', '.join(text for _, text in kept)}{rest}")
    timings = [(timing.outliers, timing.samples, row.name, name) for row in rows for name, timing in row.timings.items()]
    if total := sum(many for many, *_ in timings):
        many, of, row, name = max(timings, key=lambda timing: timing[0])
        said.append(f"Outliers, beyond p80 by {FAR:g} x (p80 - p20): {total} of {sum(of for _, of, *_ in timings)} samples, "
                    f"at most {many} of {of} ({row}, {name})")
    return said


def busy(found: Results) -> str:
    """Nothing, unless other processes had a part of the processors."""
    return f"Other processes took up to {found.others:.0%} of the processors while a row was measured: parallel code waits for " \
           "them, so these figures say little." if found.others > BUSY else ""


def peers_lines(found: Results) -> Lines:
    """Name, version, and what became of each peer."""
    return [[name, known["version"], known["why_not"] or "compared" + (f"; {known['note']}" if known.get("note") else "")]
            for name, known in found.peers.items()]


def interval(timing: Timing) -> str:
    return f"{number(timing.low)}-{number(timing.high)}"
