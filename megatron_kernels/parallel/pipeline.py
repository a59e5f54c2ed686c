"""Pipeline parallelism: stages of a GPT-2 on the schedules of torch.distributed.pipelining."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .collectives import broadcast, receive, send
from .data import check_same_weights, no_sync
from .failures import failures, is_of_another_rank
from .gradients import finish_gradients, local, unfinished
from .group import agreed_seed, group_of
from .layers import split_backward

if TYPE_CHECKING:
    from ..models.config import GPT2Config
    from ..models.gpt2 import GPT2

IGNORE = -100


class _Kind(NamedTuple):
    """A schedule's class, its stages a rank, whether the last stage comes back to the first rank (a V), and whether the gradients
    of inputs and of weights are computed at different times."""

    type: Any
    stages: int
    v: bool
    split: bool


_KINDS = {name: _Kind(getattr(torch_schedules, f"Schedule{name}"), stages, v, split) for name, stages, v, split in (
    ("GPipe", 1, False, False), ("1F1B", 1, False, False), ("LoopedBFS", 2, False, False), ("Interleaved1F1B", 2, False, False),
    ("InterleavedZeroBubble", 2, False, True), ("ZBVZeroBubble", 2, True, True), ("DualPipeV", 2, True, True))
    if hasattr(torch_schedules, f"Schedule{name}")}
# Newer versions of torch would join the logits of all microbatches.
_NO_OUTPUTS = {"return_outputs": False} if "return_outputs" in signature(torch_schedules.ScheduleGPipe.step).parameters else {}


class Pipeline:
    """A GPT-2 cut into stages along its layers, and the schedule that sends microbatches through them.

    `stages` are this rank's GPT2 stages, in order, `models` what `wrap` made of them; `parameters()` are what the rank's
    optimizer gets. Load weights into `stages` before wrapping, by making the pipeline without `wrap` and calling `wrap_with`.

    Args:
        config: of the whole model.
        mesh: its dimension "pp" has the stages, "tp" and "dp" as in `GPT2` and `data_parallel`. With one pipeline rank `step` is
            gradient accumulation over the microbatches.
        microbatches: the pieces that `step` cuts its batch into.
        schedule: "GPipe" and "1F1B" have one stage a rank; "LoopedBFS", "Interleaved1F1B" and "InterleavedZeroBubble" two, of
            which rank r has r and r + size; "ZBVZeroBubble" and "DualPipeV" two, in a V, the first rank having the first stage and
            the last. Those that the installed torch lacks are unknown here.
        sequence_parallel, device, dtype, seed, activation_checkpointing: as in `GPT2`.
        wrap: called with each stage, such as `lambda stage: data_parallel(stage, mesh, "fsdp")`. DDP serves the schedules that do
            one backward a microbatch, FSDP2 all of them.
        hidden_dtype: of what stages hand on, where that is not dtype (mixed precision by FSDP2 or autocast).

    Raises ValueError: an unknown schedule, stages that do not divide the layers, microbatches that the schedule does not take,
    DDP or torch.compile under a schedule that splits the backward, and as `GPT2` and `wrap`.
    """

    def __init__(self, config: GPT2Config, mesh: DeviceMesh, *, microbatches: int, schedule: str = "1F1B",
                 sequence_parallel: bool = False, device=None, dtype: torch.dtype | None = None, seed: int | None = None,
                 wrap: Callable[[GPT2], nn.Module] | None = None, activation_checkpointing: bool = False,
                 hidden_dtype: torch.dtype | None = None):
        from ..models.gpt2 import GPT2  # which is made of this package's layers
        if schedule not in _KINDS:
            raise ValueError(f"Pipeline: schedule must be one of {', '.join(_KINDS)}, got {schedule!r}")
        if microbatches < 1:
            raise ValueError(f"Pipeline: microbatches must be at least 1, got {microbatches}")
        self.config, self.mesh, self.microbatches, self.schedule = config, mesh, microbatches, schedule
        self.group, self._kind = group_of(mesh, "pp"), _KINDS[schedule]
        size, rank = self.group.size, self.group.rank
        self.stage_count = size * self._kind.stages if size > 1 else 1
        if config.num_layers % self.stage_count:
            raise ValueError(f"Pipeline: schedule {schedule!r} on {size} ranks has {self.stage_count} stages, which do not divide "
                             f"num_layers {config.num_layers}")
        numbers = [rank, 2 * size - 1 - rank] if self._kind.v else [rank + i * size for i in range(self._kind.stages)]
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
        seed = agreed_seed(mesh) if seed is None else seed
        self.stages = [GPT2(config, mesh, sequence_parallel=sequence_parallel, stage=(number, self.stage_count), device=device,
                            dtype=dtype, seed=seed, activation_checkpointing=activation_checkpointing)
                       for number in (numbers if size > 1 else [0])]
        self.hidden_dtype = hidden_dtype or next(self.stages[0].parameters()).dtype
        self.models: list[nn.Module] = list(self.stages)
        self._shape: tuple[int, int] | None = None
        self._total = torch.ones(())
        self._prepare_any()
        if wrap is not None:
            self.wrap_with(wrap)

    def wrap_with(self, wrap: Callable[[GPT2], nn.Module]) -> None:
        """Put wrap(stage) in the place of every stage; the weights of all ranks are compared first."""
        check_same_weights(self.stages, self.mesh)
        self.models = [wrap(stage) for stage in self.stages]
        if self.group.size > 1 and self._kind.split and any(isinstance(m, DistributedDataParallel) for m in self.models):
            raise ValueError(f"Pipeline: DDP sees no weight's gradient of schedule {self.schedule!r}, which computes them apart "
                             "from the inputs'; use FSDP2, data_parallel(kind='fsdp')")
        for model in self.models if self.group.size > 1 else ():
            if isinstance(model, FSDPModule):  # gathered weights stay: a split backward looks for them before it begins
                model.set_reshard_after_forward(False)
        self._prepare_any()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all stages of this rank; a tied token table is in the first stage's and in the last's."""
        for stage in self.stages:
            yield from stage.parameters()

    def step(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward of one batch; gradients are added to the parameters', finished: `finish_gradients` is called here.

        Clipping is next (`clip_grad_norm_`), or the optimizer.

        Args:
            input_ids, labels: [b, s] (labels also [b, s + 1]), as GPT2 takes them, b a multiple of microbatches; the same on every
                pipeline and tensor-parallel rank, each data-parallel replica having its own.

        Returns:
            The mean loss over all scored labels of the batch, however they are spread over the microbatches, without a graph: a
            float32 scalar (float64 for float64), the same on every pipeline and tensor-parallel rank, each replica's own.

        Raises ValueError for a batch that does not fit; CollectiveError when another rank has stopped.
        """
        b, s = self._check(input_ids, labels)
        target = F.pad(labels[:, 1:], (0, s + 1 - labels.shape[1]), value=IGNORE)
        self._total = (target != IGNORE).sum().clamp(min=1)
        # What an earlier step left has been finished: it must not be summed again.
        earlier = [(parameter, parameter.grad) for parameter in unfinished(self.stages) if parameter.grad is not None]
        for parameter, _ in earlier:
            parameter.grad = None
        loss = self._accumulate(input_ids, labels, target) if self.group.size == 1 else self._run(input_ids, target, b, s)
        finish_gradients(*self.models)
        with torch.no_grad():
            for parameter, gradient in earlier:
                local(parameter.grad).add_(local(gradient))  # type: ignore[arg-type]
        return loss

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch in evaluation mode, without gradients; arguments, result and errors as of `step`.

        Microbatches follow each other through the stages, whatever the schedule: without a backward there is nothing to arrange.
        """
        _, s = self._check(input_ids, labels)
        target = F.pad(labels[:, 1:], (0, s + 1 - labels.shape[1]), value=IGNORE)
        self._total = (target != IGNORE).sum().clamp(min=1)
        modes = [(model, model.training) for model in self.models]
        for model, _ in modes:
            model.eval()
        try:
            with failures(self.mesh):
                losses = [self._forward(ids, labels, shifted) for ids, labels, shifted
                          in zip(*(x.chunk(self.microbatches) for x in (input_ids, labels, target)), strict=True)]
        finally:
            for model, mode in modes:
                model.train(mode)
                for module in model.modules():
                    if isinstance(module, FSDPModule):  # or what was gathered would outlive the next change of the weights
                        module.reshard()
        return broadcast(torch.stack(losses).sum(), self.group, self._last)

    def _forward(self, ids: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """A microbatch's part of the mean on the last stage's rank, 0 on others. Every rank goes through its stages in their
        order, microbatch after microbatch, so that no two wait for each other."""
        loss = torch.zeros((), dtype=torch.promote_types(self.hidden_dtype, torch.float32), device=ids.device)
        if self.group.size == 1:
            return self.models[0](ids, labels=labels).to(loss.dtype) * (target != IGNORE).sum() / self._total
        for stage, model in zip(self.stages, self.models, strict=True):
            x = ids if stage.is_first else self._received(ids, stage.stage[0])
            x = model(x)
            if stage.is_last:
                loss = self._loss(x, target)
            else:
                self._hand_on(x, stage.stage[0] + 1)
        return loss

    def _rank_of(self, number: int) -> int:
        """The rank in the group that has this stage."""
        size = self.group.size
        return 2 * size - 1 - number if self._kind.v and number >= size else number % size

    @property
    def _last(self) -> int:
        return self._rank_of(self.stage_count - 1)

    def _hand_on(self, x: Tensor, number: int) -> None:
        if self._rank_of(number) == self.group.rank:
            self._kept = x
        else:
            send(x, self.group, self._rank_of(number))

    def _received(self, ids: Tensor, number: int) -> Tensor:
        if self._rank_of(number - 1) == self.group.rank:
            return self._kept
        own = self.stages[0]
        s = ids.shape[1] // own.tensor_group.size if own.sequence_parallel else ids.shape[1]
        x = torch.empty(ids.shape[0], s, self.config.hidden_size, dtype=self.hidden_dtype, device=ids.device)
        return receive(x, self.group, self._rank_of(number - 1))

    def _check(self, input_ids: Tensor, labels: Tensor) -> tuple[int, int]:
        for name, ids in (("input_ids", input_ids), ("labels", labels)):
            fits = ids.shape == input_ids.shape or (ids is labels and ids.dim() == 2 and ids[:, 1:].shape == input_ids.shape)
            if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not fits:
                raise ValueError(f"Pipeline: {name} must be [b, s] of int64 or int32, of one shape, got {list(ids.shape)} of "
                                 f"{str(ids.dtype).removeprefix('torch.')}")
        b, s = input_ids.shape
        group = self.stages[0].tensor_group
        if b == 0 or b % self.microbatches:
            raise ValueError(f"Pipeline: the batch must be a multiple of microbatches={self.microbatches}, got {b} rows")
        if s > self.config.max_position_embeddings:
            raise ValueError(f"Pipeline: {s} tokens are more than max_position_embeddings "
                             f"{self.config.max_position_embeddings}")
        if self.stages[0].sequence_parallel and s % group.size:
            raise ValueError(f"Pipeline: sequence_parallel needs a sequence that is a multiple of the {group.size} "
                             f"tensor-parallel ranks, got {s} tokens")
        return b, s

    def _accumulate(self, input_ids: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """One pipeline rank: the microbatches one after the other, replicas being averaged in the last one's backward."""
        pieces = list(zip(*(x.chunk(self.microbatches) for x in (input_ids, labels, target)), strict=True))
        losses = []
        for i, (ids, own, shifted) in enumerate(pieces):
            with no_sync(*self.models) if i < len(pieces) - 1 else contextlib.nullcontext():
                loss = self.models[0](ids, labels=own) * (shifted != IGNORE).sum() / self._total
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _run(self, input_ids: Tensor, target: Tensor, b: int, s: int) -> Tensor:
        if self._shape != (b, s):
            self._prepare(b, s)
        first, last = self.stages[0].is_first, self.stages[-1].is_last
        losses: list[Tensor] = []
        try:
            with split_backward() if self._kind.split else contextlib.nullcontext():
                self._torch_schedule.step(*([input_ids] if first else []), target=target if last else None, losses=losses,
                                          **_NO_OUTPUTS)
        except RuntimeError as error:
            with failures(self.mesh):
                raise _root(error)  # noqa: B904
        loss = (torch.stack(losses).sum() if losses
                else torch.zeros((), dtype=torch.promote_types(self.hidden_dtype, torch.float32), device=input_ids.device)).detach()
        return broadcast(loss, self.group, self._last)

    def _prepare_any(self) -> None:
        """For any shape, so that torch says now what it does not take."""
        if self.group.size > 1:
            self._prepare(self.microbatches, self.stages[0].tensor_group.size)

    def _prepare(self, b: int, s: int) -> None:
        """Stages and schedule for batches [b, s]. The shapes are told, so torch need not find them by running the model."""
        rows, own = b // self.microbatches, self.stages[0]
        tp = own.tensor_group
        hidden = torch.empty(rows, s // tp.size if own.sequence_parallel else s, self.config.hidden_size, device="meta",
                             dtype=self.hidden_dtype, requires_grad=True)
        start, stop = tp.range(self.config.padded_vocab_size)
        ids = torch.empty(rows, s, device="meta", dtype=torch.int64)
        logits = torch.empty(rows * s, stop - start, device="meta", dtype=self.hidden_dtype, requires_grad=True)
        stages = [PipelineStage(model, stage.stage[0], self.stage_count, next(stage.parameters()).device,
                                input_args=(ids if stage.is_first else hidden,), output_args=(logits if stage.is_last else hidden,),
                                group=self.group.process_group)
                  for stage, model in zip(self.stages, self.models, strict=True)]
        try:
            self._torch_schedule = self._kind.type(stages[0] if self._kind.stages == 1 else stages, self.microbatches,
                                                   loss_fn=self._loss, scale_grads=False)
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(f"Pipeline: schedule {self.schedule!r} on {self.group.size} ranks refuses these stages with "
                             f"microbatches={self.microbatches}: {error}") from error
        self._shape = (b, s)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """A microbatch's part of the batch's mean."""
        return self.stages[-1].loss_of_logits(logits, target.reshape(-1), "sum") / self._total


def _root(error: RuntimeError) -> BaseException:
    """The reason of an error of a schedule: torch wraps what a stage raises."""
    cause: BaseException | None = error
    while cause is not None:
        if is_of_another_rank(cause):
            return cause
        cause = cause.__cause__
    return error
