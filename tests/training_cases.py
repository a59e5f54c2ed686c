"""A corpus, a tokenizer and a small model for the training tests."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer

from megatron_kernels import checkpoint
from megatron_kernels.training import loop
from megatron_kernels.training.options import Options

TIMES = ("tokens_per_s", "elapsed")
END = 0


def corpus() -> str:
    """Text with some structure, and with whitespace of every kind."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "they", "said", "naïve", "42", "don't"]
    lines = []
    for i in range(400):
        lines.append(" ".join(words[(i * 7 + j * j) % len(words)] for j in range(i % 11 + 1)) + (".", "", " ", "!\n")[i % 4])
    return "\n".join(lines) + "\n\n  end\n"


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    """A directory with a byte-level BPE of some 300 tokens."""
    path = tmp_path_factory.mktemp("words")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([corpus()], vocab_size=300, min_frequency=1, special_tokens=["<|endoftext|>"])
    trained.save_model(str(path))
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(corpus(), encoding="utf-8")
    return path


@pytest.fixture
def base(text, words) -> dict[str, Any]:
    """Options of a run of a few seconds, with accumulation and dropout."""
    return {"data": [text], "tokenizer": words, "seq_length": 16, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
            "micro_batch_size": 2, "global_batch_size": 4, "iterations": 6, "lr": 3e-3, "warmup": 2, "log_interval": 1000,
            "seed": 7}


def train(base: dict[str, Any], **changes: Any) -> int:
    return loop.run(Options(**{**base, **changes}))


def rows(path: Path) -> list[dict[str, str]]:
    """The CSV's rows without the times."""
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The parameters in the last checkpoint of a run, whatever layout wrote it."""
    from megatron_kernels.models import GPT2, GPT2Config

    path = checkpoint.latest(run)
    config = torch.load(path / "training.pt", weights_only=True)["config"]
    model = GPT2(GPT2Config(**config))
    checkpoint.load_training(path, model)
    return dict(model.named_parameters())


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
