"""The vocabulary of a BERT beside the weights, so that AutoTokenizer finds it without a network."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..models.config import BertConfig, ModelConfig
from .errors import CheckpointError
from .tokenizer import FILES, Tokenizer

VOCABULARY = "vocab.txt"


@dataclass(frozen=True)
class WordPiece:
    """A WordPiece vocabulary to put beside a BERT: a vocab.txt of one piece a line, whose number is its id; or a directory with
    a vocab.txt, whose tokenizer files are copied too."""

    path: Path

    def __post_init__(self) -> None:
        try:
            text = self.vocab_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise CheckpointError(f"{self.vocab_file}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.vocab_file}: not readable as text ({error})") from None
        object.__setattr__(self, "pieces", text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"))
        if "[UNK]" not in self.pieces:
            raise CheckpointError(f"{self.vocab_file}: no WordPiece vocabulary: it has no [UNK] among its {len(self.pieces)} lines")

    pieces: list[str] = None  # type: ignore[assignment]  # read from the file

    @property
    def vocab_file(self) -> Path:
        return self.path / VOCABULARY if self.path.is_dir() else self.path

    @property
    def lower_case(self) -> bool:
        """Whether no piece has a capital letter, so that text must be lowered before it is cut."""
        return not any(piece != piece.lower() for piece in self.pieces if not piece.startswith("["))

    def check(self, vocab_size: int) -> None:
        """Raise CheckpointError when there are pieces that a model of `vocab_size` classes has no row for."""
        if len(self.pieces) > vocab_size:
            raise CheckpointError(f"{self.vocab_file}: {len(self.pieces)} pieces, but the model's vocabulary has {vocab_size} rows")

    def write(self, target: Path, max_length: int) -> None:
        """Put the files into `target`, with a tokenizer_config.json where there is none to copy."""
        if self.path.is_dir():
            for name in FILES:
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, target / name)
        shutil.copyfile(self.vocab_file, target / VOCABULARY)
        if not (target / "tokenizer_config.json").exists():
            content = {"tokenizer_class": "BertTokenizer", "do_lower_case": self.lower_case, "model_max_length": max_length}
            (target / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_tokenizer(tokenizer: Tokenizer | WordPiece | None, config: ModelConfig) -> None:
    """Raise CheckpointError unless the tokenizer is one for that model, and has a row of it for each of its ids."""
    if tokenizer is None:
        return
    if isinstance(tokenizer, WordPiece) and not isinstance(config, BertConfig):
        raise CheckpointError(f"{tokenizer.vocab_file}: a WordPiece vocabulary goes with a BERT, and this is a {config.model}")
    if isinstance(tokenizer, Tokenizer) and isinstance(config, BertConfig):
        raise CheckpointError(f"{tokenizer.directory or tokenizer.vocab_file}: a BERT takes a WordPiece vocabulary, {VOCABULARY}, "
                              "or a directory with one")
    tokenizer.check(config.vocab_size)
