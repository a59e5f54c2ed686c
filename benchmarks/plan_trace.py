"""What one rank does in a training step, op by op: products, bytes, collectives, and what memory is held when."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_kernels.parallel import group_of, pipeline
from megatron_kernels.parallel.gradients import local

from . import flops, plan_fake
from .trainer import Settings, Training

# schedule: what a pipeline's stages exchange; recomputed: layers run again; update: finish_gradients, clipping, the optimizer
PHASES = ("forward", "schedule", "recomputed", "backward", "update")
KINDS = {"all_reduce": "all_reduce", "allreduce": "all_reduce", "all_gather_into_tensor": "all_gather",
         "all_gather_into_tensor_out": "all_gather", "allgather_base": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
         "reduce_scatter_tensor_out": "reduce_scatter", "reduce_scatter_base": "reduce_scatter", "broadcast": "broadcast",
         "send": "send", "isend": "send"}
SILENT = {"wait_tensor", "recv", "irecv", "barrier"}  # what is received another rank sends
OVERWRITE = {"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_", "random_"}  # do not read what they write
MEMORY = ("parameters", "gradients", "optimizer", "rest")


class Collective(NamedTuple):
    """One kind of call. bytes: of the whole tensor, which a rank has before it, or after it (all_gather). ranks: of the group."""

    phase: str
    kind: str
    group: str  # "tp", "dp", "pp"
    ranks: int
    bytes: int


class Product(NamedTuple):
    """batch products [m, k] @ [k, n]."""

    batch: int
    m: int
    n: int
    k: int
    dtype: str

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass
class Trace:
    """One rank's step. Counters say how often. memory: bytes at the peak, by MEMORY; kept: bytes of "rest" when the first
    backward begins."""

    rank: int
    place: dict[str, int]
    stages: list[tuple[int, int]]
    flops: Counter[str] = field(default_factory=Counter)  # by phase
    products: Counter[Product] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)  # bytes that ops other than products read and write, by phase
    ops: Counter[str] = field(default_factory=Counter)  # such ops, by phase
    collectives: Counter[Collective] = field(default_factory=Counter)
    memory: dict[str, int] = field(default_factory=dict)
    peak_phase: str = ""
    kept: int = 0
    parameters: int = 0  # elements

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def trace(settings: Settings, world: int, rank: int = 0, target: str = "gpu", steps: int = 1) -> Trace:
    """The last of `steps` steps of one rank of `world`, on a process that is alone. Raises as `plan_fake.rank_of`."""
    recorder = _Recorder()
    with plan_fake.resizes(recorder.memory.resized), plan_fake.rank_of(settings, world, rank, target, recorder) as training:
        recorder.attach(training)
        arrived: list[torch.nn.Parameter] = []
        for parameter in training.pipeline.parameters():
            parameter.register_post_accumulate_grad_hook(arrived.append)
        with mock.patch.object(pipeline, "finish_gradients", recorder.finishing(pipeline.finish_gradients)):
            for _ in range(steps):
                recorder.restart()
                arrived.clear()
                training.step()
        found = recorder.found
        found.rank = rank
        found.place = {name: group_of(training.mesh, name).rank for name in ("pp", "dp", "tp")}
        found.stages = [stage.stage for stage in training.pipeline.stages]
        found.parameters = sum(local(parameter).numel() for parameter in training.pipeline.parameters())
        _settle_buckets(found, training.pipeline.models, arrived)
        found.memory, found.peak_phase = recorder.memory.peak()
        found.kept = recorder.memory.kept()
    return found


def _settle_buckets(found: Trace, models: list[torch.nn.Module], arrived: list[torch.nn.Parameter]) -> None:
    """In its first step DDP has one bucket; put those of later steps in its place."""
    buckets = Counter[int]()
    for model in models:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            own = set(model.parameters())  # each microbatch has told of its gradients
            buckets += Counter(plan_fake.later_buckets(model, [one for one in dict.fromkeys(arrived) if one in own]))
    if not buckets:
        return
    first = [one for one in found.collectives if (one.phase, one.kind, one.group) == ("backward", "all_reduce", "dp")]
    sent, settled = sum(one.bytes * found.collectives[one] for one in first), sum(size * n for size, n in buckets.items())
    if sent != settled:
        raise RuntimeError(f"benchmarks.plan: DDP reduced {sent} bytes in the trace, and its buckets have {settled}")
    for one in first:
        del found.collectives[one]
    found.collectives.update({first[0]._replace(bytes=size): n for size, n in buckets.items()})


class _Recorder(plan_fake.Mode):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.formulas = _Memory(), flops.counter().flop_registry
        self.groups: dict[str, tuple[str, int]] = {}
        self.found, self.after, self.again = Trace(0, {}, []), False, False

    def attach(self, training: Training) -> None:
        """To be called before the first step."""
        self.training = training
        for stage in training.pipeline.stages:
            for layer in stage.decoder.layers:
                layer.register_forward_pre_hook(self._layer_begins)
                layer.register_forward_hook(self._layer_ends, always_call=True)  # running a layer again ends with an exception
        self.groups = {group.name: (label, group.size) for label in ("tp", "dp", "pp")
                       for group in [group_of(training.mesh, label)]}

    def restart(self) -> None:
        """A step begins."""
        self.found, self.after = Trace(0, {}, []), False
        self.memory.restart()
        self.memory.label(self.training.pipeline.parameters(), "parameters")
        self.memory.label((one for state in self.training.optimizer.state.values() for one in state.values()), "optimizer")

    def _layer_begins(self, *_: Any) -> None:
        self.again = plan_fake.in_backward()

    def _layer_ends(self, *_: Any) -> None:
        self.again = False

    @property
    def phase(self) -> str:
        return ("update" if self.after else "recomputed" if self.again else "backward" if plan_fake.in_backward() else "forward")

    def finishing(self, finish: Any) -> Any:
        """finish_gradients, from which the update begins."""
        def wrapped(*models: Any) -> None:
            self.after = True
            self.memory.label(self.training.pipeline.parameters(), "parameters")  # FSDP2 pads shards in its first forward
            self.memory.label((parameter.grad for parameter in self.training.pipeline.parameters()), "gradients")
            finish(*models)
        return wrapped

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        phase = self.phase
        if func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func, args, out, phase)
        elif func._overloadpacket in self.formulas:
            count = self.formulas[func._overloadpacket](*args, **kwargs, out_val=out)
            self.found.flops[phase] += count
            for product in _products(func, args):
                self.found.products[product] += 1
        else:
            self._moves(func, args, kwargs, out, phase)
        self.memory.see(out, phase)
        return out

    def _collective(self, func: Any, args: Any, out: Any, phase: str) -> None:
        name = func._overloadpacket.__name__.strip("_")
        if name in SILENT:
            return
        if name not in KINDS:
            raise RuntimeError(f"benchmarks.plan: the step ran {func}, which the trace does not know")
        kind = KINDS[name]
        group = next((one for one in map(_group, reversed(args)) if one), None)
        label, size = self.groups.get(group or "", (f"another ({group})", 0))
        if size == 1:
            return
        if label == "pp" and phase == "forward":
            phase = "schedule"
        elif label == "dp" and kind == "reduce_scatter":  # FSDP2 ends a backward outside of the engine
            phase = "backward"
        tensors = [one for one in tree_leaves((args, out)) if isinstance(one, Tensor)]
        count = max(map(_bytes, tensors))  # the whole is the larger of what goes in and what comes out
        if kind == "all_reduce":
            count = sum(map(_bytes, {id(one): one for one in tree_leaves(args) if isinstance(one, Tensor)}.values()))
        self.found.collectives[Collective(phase, kind, label, size, count)] += 1
        if kind == "all_reduce" and label == "dp" and phase == "backward":  # DDP's buckets, which gradients are views of
            self.memory.label(tensors, "gradients")

    def _moves(self, func: Any, args: Any, kwargs: Any, out: Any, phase: str) -> None:
        """Bytes that an op reads and writes. Views and unwritten memory are none."""
        if "empty" in func._overloadpacket.__name__:
            return
        read = args[1:] if func._overloadpacket.__name__ in OVERWRITE else args
        reads = [one for one in tree_leaves((read, {name: one for name, one in kwargs.items() if name != "out"}))
                 if isinstance(one, Tensor)]
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        owners = {one.untyped_storage()._cdata for one in inputs}
        new = [one for one in outputs if one.untyped_storage()._cdata not in owners]
        mutable = func._schema.is_mutable
        if not new and not mutable:
            return
        written = sum(map(_bytes, new))
        if mutable:
            changed = [value for argument, value in zip(func._schema.arguments, args, strict=False)
                       if argument.alias_info is not None and argument.alias_info.is_write]
            changed += [value for name, value in kwargs.items() if any(
                argument.name == name and argument.alias_info is not None and argument.alias_info.is_write
                for argument in func._schema.arguments)]
            written += sum(_bytes(one) for one in tree_leaves(changed) if isinstance(one, Tensor))
        self.found.moved[phase] += written + sum(map(_bytes, reads))
        self.found.ops[phase] += 1


def _group(argument: Any) -> str | None:
    if isinstance(argument, str):
        return argument if argument not in ("sum", "avg", "max", "min") else None
    return plan_fake.group_name(argument)


def _bytes(tensor: Tensor) -> int:
    """What an access to all of it touches: an expanded tensor is no larger than its memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _products(func: Any, args: Any) -> Iterator[Product]:
    """The products of an op that has a formula."""
    name = func._overloadpacket.__name__
    tensors = [one for one in args if isinstance(one, Tensor)]
    if "scaled_dot_product" in name:  # forward: scores, output; backward: scores again, and four gradients
        *dy, q, k, v = tensors[:4] if "backward" in name else tensors[:3]
        batch, (s, d), keys, e, dtype = q.shape[0] * q.shape[1], q.shape[2:], k.shape[2], v.shape[3], _dtype(q)
        yield Product(batch, s, keys, d, dtype)
        if not dy:
            yield Product(batch, s, e, keys, dtype)
            return
        yield Product(batch, s, keys, e, dtype)
        yield Product(batch, keys, e, s, dtype)
        yield Product(batch, s, d, keys, dtype)
        yield Product(batch, keys, d, s, dtype)
        return
    if name == "_linear_pointwise":
        a, b = tensors[0], tensors[1].t()
    else:
        a, b = tensors[-2:] if "add" in name else tensors[:2]
    batch = a.shape[0] if a.dim() == 3 else 1
    yield Product(batch, a.shape[-2], b.shape[-1], a.shape[-1], _dtype(a))


def _dtype(tensor: Tensor) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get(tensor.dtype, "other")


class _Memory:
    """Which storages live, from their first op to their end, and what is held at the peak."""

    def __init__(self) -> None:
        self.begun: int | None = None  # the number of events before the first backward
        self.alive: dict[int, tuple[Any, int]] = {}  # by address: weak reference, number
        self.sizes: list[int] = []
        self.labels: dict[int, str] = {}
        self.events: list[tuple[int, int, str]] = []  # number of a storage, bytes more or less, phase

    def restart(self) -> None:
        """A step begins: what lives now was there before it."""
        self.begun = None
        self.events = [(number, self.sizes[number], "before") for _, number in self.alive.values()]

    def label(self, tensors: Any, name: str) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                number = self._number(local(tensor).untyped_storage(), "before")
                self.labels[number] = name

    def see(self, out: Any, phase: str) -> None:
        if phase in ("backward", "recomputed") and self.begun is None:
            self.begun = len(self.events)
        for one in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(one, Tensor):
                self._number(one.untyped_storage(), phase)

    def resized(self, storage: Any, size: int) -> None:
        number = self._number(storage, "resized")
        if size != self.sizes[number]:
            self.events.append((number, size - self.sizes[number], "resized"))
            self.sizes[number] = size

    def _number(self, storage: Any, phase: str) -> int:
        address = storage._cdata
        if address in self.alive:
            return self.alive[address][1]
        number, size = len(self.sizes), storage.nbytes()
        self.sizes.append(size)
        self.events.append((number, size, phase))
        self.alive[address] = weakref.ref(storage, lambda _: self._gone(address, number)), number
        return number

    def _gone(self, address: int, number: int) -> None:
        if self.alive.get(address, (None, -1))[1] == number:
            del self.alive[address]
        self.events.append((number, -self.sizes[number], ""))

    def kept(self) -> int:
        """Bytes without a label when the first backward begins."""
        return sum(count for number, count, _ in self.events[:self.begun] if number not in self.labels)

    def peak(self) -> tuple[dict[str, int], str]:
        """Bytes by MEMORY at the moment of the step when most is held, and the phase that it is in."""
        held, total, top, phase = Counter[str](), 0, -1, "before"
        best, when = Counter[str](), ""
        for number, count, named in self.events:
            phase = named if named in PHASES else phase
            held[self.labels.get(number, "rest")] += count
            total += count
            if total > top:
                top, best, when = total, held.copy(), phase
        return {name: best[name] for name in MEMORY}, when
