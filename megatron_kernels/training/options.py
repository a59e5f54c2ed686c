"""What a training run can be told: one field an option, with its help. The command line is made of it; no torch is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Attention, DType, option


class Decay(str, Enum):
    """How the learning rate falls after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Replicas(str, Enum):
    """How replicas keep the model."""

    ddp = "ddp"
    fsdp = "fsdp"


def _data(help: str, *names: str, **more: Any) -> Any:
    return option("Data", help, *names, **more)


def _model(help: str, *names: str, **more: Any) -> Any:
    return option("Model", help, *names, **more)


def _optimizer(help: str, *names: str, **more: Any) -> Any:
    return option("Steps and optimizer", help, *names, **more)


def _ranks(help: str, *names: str, **more: Any) -> Any:
    return option("Several ranks, under torchrun", help, *names, **more)


def _saving(help: str, *names: str, **more: Any) -> Any:
    return option("Checkpoints and logs", help, *names, **more)


_DIR, _FILE = {"metavar": "DIR"}, {"metavar": "FILE"}


@dataclass(frozen=True)
class Options:
    """A run. Sizes count tokens, samples and iterations; an iteration is one update of the weights from one global batch."""

    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Text files, .jsonl files with a \"text\" in each line, "
                                               "token files (.bin beside .json), or Megatron-LM's (.bin beside .idx).")]
    tokenizer: Annotated[Path | None, _data("Directory with tokenizer.json, or vocab.json and merges.txt.", **_DIR)] = None
    vocab_file: Annotated[Path | None, _data("GPT-2 vocabulary (gpt2-vocab.json).", **_FILE)] = None
    merges_file: Annotated[Path | None, _data("GPT-2 merges (gpt2-merges.txt).", **_FILE)] = None
    data_cache: Annotated[Path | None, _data("Where token files of texts are kept; by default beside the texts.", **_DIR)] = None
    seq_length: Annotated[int, _data("Tokens in a sample.", min=1)] = 1024
    valid_data: Annotated[list[Path], _data("Score the model on this data. Repeatable.", metavar="DATA")] = field(
        default_factory=list)
    valid_fraction: Annotated[float, _data("Keep this part of the samples, the last ones, for scoring.", min=0, max=0.9)] = 0.0
    eval_interval: Annotated[int, _data("Score every so many iterations, and at the end.", min=1)] = 100
    eval_batches: Annotated[int, _data("Score on at most so many global batches.", min=1)] = 10

    model: Annotated[Path | None, _model("Start from this checkpoint, Megatron-LM's or Hugging Face's, instead of from scratch.",
                                         metavar="PATH")] = None
    config: Annotated[Path | None, _model("A config.json with what the checkpoint can't tell.", **_FILE)] = None
    num_layers: Annotated[int | None, _model("From scratch; 24 unless given.", min=1)] = None
    hidden_size: Annotated[int | None, _model("From scratch; 1024 unless given.", min=1)] = None
    num_attention_heads: Annotated[int | None, _model("From scratch; 16 unless given.", min=1)] = None
    max_position_embeddings: Annotated[int | None, _model("From scratch; --seq-length unless given.", min=1)] = None
    vocab_size: Annotated[int | None, _model("From scratch; the tokenizer's unless given.", min=1)] = None
    pad_vocab_to: Annotated[int, _model("From scratch: rows of the token table are a multiple of this.", min=1)] = 128
    hidden_dropout: Annotated[float | None, _model("Also of the embeddings; 0.1 or the checkpoint's unless given.", min=0,
                                                   max=1)] = None
    attention_dropout: Annotated[float | None, _model("0.1 or the checkpoint's unless given.", min=0, max=1)] = None
    attention: Annotated[Attention, _model("Fused softmax, or PyTorch's scaled_dot_product_attention.")] = Attention.softmax
    fuse_linear_loss: Annotated[bool, _model("Never hold the logits.", "--fuse-linear-loss")] = False

    iterations: Annotated[int, _optimizer("Updates of the weights, those before a resume included.", min=0)] = 1000
    micro_batch_size: Annotated[int, _optimizer("Samples that a replica computes at a time.", min=1)] = 4
    global_batch_size: Annotated[int | None, _optimizer("Samples of an update; the micro batch on every replica unless given. What "
                                                        "is more is accumulated, or sent through the pipeline.", min=1)] = None
    lr: Annotated[float, _optimizer("Highest learning rate.", min=0)] = 1.5e-4
    min_lr: Annotated[float, _optimizer("Learning rate at the end of the decay.", min=0)] = 1e-5
    warmup: Annotated[int, _optimizer("Iterations in which the learning rate rises from 0.", min=0)] = 0
    decay: Annotated[Decay, _optimizer("How it falls then.")] = Decay.cosine
    decay_iterations: Annotated[int | None, _optimizer("Where --min-lr is reached; --iterations unless given.", min=1)] = None
    weight_decay: Annotated[float, _optimizer("Of matrices and tables; none of biases and layer norms.", min=0)] = 0.01
    beta1: Annotated[float, _optimizer("AdamW's.", min=0, max=1)] = 0.9
    beta2: Annotated[float, _optimizer("AdamW's.", min=0, max=1)] = 0.999
    eps: Annotated[float, _optimizer("AdamW's.", min=0)] = 1e-8
    clip_grad: Annotated[float, _optimizer("Largest norm of the gradients; 0 leaves them as they are.", min=0)] = 1.0
    dtype: Annotated[DType, _optimizer("Of the products; parameters and optimizer stay float32.")] = DType.float32
    recompute: Annotated[bool, _optimizer("Keep only each layer's input for the backward, and run the layer again there.",
                                          "--recompute")] = False
    seed: Annotated[int, _optimizer("Of initial weights, order of the samples and dropout.", min=0, max=2**31 - 1)] = 1234
    device: Annotated[str | None, _optimizer("cpu or cuda; by default cuda where there is one.")] = None

    tensor_parallel: Annotated[int, _ranks("Ranks that share every layer.", min=1)] = 1
    sequence_parallel: Annotated[bool, _ranks("They also share what is between the products, along the sequence.",
                                              "--sequence-parallel")] = False
    pipeline_parallel: Annotated[int, _ranks("Ranks that share the layers out.", min=1)] = 1
    schedule: Annotated[str, _ranks("Of the pipeline: GPipe, 1F1B, Interleaved1F1B, ZBVZeroBubble, ...")] = "1F1B"
    data_parallel: Annotated[Replicas, _ranks("How the replicas, the ranks that are left, keep the model.")] = Replicas.ddp

    save: Annotated[Path | None, _saving("Write checkpoints into this directory of the run.", **_DIR)] = None
    save_interval: Annotated[int | None, _saving("Write one every so many iterations; one is written at the end in any case.",
                                                 min=1)] = None
    keep: Annotated[int | None, _saving("Keep only the last so many.", min=1)] = None
    resume: Annotated[bool, _saving("Go on from the last checkpoint in --save; start anew where there is none yet.",
                                    "--resume")] = False
    export_huggingface: Annotated[Path | None, _saving("At the end, write the model for Hugging Face.", **_DIR)] = None
    export_megatron: Annotated[Path | None, _saving("At the end, write the model for Megatron-LM.", **_DIR)] = None
    export_dtype: Annotated[DType, _saving("Of exported weights.")] = DType.float32
    export_tensor_parallel: Annotated[int, _saving("Of --export-megatron.", min=1)] = 1
    export_pipeline_parallel: Annotated[int, _saving("Of --export-megatron.", min=1)] = 1
    log_interval: Annotated[int, _saving("Print a line every so many iterations.", min=1)] = 10
    log_csv: Annotated[Path | None, _saving("Write a row for every iteration.", **_FILE)] = None
    tensorboard: Annotated[Path | None, _saving("Write scalars for TensorBoard; needs the tensorboard package.", **_DIR)] = None

    def check(self) -> None:
        """Raise ValueError for options that contradict each other, before anything is read or written."""
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
        given = [f"--{name.replace('_', '-')}" for name in sizes if getattr(self, name) is not None]
        for wrong, message in (
            (self.model and given, f"{', '.join(given)}: the sizes are those of --model"),
            (self.config and not self.model, "--config is for --model"),
            (self.valid_data and self.valid_fraction, "give --valid-data or --valid-fraction, not both"),
            (self.min_lr > self.lr, f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}"),
            (self.iterations and self.warmup >= self.last_decay and self.decay is not Decay.constant,
             f"--warmup {self.warmup} must be below the {self.last_decay} iterations of the decay"),
            (max(self.beta1, self.beta2) >= 1, f"--beta1 and --beta2 must be below 1, got {self.beta1:g} and {self.beta2:g}"),
            (self.sequence_parallel and self.tensor_parallel == 1, "--sequence-parallel needs --tensor-parallel"),
            (self.sequence_parallel and self.seq_length % self.tensor_parallel,
             f"--seq-length {self.seq_length} is not a multiple of --tensor-parallel {self.tensor_parallel}, which "
             "--sequence-parallel needs"),
            (self.pipeline_parallel > 1 and self.dtype is DType.float16,
             "--dtype float16 has no loss scaling in a pipeline; use bfloat16 with --pipeline-parallel"),
            (self.pipeline_parallel > 1 and self.fuse_linear_loss,
             "--fuse-linear-loss: the last stage of a pipeline forms the logits; leave it out with --pipeline-parallel"),
            (not self.save and (self.save_interval or self.keep or self.resume),
             "--save-interval, --keep and --resume need --save"),
            (self.device not in (None, "cpu", "cuda"), f"--device must be cpu or cuda, got {self.device!r}")):
            if wrong:
                raise ValueError(message)
        if not self.resume:
            for path in (self.export_huggingface, self.export_megatron):
                if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
                    raise ValueError(f"{path}: exists and is not empty; the model is exported to a new directory")
            if self.save is not None and any(self.save.glob("step_*")):
                raise ValueError(f"{self.save}: has checkpoints; go on from the last with --resume, or save elsewhere")
            if self.log_csv is not None and self.log_csv.exists():
                raise ValueError(f"{self.log_csv}: exists; --resume continues it")

    @property
    def scores(self) -> bool:
        return bool(self.valid_data) or self.valid_fraction > 0

    @property
    def last_decay(self) -> int:
        """The iteration after which the learning rate is the lowest."""
        return self.decay_iterations or self.iterations
