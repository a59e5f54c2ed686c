"""Token files: memory-mapped ids, made from text once, or Megatron-LM's.

`name.bin` holds the ids, uint16 or uint32, and `name.json` beside it says how many, of which vocabulary, and made from what; it is
written last, so a token file without it does not exist. Megatron-LM's preprocess_data.py writes `name.bin` and `name.idx`, whose
header is read here and whose documents are taken one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..checkpoint import Tokenizer

FORMAT = "megatron_kernels tokens 1"
CHUNK = 1 << 20  # characters of text at a time
_CUT = re.compile(r"\S\n(?=\S)")  # between two tokens of a byte-level BPE, whatever surrounds it
_MAGIC, _HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floating point


class DataError(ValueError):
    """Data that can't be trained on."""


@dataclass(frozen=True)
class TokenFile:
    """One file: its ids, the size of their vocabulary where it is known, and a hash that stands for its content."""

    path: Path
    ids: np.ndarray
    vocab_size: int | None
    digest: str


class Tokens:
    """The ids of several files as one row."""

    def __init__(self, files: Sequence[TokenFile]):
        self.files = list(files)
        self.starts = np.cumsum([0, *(len(file.ids) for file in files)])
        self.digest = hashlib.sha256(" ".join(file.digest for file in files).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """ids[start:stop], int64."""
        out = np.empty(stop - start, np.int64)
        number = int(np.searchsorted(self.starts, start, "right")) - 1
        at = start
        while at < stop:
            end = min(stop, int(self.starts[number + 1]))
            out[at - start:end - start] = self.files[number].ids[at - self.starts[number]:end - self.starts[number]]
            at, number = end, number + 1
        return out


def open_tokens(paths: Sequence[Path], tokenizer: Tokenizer | None, cache: Path | None = None) -> Tokens:
    """The tokens of text files, .jsonl files, and token files with or without their .bin.

    Texts are tokenised where no token file of the same text and tokenizer is there yet, in `cache` or beside the text.
    Raises DataError for files that are missing, damaged, or texts without a tokenizer.
    """
    texts = _Texts(tokenizer, cache)
    return Tokens([_open(path, texts) for path in paths])


def _open(path: Path, texts: _Texts) -> TokenFile:
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index, about, ids = (stem.with_name(stem.name + suffix) for suffix in (".idx", ".json", ".bin"))
    if ids.is_file() and (path.suffix in (".bin", ".idx") or not path.is_file()):
        if index.is_file():
            return read_megatron(stem)
        if about.is_file():
            return read_own(stem)
        raise DataError(f"{ids}: expected {about.name} or {index.name} beside it")
    if not path.is_file():
        raise DataError(f"{path}: no such file" + (" (token files: give NAME, NAME.bin or NAME.idx)" if not path.is_dir() else
                                                   ", but a directory"))
    return texts.tokenised(path)


def read_own(stem: Path) -> TokenFile:
    """A token file of this package, by its path without suffix."""
    about, ids = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".bin")
    try:
        facts = json.loads(about.read_text(encoding="utf-8"))
        known = isinstance(facts, dict) and facts.get("format") == FORMAT
    except (ValueError, UnicodeDecodeError):
        known = False
    if not known:
        raise DataError(f"{about}: does not describe a token file, expected \"format\": \"{FORMAT}\"")
    try:
        dtype, count, vocab_size, digest = np.dtype(facts["dtype"]), int(facts["tokens"]), int(facts["vocab_size"]), facts["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{about}: damaged ({error!r})") from None
    return TokenFile(ids, _mapped(ids, dtype, count, about), vocab_size, str(digest))


def read_megatron(stem: Path) -> TokenFile:
    """A file of Megatron-LM's IndexedDataset (megatron/core/datasets/indexed_dataset.py), by its path without suffix.

    The index: magic, version 1 (uint64), code of the dtype (uint8), numbers of sequences and documents (uint64 each), then each
    sequence's length (int32), its place in bytes (int64), and where documents begin (int64); little-endian.
    """
    index, ids = stem.with_name(stem.name + ".idx"), stem.with_name(stem.name + ".bin")
    content = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.empty(0, np.uint8)
    if len(content) < _HEADER.size or bytes(content[:9]) != _MAGIC:
        raise DataError(f"{index}: not an index of Megatron-LM's mmap format (MMIDIDX)")
    _, version, code, sequences, documents = _HEADER.unpack(bytes(content[:_HEADER.size]))
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{index}: version {version} with dtype code {code}, expected version 1 and one of {sorted(_DTYPES)}")
    if len(content) < _HEADER.size + sequences * 12 + documents * 8:
        raise DataError(f"{index}: {len(content)} bytes are too few for its {sequences} sequences and {documents} documents")
    lengths = content[_HEADER.size:][:4 * sequences].view("<i4").astype(np.int64)
    places = content[_HEADER.size + 4 * sequences:][:8 * sequences].view("<i8")
    dtype = np.dtype(_DTYPES[code])
    if not np.array_equal(places, (np.cumsum(lengths) - lengths) * dtype.itemsize):
        raise DataError(f"{index}: its sequences do not follow each other in {ids.name}")
    count = int(lengths.sum())
    digest = hashlib.sha256(b"megatron %d " % count + hashlib.sha256(content.data).digest()).hexdigest()
    return TokenFile(ids, _mapped(ids, dtype, count, index), None, digest)


def _mapped(path: Path, dtype: np.dtype, count: int, index: Path) -> np.ndarray:
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise DataError(f"{path}: {size} bytes, expected {count * dtype.itemsize} by {index.name}")
    return np.memmap(path, dtype, "r") if count else np.empty(0, dtype)


class _Texts:
    """Texts and their token files."""

    def __init__(self, tokenizer: Tokenizer | None, cache: Path | None):
        self.tokenizer, self.cache = tokenizer, cache
        self.words: Any = None

    def tokenised(self, path: Path) -> TokenFile:
        if self.tokenizer is None:
            raise DataError(f"{path}: a text needs a tokenizer: give --tokenizer, or --vocab-file and --merges-file")
        if self.words is None:
            self.words = self.tokenizer.load()
            self.digest = hashlib.sha256(self.words.to_str().encode()).hexdigest()
            self.end = self.tokenizer.end_of_text
        key = hashlib.sha256(f"{self.digest} {path.resolve() if self.cache else ''}".encode()).hexdigest()[:12]
        stem = (self.cache or path.parent) / f"{path.name}.{key}"
        stat = path.stat()
        source = {"name": path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
        about = stem.with_name(stem.name + ".json")
        if about.is_file():
            facts = json.loads(about.read_text(encoding="utf-8"))
            if facts.get("source") == source and facts.get("tokenizer") == self.digest:
                return read_own(stem)
        self._write(path, stem, source)
        return read_own(stem)

    def _write(self, path: Path, stem: Path, source: dict[str, Any]) -> None:
        """Tokenise a text; an interruption leaves what was there before."""
        vocab_size = max(self.words.get_vocab().values(), default=-1) + 1
        dtype, count, digest = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4"), 0, hashlib.sha256()
        documents = _json_lines(path) if path.suffix == ".jsonl" else _pieces(path)

        def write(file: IO[bytes]) -> None:
            nonlocal count
            for pieces, ends in documents:
                for encoding in self.words.encode_batch(pieces, add_special_tokens=False):
                    last = [self.end] if ends and self.end is not None else []
                    content = np.array([*encoding.ids, *last], dtype).tobytes()
                    digest.update(content)
                    count += len(content) // dtype.itemsize
                    file.write(content)

        stem.parent.mkdir(parents=True, exist_ok=True)
        about = stem.with_name(stem.name + ".json")
        about.unlink(missing_ok=True)
        _whole(stem.with_name(stem.name + ".bin"), write)
        facts = {"format": FORMAT, "dtype": dtype.name, "tokens": count, "vocab_size": vocab_size, "end_of_text": self.end,
                 "sha256": digest.hexdigest(), "tokenizer": self.digest, "source": source}
        _whole(about, lambda file: file.write(json.dumps(facts, indent=1).encode() + b"\n"))


Batch = tuple[list[str], bool]  # texts to tokenise, and whether a document ends after each


def _pieces(path: Path) -> Iterator[Batch]:
    """A text as one document, in pieces whose tokens are those of the whole."""
    rest = ""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for block in iter(partial(file.read, CHUNK), ""):
                rest += block
                cut = max((match.end() for match in _CUT.finditer(rest, max(len(rest) - CHUNK, 0))), default=0)
                if cut:
                    yield [rest[:cut]], False
                    rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from None
    yield [rest], True


def _json_lines(path: Path) -> Iterator[Batch]:
    """The "text" of each line, a document each."""
    texts: list[str] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise DataError(f"{path}: line {number} is no JSON object with a string \"text\"")
                texts.append(text)
            if len(texts) == 1000:
                yield texts, True
                texts = []
    yield texts, True


def _whole(path: Path, write: Any) -> None:
    """A file that appears complete or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(descriptor)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
