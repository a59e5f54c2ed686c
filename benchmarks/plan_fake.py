"""A rank of a run that does not exist: torch's fake process group and fake tensors, which have shapes and no memory.

Everything that benchmarks.plan needs of torch's private modules, and what it puts in the place of parts that look at values, is in
this file. The step that runs is `Training`'s own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_kernels import linear
from megatron_kernels.models import blocks
from megatron_kernels.parallel import data, pipeline

from .trainer import Settings, Training

TARGETS = ("gpu", "cpu")


class Mode(TorchDispatchMode):
    """A dispatch mode whose `run(func, args, kwargs)` makes the ops on local tensors: those on DTensors are taken apart first."""

    run: Callable[[Any, Any, Any], Any]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented
        return self.run(func, args, kwargs or {})


@contextlib.contextmanager
def rank_of(settings: Settings, world: int, rank: int, target: str, mode: Mode) -> Iterator[Training]:
    """This process as one rank of `world`, with the run's model and optimizer; inside, tensors are fake, and `mode` sees every op.

    target "gpu" takes the paths of a GPU where ours differ by device (whole products instead of blocks, torch's own library for
    them, the fused optimizer); the tensors are CPU ones, as torch's autograd engine wants a driver for others. The optimizer has
    its state, as it has from the second step on. Afterwards the process group is gone.

    Raises ValueError as Settings, Training and what they are made of; RuntimeError inside a process that has a process group.
    """
    if dist.is_initialized():
        raise RuntimeError("benchmarks.plan: torch.distributed is initialised in this process, which is to be a single one")
    settings.replicas(world)
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, other in _replaced(target):
                stack.enter_context(mock.patch.object(owner, name, other))
            mesh = settings.mesh("cpu")  # real: its ranks are read
            stack.enter_context(FakeTensorMode())
            stack.enter_context(mode)
            training = Training(settings, mesh, torch.device("cpu"))
            for model in training.pipeline.models:
                if isinstance(model, DistributedDataParallel):
                    _make_traceable(model)
            if target == "gpu":
                training.optimizer = torch.optim.AdamW(training.pipeline.parameters(), lr=settings.learning_rate, fused=True)
            _fill(training.optimizer)
            yield training
    finally:
        dist.destroy_process_group()


def _replaced(target: str) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) of what has to be another here."""
    found: list[tuple[Any, str, Any]] = [
        (nn.Module, "to_empty", _to_empty),
        # There is nothing to compare: fake weights have no bits.
        (data, "check_same_weights", lambda *args: None), (pipeline, "check_same_weights", lambda *args: None)]
    if hasattr(schedules._PipelineSchedule, "_warmup_p2p"):
        found.append((schedules._PipelineSchedule, "_warmup_p2p", _agreed))
    if target == "gpu":
        found += [(blocks, "applies", lambda qkv: False), (linear, "_ordinary", lambda x: True)]
    return found


def _agreed(self: Any, stages: list[Any], *args: Any) -> None:
    """Stages vote whether all know their shapes, and read the result. They do: `parallel.Pipeline` tells them."""
    for stage in stages:
        stage._inference_mode = schedules.InferenceMode.STATIC


def _to_empty(self: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
    """torch's own swaps the contents of tensors, which it can't do for fake ones."""
    for module in self.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    return self


def _fill(optimizer: torch.optim.Optimizer) -> None:
    """A step on empty gradients, for the state it leaves."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


class _Reducer:
    """DDP's reducer without what reads values or clocks: its buckets stay those of the first step."""

    def __init__(self, reducer: Any):
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def prepare_for_forward(self) -> None:
        pass

    def _rebuild_buckets(self) -> bool:
        return False


def _make_traceable(model: DistributedDataParallel) -> None:
    """Let the buckets that DDP fills be reduced where a dispatch mode sees it."""
    def hook(group, bucket):  # DDP compares annotations, which are strings in this file, with its types
        dist.all_reduce(bucket.buffer(), group=group)
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(model.process_group, hook)
    model.reducer = _Reducer(model.reducer)  # type: ignore[assignment]


def later_buckets(model: DistributedDataParallel, arrived: list[nn.Parameter]) -> list[int]:
    """Bytes of DDP's buckets from the second step on, when they are in the order in which gradients arrived in the first."""
    first = dist._DEFAULT_FIRST_BUCKET_BYTES if model.bucket_bytes_cap_default else model.bucket_bytes_cap
    indices, _ = dist._compute_bucket_assignment_by_size(
        list[Tensor](arrived), [first, model.bucket_bytes_cap], [], list(range(len(arrived))))
    return [sum(arrived[i].numel() * arrived[i].element_size() for i in bucket) for bucket in indices]


def group_name(argument: Any) -> str | None:
    """The name of the process group that a collective's argument is, if it is one."""
    if isinstance(argument, torch.ScriptObject):
        with contextlib.suppress(RuntimeError, TypeError):
            return dist.ProcessGroup.unbox(argument).group_name
    return None


def in_backward() -> bool:
    """Whether autograd's engine runs, in this thread."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def resizes(note: Callable[[Tensor, int], None]) -> Iterator[None]:
    """Inside, note(storage, bytes) is told of storages that are resized, which is how FSDP2 frees gathered weights."""
    resize = torch.UntypedStorage.resize_

    def wrapped(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        note(storage, size)
        return result

    with mock.patch.object(torch.UntypedStorage, "resize_", wrapped):
        yield
