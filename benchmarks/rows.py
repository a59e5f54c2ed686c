"""What a run of the op benchmark found, for programs: rows, where they were measured, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import files
from .harness import Timing

TORCH = ("eager", "compile")
BESIDE = ("copy", "in cache", "ours")  # contestants that are not peers
WIDE, LONG = 0.05, 1.0  # an interval wider than this, of a row of so many milliseconds, says that the row was too noisy
BUSY = 0.05  # above this share of the processors for others, a row is not worth keeping


@dataclass(frozen=True)
class Row:
    """One op at one shape and dtype, in one mode: `timings` of the copy, ours and the peers, or why there are none."""

    op: str
    title: str
    group: str  # of shapes.SETS
    shape: list[int]
    dtype: str
    mode: str
    bytes: float
    allocator: str  # "reusing" or "default" on a CPU
    expected_share: float | None  # of the copy's rate
    expected_lead: float | None  # over the better of eager and compile
    timings: dict[str, Timing] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)  # bytes that a step holds at most beyond what was there before
    failure: str = ""  # how the op is wrong
    skipped: str = ""  # what the row was lacking
    missing: dict[str, str] = field(default_factory=dict)  # peers that could not run, and why
    inexact: dict[str, str] = field(default_factory=dict)  # peers that are off by more than peers may be, and how
    late: list[str] = field(default_factory=list)  # contestants whose time may be that of the host
    others: float | None = None  # share of the processors' time that went to other processes

    @property
    def dimensions(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        return f"{self.title} {self.dimensions} {self.dtype} {self.mode}"

    @property
    def key(self) -> tuple:
        """What the same row of another run has too."""
        return self.op, self.title, self.group, *self.shape, self.dtype, self.mode, self.allocator

    def share_of(self, name: str) -> float:
        """Of the rate at which a copy moves as many bytes."""
        return self.timings["copy"].median / self.timings[name].median

    @property
    def share(self) -> float:
        return self.share_of("ours")

    @property
    def peers(self) -> list[str]:
        return [name for name in self.timings if name not in BESIDE]

    @property
    def libraries(self) -> list[str]:
        """The peers that are not PyTorch, in one way to write it or another."""
        return [name for name in self.peers if not name.startswith(TORCH)]

    def speedup(self, peer: str) -> float:
        return self.timings[peer].median / self.timings["ours"].median

    def lead_over(self, peers: Sequence[str]) -> float | None:
        return min((self.speedup(peer) for peer in peers if peer in self.timings), default=None)

    def gigabytes_per_second(self, name: str) -> float:
        return self.bytes / self.timings[name].median / 1e6

    @property
    def noisy(self) -> dict[str, Timing]:
        """Contestants of LONG milliseconds or more whose interval is wider than WIDE; "in cache" is compared with nobody."""
        return {name: timing for name, timing in self.timings.items()
                if name != "in cache" and timing.median >= LONG and timing.width > WIDE}

    def as_json(self) -> dict[str, object]:
        derived: dict[str, object] = {} if not self.timings else {
            "checked": [name for name in self.timings if name != "copy" and name not in self.inexact],
            "share_of_copy": {name: self.share_of(name) for name in self.timings},
            "speedup": {name: self.speedup(name) for name in self.peers},
            "gigabytes_per_second": {name: self.gigabytes_per_second(name) for name in self.timings}}
        return asdict(self) | derived

    @classmethod
    def from_json(cls, data: Mapping) -> Row:
        stored = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(**stored | {"timings": {name: Timing(**timing) for name, timing in data["timings"].items()}})


@dataclass(frozen=True)
class Results:
    """Rows with their environment. `settings` is how they were sampled, `peers` the version of each or why it was not compared."""

    environment: dict[str, object]
    rows: list[Row]
    settings: dict[str, object] = field(default_factory=dict)
    peers: dict[str, dict[str, str]] = field(default_factory=dict)

    def followed_by(self, other: Results) -> Results:
        return Results(self.environment, self.rows + other.rows, self.settings, self.peers)

    def as_json(self) -> dict[str, object]:
        return {"environment": self.environment, "settings": self.settings, "peers": self.peers,
                "rows": [row.as_json() for row in self.rows]}

    @classmethod
    def from_json(cls, data: Mapping) -> Results:
        return cls(data["environment"], [Row.from_json(row) for row in data["rows"]], data["settings"], data["peers"])

    @classmethod
    def load(cls, file: str | Path) -> Results:
        """What --json wrote there. ValueError, in one line, for anything else."""
        try:
            return cls.from_json(json.loads(Path(file).read_text()))
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: expected JSON as --json writes it: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: expected results as this version's --json writes them, but {_what(error)}") from error

    @property
    def kind(self) -> str:
        return str(self.environment.get("kind", "cpu"))

    @property
    def on_h100(self) -> bool:
        return "H100" in str(self.environment["device"])

    @property
    def others(self) -> float:
        """The largest share of the processors' time that went to other processes while a row was measured."""
        return max((row.others or 0.0 for row in self.rows), default=0.0)

    def described(self) -> str:
        e = self.environment
        ours = f"megatron_kernels {e['megatron_kernels']} at {e['commit']}, Python {e['python']}; {e['date']}"
        if self.kind == "cpu":
            where = f"{e['device']} at {e['clocks']}, {counted(e['threads'], 'thread')}, {e['instruction_set']}"
            return f"{where}; torch {e['torch']}, {ours}"
        return (f"{e['device']} ({e['multiprocessors']} multiprocessors, {e['memory_gib']} GiB, L2 {e['l2_mib']} MiB; "
                f"{e['clocks']}), driver {e['driver']}, CUDA {e['cuda']}; torch {e['torch']}, Triton {e['triton']}, {ours}")


def counted(number: object, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _what(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def write_json(file: str | Path, found: Results) -> None:
    files.write_json(file, found.as_json())


def write_csv(file: str | Path, found: Results) -> None:
    """One line per row and contestant, and one for what has no time; the environment is repeated on every line."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    environment = found.environment.values()
    lines.writerow(["op", "title", "group", "shape", "dtype", "mode", "allocator", "contestant", "median_ms", "p20_ms", "p80_ms",
                    "low_ms", "high_ms", "samples", "outliers", "gb_per_s", "of_copy", "expected_of_copy", "peak_mib", "checked",
                    "others", "remark", *found.environment])
    for row in found.rows:
        start = [row.op, row.title, row.group, row.dimensions, row.dtype, row.mode, row.allocator]
        for name, t in row.timings.items():
            expected = row.expected_share if name == "ours" and row.expected_share is not None else ""
            checked = "no" if name == "copy" else "inexact" if name in row.inexact else "float64"
            remarks = [row.inexact.get(name, ""), "may be the host's time" if name in row.late else "",
                       "too noisy" if name in row.noisy else ""]
            lines.writerow([*start, name, *(f"{value:.5g}" for value in (t.median, t.p20, t.p80, t.low, t.high)), t.samples,
                            t.outliers, f"{row.gigabytes_per_second(name):.5g}", f"{row.share_of(name):.4g}", expected,
                            f"{row.peak[name] / 2**20:.2f}" if name in row.peak else "", checked,
                            "" if row.others is None else f"{row.others:.3f}", ", ".join(filter(None, remarks)), *environment])
        for name, why in (row.missing if row.timings else {"ours": row.failure or row.skipped}).items():
            lines.writerow([*start, name, *[""] * 11, "wrong" if row.failure else "no", "", why, *environment])
    files.write(file, text.getvalue())
