"""The training step that benchmarks.scaling times and benchmarks.plan predicts: one description of a run, and the run itself.

`Settings` says everything that decides what a step does: the model, the batch, how the ranks share them. `Training` builds the
model, what wraps it, and the optimizer; its `step()` is a whole training step on tokens that were drawn beforehand, so that no
loading of data is in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from megatron_kernels import parallel
from megatron_kernels.models import GPT2Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PADDED_TO = 128  # the token table's rows are a multiple of this times the tensor-parallel size, as in Megatron-LM


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field of Settings that is an option of the command line, too."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """What a step computes, and how its ranks share it. The data-parallel size is not here: replicas take the ranks that are left.

    Sizes are checked where they are made into a model (`GPT2`, `Pipeline`, `make_mesh`); what only this file knows is checked here,
    with ValueError.
    """

    preset: str = "tiny"
    layers: int = _option(4, "transformer layers")
    hidden: int = _option(64, "hidden size")
    heads: int = _option(4, "attention heads")
    vocab: int = _option(512, f"token classes; the table is padded to a multiple of {PADDED_TO} x tensor-parallel size")
    sequence: int = _option(64, "tokens of a sequence")
    batch: int = _option(4, "sequences of one replica and step")
    microbatches: int = _option(1, "pieces that a replica's batch is cut into: gradient accumulation, or what a pipeline works on")
    tensor_parallel: int = _option(1, "ranks that share every layer")
    sequence_parallel: bool = _option(False, "share what lies between the layers' products along the sequence, too")
    pipeline_parallel: int = _option(1, "ranks that share the layers out")
    schedule: str = _option("1F1B", "of the pipeline, as parallel.Pipeline names them")
    data_parallel: str = _option("ddp", "how replicas are kept equal", choices=("ddp", "fsdp"))
    recompute: bool = _option(False, "keep only each layer's input for the backward and run the layer again there")
    dtype: str = _option("fp32", "of parameters, products and gradients", choices=tuple(DTYPES))
    master_weights: bool = _option(False, "float32 parameters and optimizer state, products in --dtype; needs --data-parallel fsdp")
    attention: str = _option("softmax", "the fused softmax, or torch's scaled_dot_product_attention", choices=("softmax", "sdpa"))
    fuse_linear_loss: bool = _option(False, "the loss without ever holding the logits; not in a pipeline")
    dropout: float = _option(0.0, "after the embedding, in attention and after each sublayer")
    learning_rate: float = _option(1e-4, "of AdamW")
    max_norm: float = _option(1.0, "gradients are clipped to this norm")
    seed: int = _option(1, "of weights, tokens and dropout")

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"settings: {one.name} must be one of {', '.join(choices)}, got {value!r}")
            if type(one.default) is int and one.name != "seed" and value < 1:
                raise ValueError(f"settings: {one.name} must be at least 1, got {value}")
        if self.batch % self.microbatches:
            raise ValueError(f"settings: microbatches must divide the batch of a replica, {self.batch}, got {self.microbatches}")
        if self.fuse_linear_loss and self.pipeline_parallel > 1:
            raise ValueError("settings: fuse_linear_loss is not for pipeline_parallel > 1: a pipeline's last stage gives logits")
        if self.master_weights and self.data_parallel != "fsdp":
            raise ValueError(f"settings: master_weights needs data_parallel='fsdp', got {self.data_parallel!r}")
        if self.sequence_parallel and self.sequence % self.tensor_parallel:
            raise ValueError(f"settings: sequence_parallel needs a sequence that is a multiple of tensor_parallel "
                             f"{self.tensor_parallel}, got {self.sequence}")

    @property
    def config(self) -> GPT2Config:
        """The model; its padded_vocab_size is the V of the FLOP formulas."""
        step = PADDED_TO * self.tensor_parallel
        return GPT2Config(num_layers=self.layers, hidden_size=self.hidden, num_attention_heads=self.heads, vocab_size=self.vocab,
                          padded_vocab_size=-(-self.vocab // step) * step, max_position_embeddings=self.sequence,
                          hidden_dropout=self.dropout, embedding_dropout=self.dropout, attention_dropout=self.dropout,
                          attention=self.attention, fuse_linear_loss=self.fuse_linear_loss)

    def replicas(self, world: int) -> int:
        """The data-parallel size on `world` ranks; ValueError where they can't be shared out."""
        ranks = self.tensor_parallel * self.pipeline_parallel
        if world < ranks or world % ranks:
            raise ValueError(f"settings: tensor_parallel {self.tensor_parallel} x pipeline_parallel {self.pipeline_parallel} ranks "
                             f"are one replica, so the number of ranks must be a multiple of {ranks}, got {world}")
        return world // ranks

    def mesh(self, device_type: str) -> DeviceMesh:
        """The mesh over all ranks that were started; initialises torch.distributed where nobody has yet."""
        return parallel.make_mesh(tensor_parallel=self.tensor_parallel, pipeline_parallel=self.pipeline_parallel,
                                  device_type=device_type)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """What as_json gave; ValueError names what is missing or unknown."""
        names = {one.name for one in fields(cls)}
        if set(data) != names:
            raise ValueError(f"settings: missing {sorted(names - set(data)) or 'nothing'}, unknown "
                             f"{sorted(set(data) - names) or 'nothing'}")
        return cls(**data)


def _paper(name: str, layers: int, hidden: int, heads: int, tensor_parallel: int) -> Settings:
    return Settings(name, layers, hidden, heads, vocab=51200, sequence=1024, batch=8, tensor_parallel=tensor_parallel,
                    recompute=True, dtype="bf16")


def _small(name: str, layers: int, hidden: int, heads: int, tensor_parallel: int) -> Settings:
    return Settings(name, layers, hidden, heads, vocab=8192, sequence=128, batch=4, tensor_parallel=tensor_parallel)


# The paper's are Megatron-LM's, arXiv 1909.08053, table 1: activations are recomputed there, and V is 50257 padded for 8 ranks.
# The small ones grow in the same manner: about as many parameters a rank, those of the token table included.
PRESETS = {one.preset: one for one in (
    Settings(),
    _small("small-1", 4, 256, 4, 1), _small("small-2", 6, 320, 8, 2), _small("small-4", 8, 400, 8, 4),
    _small("small-8", 10, 512, 8, 8),
    _paper("1.2B", 40, 1536, 16, 1), _paper("2.5B", 54, 1920, 20, 2), _paper("4.2B", 64, 2304, 24, 4),
    _paper("8.3B", 72, 3072, 32, 8))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each setting. What is not given stays the preset's."""
    group = parser.add_argument_group("settings", "what is not given is the preset's")
    group.add_argument("--preset", choices=list(PRESETS), default="tiny", help="default: tiny")
    for one in fields(Settings):
        if "help" not in one.metadata:
            continue
        flag, text, choices = "--" + one.name.replace("_", "-"), one.metadata["help"], one.metadata.get("choices")
        if isinstance(one.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, type=type(one.default), default=None, choices=choices, help=text,
                               metavar=None if choices else one.name[0].upper())


def from_args(args: argparse.Namespace, preset: str | None = None) -> Settings:
    """The preset's settings (of `preset`, or of --preset) with what the command line gave; ValueError as Settings."""
    given = {one.name: getattr(args, one.name) for one in fields(Settings) if "help" in one.metadata}
    return replace(PRESETS[preset or args.preset], **{name: value for name, value in given.items() if value is not None})


def to_arguments(settings: Settings) -> list[str]:
    """The command line that from_args makes these settings of."""
    found = ["--preset", settings.preset]
    for one in fields(Settings):
        if "help" in one.metadata:
            value, flag = getattr(settings, one.name), one.name.replace("_", "-")
            found += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


class Training:
    """The model of some settings on this rank, what wraps it, its optimizer, and one batch of tokens.

    Collective over the mesh, whose "tp" and "pp" are the settings'. Replicas that are alone are not wrapped, except by FSDP2 where
    it makes the mixed precision. AdamW is torch's, fused on a GPU.

    Args:
        settings: what to build.
        mesh: of all ranks, as `Settings.mesh` makes it.
        device: where parameters and tokens are.
    """

    def __init__(self, settings: Settings, mesh: DeviceMesh, device: torch.device):
        self.settings, self.mesh, self.device = settings, mesh, device
        compute, kept = DTYPES[settings.dtype], torch.float32 if settings.master_weights else DTYPES[settings.dtype]
        replicas = parallel.group_of(mesh, "dp")
        wrapped = replicas.size > 1 or settings.master_weights
        self.pipeline = parallel.Pipeline(
            settings.config, mesh, microbatches=settings.microbatches, schedule=settings.schedule,
            sequence_parallel=settings.sequence_parallel, device=device, dtype=kept, seed=settings.seed,
            wrap=self._wrap if wrapped else None, activation_checkpointing=settings.recompute, hidden_dtype=compute)
        for stage in self.pipeline.stages:
            parallel.seed(settings.seed, mesh, stage)
        self.optimizer = torch.optim.AdamW(self.pipeline.parameters(), lr=settings.learning_rate, fused=device.type == "cuda")
        draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + replicas.rank)
        self.tokens = torch.randint(settings.vocab, (settings.batch, settings.sequence), generator=draw).to(device)

    def _wrap(self, stage: nn.Module) -> nn.Module:
        options: dict[str, Any] = {}
        if self.settings.data_parallel == "ddp":
            options["gradient_as_bucket_view"] = True  # gradients are the buckets that are sent, not copied into them
        elif self.settings.master_weights:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=DTYPES[self.settings.dtype], reduce_dtype=torch.float32)
        return parallel.data_parallel(stage, self.mesh, self.settings.data_parallel, **options)

    def step(self) -> Tensor:
        """Forward, backward and finish_gradients of every microbatch, clipping, the optimizer; the loss before it, a scalar.

        Gradients are gone afterwards. Raises CollectiveError where another rank has stopped.
        """
        with parallel.failures(self.mesh):
            loss = self.pipeline.step(self.tokens, self.tokens)
            parallel.clip_grad_norm_(self.pipeline.models, self.settings.max_norm, self.mesh)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss
