"""Checkpoints of GPT-2 and BERT: Megatron-LM's and Hugging Face's, read and written; and the state of a training run.

    checkpoint = load("megatron_gpt2_345m_v0_0.zip")
    save_huggingface(checkpoint, "gpt2-345m")
    save_megatron(checkpoint, "gpt2-345m-megatron", tensor_parallel=2, pipeline_parallel=2)

    save_training("run", model, optimizer, step=1000)
    load_training("run", model, optimizer).step
"""

from __future__ import annotations

import os
from pathlib import Path

from ..models.config import ModelConfig
from . import huggingface, megatron
from .errors import CheckpointError, MissingConfigurationError
from .gathering import write_together
from .huggingface import save_huggingface
from .megatron_writer import save_megatron
from .tensors import Checkpoint
from .tokenizer import Tokenizer
from .training import Restored, latest, load_training, save_training
from .wordpiece import WordPiece

__all__ = ["Checkpoint", "CheckpointError", "MissingConfigurationError", "Restored", "Tokenizer", "WordPiece", "latest", "load",
           "load_training", "save_huggingface", "save_megatron", "save_training", "write_together"]


def load(path: str | os.PathLike[str], config: ModelConfig | str | Path | None = None) -> Checkpoint:
    """Read a checkpoint of a GPT-2 or a BERT; the format and the model are found out by looking.

    path: a Hugging Face directory; or Megatron's zip archive, .pt file, iteration directory, or the directory above it.
    config: what the files can't tell, as a GPT2Config, a BertConfig or a Hugging Face config.json; it must not contradict them.
    Megatron checkpoints without `args` need it, unless the shapes are those of a 345M release.

    Nothing is assembled yet: `Checkpoint.tensors` does that tensor by tensor. Raises CheckpointError for anything that is
    damaged, incomplete, inconsistent, of another model, or not to be read safely.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory")
        if path.is_dir() and (path / "config.json").exists():
            return huggingface.load(path, config)
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: give the directory that holds config.json and the weights")
        return megatron.load(path, config)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot read: {error.strerror or error}") from None
