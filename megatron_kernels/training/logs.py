"""Where an iteration's figures go: a line on the terminal now and then, a row of a CSV file each time, TensorBoard."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import typer


@dataclass
class Row:
    """Figures of one iteration; the CSV's columns. Times in seconds, those of scoring and saving left out."""

    iteration: int
    loss: float
    lr: float
    grad_norm: float
    loss_scale: float
    skipped: int  # 1 where float16 gradients overflowed, and the weights were left alone
    tokens_per_s: float
    elapsed: float  # since the start of the training, earlier processes included
    valid_loss: float | None = None


COLUMNS = [field.name for field in fields(Row)]


class Log:
    """The logs of one process; with `quiet` it keeps none, which is for all ranks but the first."""

    def __init__(self, iterations: int, interval: int, csv_path: Path | None, tensorboard: Path | None, start: int,
                 quiet: bool = False):
        self.iterations, self.interval, self.quiet = iterations, interval, quiet
        self.recent: list[Row] = []
        self.skipped = 0
        self.csv: io.TextIOBase | None = None if quiet or csv_path is None else open_csv(csv_path, start)
        self.writer: Any = None
        if tensorboard is not None and not quiet:
            self.writer = summary_writer()(str(tensorboard), purge_step=start + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.csv, self.writer):
            if file is not None:
                file.close()

    def say(self, text: str) -> None:
        if not self.quiet:
            typer.echo(text)

    def row(self, row: Row) -> None:
        self.recent.append(row)
        self.skipped += row.skipped
        if self.csv is not None:
            csv.writer(self.csv, lineterminator="\n").writerow(["" if value is None else value for value in asdict(row).values()])
            self.csv.flush()
        if self.writer is not None:
            for name, value in asdict(row).items():
                if name != "iteration" and value is not None:
                    self.writer.add_scalar(f"train/{name}", value, row.iteration)
        if row.iteration % self.interval == 0 or row.iteration == self.iterations:
            self.say(self.line())
            self.recent = []
        if row.valid_loss is not None:
            self.say(f"{'validation':>10} {row.iteration:>7}/{self.iterations}  loss {row.valid_loss:.4f}")

    def line(self) -> str:
        """The mean loss since the last line, and the last iteration's other figures."""
        last, kept = self.recent[-1], [row for row in self.recent if not row.skipped]
        loss = sum(row.loss for row in kept) / len(kept) if kept else float("nan")
        seconds = sum(1 / row.tokens_per_s for row in self.recent)
        parts = [f"{'iteration':>10} {last.iteration:>7}/{self.iterations}", f"loss {loss:.4f}", f"lr {last.lr:.3e}",
                 f"grad norm {last.grad_norm:.3f}", f"{len(self.recent) / seconds:,.0f} tokens/s", clock(last.elapsed)]
        if last.loss_scale != 1 or self.skipped:
            parts.append(f"scale {last.loss_scale:g}, skipped {self.skipped}")
        return "  ".join(parts)

    def sync(self) -> None:
        """Force what was logged to disk: a checkpoint follows, which must not be newer than its rows."""
        if self.csv is not None:
            os.fsync(self.csv.fileno())
        if self.writer is not None:
            self.writer.flush()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def open_csv(path: Path, start: int) -> io.TextIOBase:
    """The file to append rows to, without rows after iteration `start`, and without one that was half written.

    Raises ValueError for a file that has other columns.
    """
    rows: list[list[str]] = []
    if path.exists() and path.stat().st_size:
        with open(path, encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
            if header != COLUMNS:
                raise ValueError(f"{path}: has the columns {','.join(header)}, expected {','.join(COLUMNS)}")
            rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdigit() and int(row[0]) <= start]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(partial, "w", encoding="utf-8", newline="") as new:
        csv.writer(new, lineterminator="\n").writerows([COLUMNS, *rows])
        new.flush()
        os.fsync(new.fileno())
    os.replace(partial, path)
    return open(path, "a", encoding="utf-8", newline="")  # (closed by the log)


def summary_writer() -> Any:
    """TensorBoard's class. Raises ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard needs the tensorboard package (pip install tensorboard): {error}") from None
    return SummaryWriter
