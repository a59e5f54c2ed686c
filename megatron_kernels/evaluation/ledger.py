"""What is scored already, one number per item, in memory and in a file from which an interrupted run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_KIND = "megatron-kernels evaluate, partial results"


class Ledger:
    """The numbers of `count` items as they come.

    With a path they are also in a file, written when they are `every` seconds older than what it holds, and by `save`. Floats are
    written with all their digits, so a run that goes on ends with the very sum it would have had.
    """

    def __init__(self, count: int, path: Path | None = None, fingerprint: Mapping[str, Any] | None = None, every: float = 10.0):
        """fingerprint: what the numbers depend on. Where the file exists it is read; ValueError if it has another run's numbers, or
        is something else."""
        self.values: list[float | None] = [None] * count
        self.seconds = 0.0
        self.path, self.fingerprint, self.every = path, dict(fingerprint or {}), every
        self._saved = time.monotonic()
        if path is not None and path.exists():
            self._read(path)
        self.found = self.done

    @property
    def done(self) -> int:
        return sum(value is not None for value in self.values)

    def enter(self, items: Sequence[int], values: Sequence[float], seconds: float) -> None:
        """Numbers of some items, and how long they took."""
        for item, value in zip(items, values, strict=True):
            self.values[item] = value
        self.seconds += seconds
        if time.monotonic() - self._saved >= self.every:
            self.save()

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, {"kind": _KIND, "fingerprint": self.fingerprint, "seconds": self.seconds, "values": self.values})
            self._saved = time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            raise ValueError(f"{path}: exists and holds no partial results of an evaluation; remove it or name another file")
        if not any(value is not None for value in content["values"]):
            return
        theirs, ours = content["fingerprint"], self.fingerprint
        other = [f"{name} {_short(theirs.get(name))} there, {_short(ours.get(name))} here" for name in {**theirs, **ours}
                 if theirs.get(name) != ours.get(name)]
        if other:
            raise ValueError(f"{path}: partial results of another evaluation ({'; '.join(other)}); remove it or name another file "
                             "with --resume")
        self.values, self.seconds = content["values"], content["seconds"]


def _short(value: Any) -> str:
    return value[:12] + "..." if isinstance(value, str) and len(value) == 64 else str(value)


def write_json(path: Path, content: Any) -> None:
    """The file is there whole, or as it was before. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
