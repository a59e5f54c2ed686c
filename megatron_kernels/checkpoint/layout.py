"""Finding the shards of a Megatron checkpoint: in a directory, in the directory above, in a zip archive, or a single file.

Megatron-LM writes DIR/iter_0001000/mp_rank_TT/model_optim_rng.pt, mp_rank_TT_PPP with pipeline parallelism, `release` in place
of iter_* for published weights, and DIR/latest_checkpointed_iteration.txt with the name of the last one. `distrib_optim.pt` and
other files beside the model are left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .reading import first_line, is_torch_zip, read_torch_file

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
_MODEL_FILE = "|".join(map(re.escape, MODEL_FILES))
_SHARD = re.compile(rf"(?P<prefix>(?:[^/]*/)*)mp_rank_(?P<tp>\d+)(?:_(?P<pp>\d+))?(?P<more>(?:_\d+)*)/(?:{_MODEL_FILE})")
_BARE = re.compile(rf"(?P<prefix>(?:[^/]*/)*)(?:{_MODEL_FILE})")


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its ranks, its name for messages, and how to read it."""

    tensor_rank: int
    pipeline_rank: int
    label: str
    read: Callable[[], Any]


@dataclass(frozen=True)
class Layout:
    """Where a Megatron checkpoint lies: its shards, and in words what holds them."""

    kind: str
    label: str
    shards: tuple[Shard, ...]


def find(path: Path) -> Layout:
    """The shards at `path`; raises CheckpointError when there is no Megatron checkpoint or more than one to choose from."""
    if path.is_dir():
        return _of_directory(path)
    if zipfile.is_zipfile(path) and not is_torch_zip(path):
        return _of_archive(path)
    return Layout("file", str(path), (Shard(0, 0, str(path), partial(read_torch_file, path)),))


def _of_directory(root: Path) -> Layout:
    patterns = ("*.pt", "mp_rank_*/*.pt", "*/mp_rank_*/*.pt", TRACKER)
    names = sorted({found.relative_to(root).as_posix() for pattern in patterns for found in root.glob(pattern)})
    read_text = lambda name: (root / name).read_text(errors="replace")  # noqa: E731
    chosen, ranks = _choose(names, read_text, str(root))
    if not ranks:
        raise _nothing_found(root)
    shards = tuple(Shard(*rank, str(root / name), partial(read_torch_file, root / name))
                   for rank, name in sorted(ranks.items()))
    return Layout("directory", str(root / chosen) if chosen else str(root), shards)


def _nothing_found(root: Path) -> CheckpointError:
    below = [root, *sorted(child for child in root.iterdir() if child.is_dir())]
    for folder in below:
        if (folder / "metadata.json").exists() or (folder / ".metadata").exists():
            return CheckpointError(f"{folder}: a torch_dist checkpoint, which is not read; let Megatron-LM convert it with "
                                   "--ckpt-convert-format torch")
    return CheckpointError(f"{root}: no checkpoint found; expected config.json (Hugging Face), or {MODEL_FILES[0]}, "
                           "mp_rank_*/, release/ or iter_*/ (Megatron)")


def _of_archive(path: Path) -> Layout:
    with _archive(path) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        for name in names:
            if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
                raise CheckpointError(f"{path}: refused, the archive has a member that leaves it: {name!r}")
        read_text = lambda name: archive.read(name).decode(errors="replace")  # noqa: E731
        chosen, ranks = _choose(sorted(names), read_text, str(path))
    if not ranks:
        raise CheckpointError(f"{path}: no checkpoint found in the archive; expected members like "
                              f"release/mp_rank_00/{MODEL_FILES[0]}")
    shards = tuple(Shard(*rank, f"{path}!{name}", partial(_read_member, path, name)) for rank, name in sorted(ranks.items()))
    return Layout("zip archive", f"{path}!{chosen}" if chosen else str(path), shards)


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path}: truncated or damaged zip archive ({first_line(error)})") from None


def _read_member(path: Path, name: str) -> Any:
    """Unpack one member into a temporary file, map it into memory and unlink the file; the mapping keeps the data alive."""
    descriptor, temporary = tempfile.mkstemp(prefix="megatron-kernels-", suffix=".pt")
    try:
        try:  # closing writes what is left, so that a full disk may show only there
            with os.fdopen(descriptor, "wb") as target, _archive(path) as archive, archive.open(name) as source:
                try:
                    shutil.copyfileobj(source, target, 1 << 20)
                except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
                    raise CheckpointError(f"{path}!{name}: truncated or damaged ({first_line(error)})") from None
        except OSError as error:
            raise CheckpointError(f"{path}!{name}: cannot unpack into {temporary}: {error.strerror or error} "
                                  "(TMPDIR chooses another place)") from None
        return read_torch_file(Path(temporary), f"{path}!{name}")
    finally:
        os.unlink(temporary)


def _choose(names: list[str], read_text: Callable[[str], str], label: str) -> tuple[str, dict[tuple[int, int], str]]:
    """The folder of the one checkpoint among `names`, and (tensor rank, pipeline rank) -> file name in it."""
    folders: dict[str, dict[tuple[int, int], str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match and match["more"]:
            raise CheckpointError(f"{label}: {name} is a shard of a mixture of experts, which is not supported")
        match = match or _BARE.fullmatch(name)
        if match:
            groups = match.groupdict()
            rank = int(groups.get("tp") or 0), int(groups.get("pp") or 0)
            files = folders.setdefault(match["prefix"], {})
            if rank in files and name.rpartition("/")[0] != files[rank].rpartition("/")[0]:
                raise CheckpointError(f"{label}: {files[rank]} and {name} are both tensor rank {rank[0]}, "
                                      f"pipeline rank {rank[1]}")
            files.setdefault(rank, name)
    for name in names:
        base, _, last = name.rpartition("/")
        if last == TRACKER:
            wanted = _tracked(read_text(name), f"{label}: {name}")
            folder = f"{base}/{wanted}/" if base else f"{wanted}/"
            if folder in folders:
                return folder, folders[folder]
            if any(other != "" for other in folders):
                raise CheckpointError(f"{label}: {name} names {wanted}/, which is missing or holds no {MODEL_FILES[0]}; "
                                      f"found {_listed(folders)}")
    if len(folders) > 1:
        raise CheckpointError(f"{label}: holds several checkpoints and no {TRACKER} to choose by; "
                              f"give one of {_listed(folders)}")
    return next(iter(folders.items()), ("", {}))


def _listed(folders: dict[str, Any]) -> str:
    return ", ".join(folder or "./" for folder in sorted(folders))


def _tracked(text: str, label: str) -> str:
    word = text.strip()
    if word == "release":
        return word
    if re.fullmatch(r"\d{1,18}", word):
        return f"iter_{int(word):07d}"
    raise CheckpointError(f"{label}: expected an iteration number or 'release', got {word[:40]!r}")
