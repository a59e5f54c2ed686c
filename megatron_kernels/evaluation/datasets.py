"""What is scored: windows over one stream of tokens, and the last words of passages.

The method is that of Megatron-LM's tasks/zeroshot_gpt/datasets.py (core_v0.13.0). Two things are left out because they change no
result: windows that would score nothing, and padding up to the sequence length.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from .detokenizer import DETOKENIZERS

if TYPE_CHECKING:
    from ..checkpoint import Tokenizer

IGNORE = -100
PADDING = 0  # any token would do: nothing before it sees it, and it is not scored


class Task(Protocol):
    """Items to be scored, each of which comes to one number."""

    noun: str

    def __len__(self) -> int: ...

    def lengths(self) -> list[int]:
        """How many tokens of each item go through the model."""

    def order(self) -> Sequence[int]:
        """The items in the order in which batches take them."""

    def batch(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids [b, s] and what is to follow each, -100 where that is not scored [b, s], int64."""

    def value(self, losses: Sequence[float], hits: Sequence[bool]) -> float:
        """The number of one item, from the losses of its targets and whether each was the most likely token."""

    def fingerprint(self) -> str:
        """A hash of all that is scored."""


class Windows:
    """Every token after the first, scored once, with as much text before it as windows that move by `stride` give it.

    Window k reads tokens [k * stride, k * stride + length). The first scores all that follow its tokens; a later one the last
    `stride`, which are new. With stride = length windows don't overlap, and the first target of each has one token before it.
    """

    noun = "window"

    def __init__(self, tokens: Sequence[int] | Tensor, length: int, stride: int):
        """tokens: [T], T >= 2. Raises ValueError for less, and for a stride outside [1, length]."""
        self.tokens = torch.as_tensor(tokens, dtype=torch.int64)
        if len(self.tokens) < 2:
            raise ValueError(f"{len(self.tokens)} tokens, of which none can be scored; expected at least 2")
        if not 1 <= stride <= length:
            raise ValueError(f"--overlapping-eval must be in [1, the sequence length {length}], got {stride}")
        self.length, self.stride = length, stride
        self.targets = len(self.tokens) - 1

    def __len__(self) -> int:
        return 1 + max(math.ceil((self.targets - self.length) / self.stride), 0)

    def lengths(self) -> list[int]:
        return [min(self.length, self.targets - k * self.stride) for k in range(len(self))]

    def order(self) -> Sequence[int]:
        return range(len(self))

    def batch(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = []
        for k in items:
            start = k * self.stride
            stop = min(start + self.length, self.targets)
            targets = self.tokens[start + 1:stop + 1].clone()
            if k:
                targets[:self.length - self.stride] = IGNORE
            rows.append((self.tokens[start:stop], targets))
        return _together(rows)

    def value(self, losses: Sequence[float], hits: Sequence[bool]) -> float:
        return math.fsum(losses)

    def fingerprint(self) -> str:
        return _hash([self.tokens])


class LastWords:
    """Passages whose last word (or token) is to be predicted: right only if each of its tokens is the most likely one, given the
    true tokens before it."""

    noun = "example"

    def __init__(self, examples: Sequence[tuple[list[int], list[int]]]):
        """examples: tokens of the passage and of the target, both at least one."""
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def targets(self) -> int:
        return sum(len(target) for _, target in self.examples)

    def lengths(self) -> list[int]:
        return [len(passage) + len(target) - 1 for passage, target in self.examples]

    def order(self) -> Sequence[int]:
        """The long ones first, so that those of a batch are about equally long and a lack of memory shows at once."""
        lengths = self.lengths()
        return sorted(range(len(self)), key=lambda item: -lengths[item])

    def batch(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = []
        for passage, target in (self.examples[item] for item in items):
            tokens = torch.tensor(passage + target, dtype=torch.int64)
            targets = tokens[1:].clone()
            targets[:len(passage) - 1] = IGNORE
            rows.append((tokens[:-1], targets))
        return _together(rows)

    def value(self, losses: Sequence[float], hits: Sequence[bool]) -> float:
        return float(all(hits))

    def fingerprint(self) -> str:
        return _hash([torch.tensor(part, dtype=torch.int64) for example in self.examples for part in example])


def _together(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids, targets = (torch.nn.utils.rnn.pad_sequence([row[part] for row in rows], batch_first=True, padding_value=padding)
                    for part, padding in ((0, PADDING), (1, IGNORE)))
    return ids, targets


def _hash(parts: list[Tensor]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part.numpy().data)
    return found.hexdigest()


class Stream(NamedTuple):
    """A text as one stream of tokens, and how many words it had: pieces between spaces, before detokenising."""

    tokens: list[int]
    words: int


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Text to token ids by the byte-level BPE alone, as Megatron-LM does: nothing is added or cut off, and "<|endoftext|>" in a
    text is ordinary text."""
    words = tokenizer.load()
    words.no_truncation()
    words.no_padding()
    words.encode_special_tokens = True
    return lambda text: words.encode(text, add_special_tokens=False).ids


def read_stream(path: Path, detokenizer: str, encode: Callable[[str], list[int]]) -> Stream:
    """Read a text file, UTF-8 with its line ends as they are. Raises ValueError naming the file."""
    raw = _read(path)
    tokens = encode(DETOKENIZERS[detokenizer](raw))
    if len(tokens) < 2:
        raise ValueError(f"{path}: {'empty' if not tokens else 'one token alone'}, nothing to score; expected at least 2 tokens")
    return Stream(tokens, len(raw.strip().split(" ")))


def read_last_words(path: Path, strict: bool, encode: Callable[[str], list[int]], longest: int) -> LastWords:
    """Read JSON lines with "text". Blank lines are skipped.

    strict: the target is the last word, what follows the last white space, encoded with a space before it; else the last token of
    the whole text. longest: how many tokens a passage and its target may have. Raises ValueError naming file and line.
    """
    examples = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        text = _text_of(line, where)
        if strict:
            word = text.split()[-1]
            passage, target = encode(text[:text.rfind(word)].strip()), encode(" " + word)
        else:
            tokens = encode(text)
            passage, target = tokens[:-1], tokens[-1:]
        if not passage:
            raise ValueError(f"{where}: {'a word' if strict else 'a token'} alone, nothing to predict it from: {text!r:.80}")
        if len(passage) + len(target) > longest:
            raise ValueError(f"{where}: {len(passage) + len(target)} tokens, but the sequence length allows {longest}")
        examples.append((passage, target))
    if not examples:
        raise ValueError(f"{path}: no examples; expected JSON lines with \"text\"")
    return LastWords(examples)


def _text_of(line: str, where: str) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    text = content.get("text") if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a JSON object with a string \"text\", got {line.strip():.80}")
    if not text.strip():
        raise ValueError(f"{where}: \"text\" is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start} of \"text\"") from None
    return text


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})") from None
