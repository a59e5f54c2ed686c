"""A directory that appears whole or not at all.

Everything is written into a hidden sibling of the destination, forced to disk, and put in place by one rename. An error or
Ctrl-C removes the sibling; a killed process can leave the sibling behind, never a half-written destination. Replacing an
existing directory swaps the two names in one system call where the kernel can (Linux), and by two renames elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import CheckpointError

_MARKERS = ("config.json", "latest_checkpointed_iteration.txt")  # files of a checkpoint: what `force` may replace
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _check(destination: Path, force: bool, source: Path | None) -> None:
    if source is not None and source.resolve() != destination and source.resolve().is_relative_to(destination):
        raise CheckpointError(f"{destination}: the destination contains the source {source}")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: exists and is no directory")
    if not any(destination.iterdir()):
        return
    if not force:
        raise CheckpointError(f"{destination}: exists and is not empty; force replaces it")
    if not any((destination / name).exists() for name in _MARKERS):
        raise CheckpointError(f"{destination}: holds neither {' nor '.join(_MARKERS)}, so force does not replace it")


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(os.path.join(folder, name))
        _sync(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directory entries atomically; False where the system can't."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _put_in_place(temporary: Path, destination: Path) -> None:
    if not destination.exists() or not any(destination.iterdir()):
        os.rename(temporary, destination)
    elif _exchange(temporary, destination):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
        os.rename(destination, old)
        try:
            os.rename(temporary, destination)
        except BaseException:
            os.rename(old, destination)
            raise
        shutil.rmtree(old, ignore_errors=True)


def commit(temporary: Path, destination: Path) -> None:
    """Force a directory made by mkdtemp to disk, and rename it to a sibling's name. Raises OSError."""
    temporary.chmod(0o777 & ~_umask())
    _sync_tree(temporary)
    _put_in_place(temporary, destination)
    _sync(destination.parent)


@contextlib.contextmanager
def atomic_directory(destination: str | os.PathLike[str], *, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A temporary directory to fill, which becomes `destination` when the block ends without an exception.

    Missing parents of the destination are made. An existing non-empty destination is refused, unless `force` is given and it
    holds a checkpoint: then it is replaced at the very end. A destination that contains `source` is refused.
    Raises CheckpointError for these and for what the operating system reports while writing (disk full, permissions).
    """
    target = Path(os.path.realpath(destination))
    _check(target, force, source)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        yield temporary
        commit(temporary, target)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: cannot write: {error.strerror or error}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
