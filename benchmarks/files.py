"""Result files: written whole or not at all, and read with one line that says what is wrong with them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path`, which is made, to write to; it takes the place of `path` at the end, and is gone after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: str | Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text)


def write_json(path: str | Path, data: Any) -> None:
    write(path, json.dumps(data, indent=1) + "\n")


def read_json(path: str | Path, what: str, kind: str) -> dict[str, Any]:
    """A file with that "kind"; ValueError where it can't be read, is no JSON or something else than `what`."""
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    seen = found.get("kind") if isinstance(found, dict) else type(found).__name__
    if not isinstance(found, dict) or seen != kind:
        raise ValueError(f"{path}: expected {what}, of kind {kind!r}, got {seen!r}")
    return found
