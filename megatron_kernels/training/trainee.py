"""The model under training: made or loaded, spread over the ranks, and its forward and backward on a global batch."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from .. import checkpoint, parallel
from ..models import GPT2, GPT2Config
from .data import Batches, Samples
from .options import DType, Options, Replicas
from .prepare import device_type
from .schedule import decay_groups
from .tokens import Tokens


class Trainee:
    """A model, or this rank's stages of one, and its optimizer."""

    def __init__(self, options: Options, config: GPT2Config, source: checkpoint.Checkpoint | None, batches: Batches,
                 mesh: DeviceMesh | None):
        self.options, self.config, self.batches, self.mesh = options, config, batches, mesh
        kind = mesh.device_type if mesh is not None else device_type(options)
        self.device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        self.pipeline: parallel.Pipeline | None = None
        if options.pipeline_parallel > 1:
            assert mesh is not None
            self.pipeline = parallel.Pipeline(config, mesh, microbatches=self.batches.pieces, schedule=options.schedule,
                                              sequence_parallel=options.sequence_parallel, device=self.device, seed=options.seed,
                                              activation_checkpointing=options.recompute, hidden_dtype=self._hidden_dtype())
            for stage in self.pipeline.stages if source is not None else ():
                stage.load_state_dict(self._load(source, stage.stage).state_dict())
            self.pipeline.wrap_with(self._wrapped)
            self.models = self.pipeline.models
        else:
            if source is not None:
                model = self._load(source, (0, 1)).to(self.device).train()
            else:
                model = GPT2(config, mesh, sequence_parallel=options.sequence_parallel, device=self.device, seed=options.seed)
            model.activation_checkpointing = options.recompute
            self.models = [self._wrapped(model)]
        self.parts = [part for model in self.models for part in model.modules() if isinstance(part, GPT2)]
        self.optimizer = torch.optim.AdamW(decay_groups(self.models, options.weight_decay), lr=options.lr,
                                           betas=(options.beta1, options.beta2), eps=options.eps)
        self.seed(options.seed)

    def _load(self, source: checkpoint.Checkpoint | None, stage: tuple[int, int]) -> GPT2:
        assert source is not None
        model = GPT2.from_checkpoint(dataclasses.replace(source, config=self.config), torch.float32, mesh=self.mesh, stage=stage,
                                     sequence_parallel=self.options.sequence_parallel)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # not a view of the file
        return model

    def _hidden_dtype(self) -> torch.dtype:
        """Autocast leaves the residual stream in float32; under FSDP2 everything is in the dtype."""
        return getattr(torch, self.options.dtype.value) if self.options.data_parallel is Replicas.fsdp else torch.float32

    def _wrapped(self, model: GPT2) -> nn.Module:
        """Mixed precision, and replicas: autocast with DDP, or FSDP2's own policy."""
        dtype, mixed = getattr(torch, self.options.dtype.value), self.options.dtype is not DType.float32
        if self.options.data_parallel is Replicas.fsdp:
            assert self.mesh is not None
            policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)} if mixed else {}
            return parallel.data_parallel(model, self.mesh, "fsdp", **policy)
        if mixed:
            model.forward = torch.autocast(self.device.type, dtype)(model.forward)  # type: ignore[method-assign]
        return parallel.data_parallel(model, self.mesh, "ddp") if self.mesh is not None and self.batches.replicas > 1 else model

    def described(self, samples: Samples) -> str:
        """What is trained on what, for people."""
        config, batches, mesh = self.config, self.batches, self.mesh
        sizes = " x ".join(f"{name} {mesh.size(number)}" for number, name in enumerate(mesh.mesh_dim_names or ())
                           if mesh.size(number) > 1) if mesh is not None else ""
        return (f"{config.num_layers} layers, {config.hidden_size} hidden, {config.num_attention_heads} heads, vocabulary "
                f"{config.vocab_size:,}, {self.options.dtype.value} on {self.device.type}{', ' if sizes else ''}{sizes}\n"
                f"{len(samples.tokens):,} tokens; {samples.count:,} samples of {samples.seq_length} to train on; "
                f"{self.options.iterations} iterations of {batches.global_batch} are "
                f"{self.options.iterations * batches.global_batch / samples.count:.3g} epochs")

    def seed(self, value: int) -> None:
        """Seed dropout."""
        for part in self.parts:
            parallel.seed(value, self.mesh, part)

    def forward_backward(self, pieces: list[Tensor], scale: float = 1.0) -> Tensor:
        """Gradients of scale times the mean loss of this replica's pieces [b, seq + 1], averaged over replicas; the mean loss."""
        pieces = [piece.to(self.device) for piece in pieces]
        self.optimizer.zero_grad()
        if self.pipeline is not None:
            whole = torch.cat(pieces)
            return self.pipeline.step(whole[:, :-1], whole)
        model, losses = self.models[0], []
        for number, piece in enumerate(pieces, 1):
            with parallel.no_sync(model) if number < len(pieces) else contextlib.nullcontext():
                loss = model(piece[:, :-1], labels=piece)
                (loss * (scale / len(pieces))).backward()
            losses.append(loss.detach())
        parallel.finish_gradients(model)
        return torch.stack(losses).mean()

    def clip(self, scale: float = 1.0) -> float:
        """Take the scale out of the gradients and clip them; the norm they had, over all ranks."""
        if scale != 1.0:
            for part in self.parts:
                for parameter in part.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(1 / scale)
        return parallel.clip_grad_norm_(self.models, self.options.clip_grad or float("inf"), self.mesh).item()

    @torch.no_grad()
    def evaluate(self, pieces: list[Tensor]) -> Tensor:
        """The mean loss of this replica's pieces, without dropout."""
        pieces = [piece.to(self.device) for piece in pieces]
        if self.pipeline is not None:
            whole = torch.cat(pieces)
            return self.pipeline.evaluate(whole[:, :-1], whole)
        model = self.models[0].eval()
        losses = [model(piece[:, :-1], labels=piece) for piece in pieces]
        model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):  # without a backward what was gathered would stay
                module.reshard()
        return torch.stack(losses).mean()

    def together(self, *values: float) -> list[float]:
        """The sums over all ranks."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    @property
    def ranks(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    def export(self, tokenizer: checkpoint.Tokenizer | None) -> list[Path]:
        """Write what --export-... asks for; all ranks together. A run that was resumed replaces what it wrote before."""
        options = self.options
        common: dict[str, Any] = {"dtype": getattr(torch, options.export_dtype.value), "tokenizer": tokenizer,
                                  "force": options.resume}
        written = []
        if (path := options.export_huggingface) is not None:
            checkpoint.write_together(self.parts, self.config, self.mesh,
                                      lambda whole: checkpoint.save_huggingface(whole, path, **common))
            written.append(path)
        if (other := options.export_megatron) is not None:
            checkpoint.write_together(self.parts, self.config, self.mesh, lambda whole: checkpoint.save_megatron(
                whole, other, tensor_parallel=options.export_tensor_parallel,
                pipeline_parallel=options.export_pipeline_parallel, **common))
            written.append(other)
        return written


def batches_of(options: Options, replicas: parallel.Group) -> Batches:
    """How the global batch is shared out. Raises ValueError where the replicas' micro batches do not divide it."""
    together = options.micro_batch_size * replicas.size
    whole = options.global_batch_size or together
    if whole % together:
        raise ValueError(f"--global-batch-size {whole} is not a multiple of --micro-batch-size {options.micro_batch_size} x "
                         f"{replicas.size} replicas")
    return Batches(whole, options.micro_batch_size, replicas.size, replicas.rank)


def config_of(options: Options, source: checkpoint.Checkpoint | None, tokens: Tokens,
              tokenizer: checkpoint.Tokenizer | None) -> GPT2Config:
    """The configuration: the checkpoint's, or the one asked for. Raises ValueError for a vocabulary nobody has told."""
    dropouts = {"hidden_dropout": options.hidden_dropout, "embedding_dropout": options.hidden_dropout,
                "attention_dropout": options.attention_dropout}
    choices: dict[str, Any] = {"attention": options.attention.value, "fuse_linear_loss": options.fuse_linear_loss,
                               **{name: value for name, value in dropouts.items() if value is not None}}
    if source is not None:
        return dataclasses.replace(source.expect(GPT2Config), **choices)
    known = [file.vocab_size for file in tokens.files if file.vocab_size]
    if tokenizer is not None:
        known.append(max(tokenizer.load().get_vocab().values(), default=-1) + 1)
    vocab_size, end = options.vocab_size or max(known, default=0), None if tokenizer is None else tokenizer.end_of_text
    if not vocab_size:
        raise ValueError("the data does not tell its vocabulary: give --vocab-size or a tokenizer")
    sizes: dict[str, Any] = {"num_layers": options.num_layers, "hidden_size": options.hidden_size,
                             "num_attention_heads": options.num_attention_heads}
    return GPT2Config(max_position_embeddings=options.max_position_embeddings or options.seq_length, vocab_size=vocab_size,
                      padded_vocab_size=-(-vocab_size // options.pad_vocab_to) * options.pad_vocab_to, bos_token_id=end,
                      eos_token_id=end, **{name: value for name, value in sizes.items() if value is not None}, **choices)
