"""What the benchmark sees of the device that it measures, so that one of made-up clocks can stand in for it."""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import harness
from .harness import Contestant

MOST_FLUSHED = 2**29  # bytes


class Clock(Protocol):
    """Milliseconds of a contestant's step that finds none of its data in a cache. `late`: steps whose time may be the host's."""

    late: set[Callable[..., object]]

    def __call__(self, contestant: Contestant, /) -> float: ...


@dataclass(frozen=True)
class Device:
    """`copy` takes the large tensor of an op and the bytes that the op moves, and gives a step that copies memory and what its
    time is to be multiplied by. `peak` gives the bytes that a contestant's step holds at most, beyond what was there before."""

    name: str  # where tensors are made
    clock: Callable[[], Clock]
    copy: Callable[[Tensor, float], tuple[Contestant, float]]
    peak: Callable[[Contestant], int]
    environment: Callable[[], dict[str, object]]
    synchronize: Callable[[], None] = lambda: None
    release: Callable[[], None] = lambda: None  # gives cached memory back, so that the next shape finds it in one piece
    others: Callable[[], Callable[[], float | None]] = lambda: lambda: None  # see harness.others


@dataclass
class ColdClock:
    """Time on the host behind a read of more memory than the caches hold."""

    buffer: Tensor
    late: set[Callable[..., object]] = field(default_factory=set)

    def __call__(self, contestant: Contestant) -> float:
        return harness.cpu_clock(contestant, self.buffer.sum)


def clone_of(x: Tensor, nbytes: float) -> tuple[Contestant, float]:
    """x.clone() allocates its result as ops do, and moves twice the bytes of x."""
    x = x.detach()
    return Contestant("copy", x.clone), nbytes / (2 * x.numel() * x.element_size())


def peak_of_allocations(contestant: Contestant) -> int:
    """From the account that PyTorch's profiler keeps of the CPU allocator."""
    made = () if contestant.setup is None else (contestant.setup(),)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        contestant.step(*made)
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def cpu() -> Device:
    """The processors that this process may use."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write two lines each time
    elements = min(2 * harness.cache_bytes(), MOST_FLUSHED) // 8
    buffer = functools.cache(lambda: torch.zeros(elements, dtype=torch.int64))

    def environment() -> dict[str, object]:
        return {"kind": "cpu", **asdict(harness.environment()), "flushed_mib": math.ceil(elements / 2**17)}

    return Device("cpu", lambda: ColdClock(buffer()), clone_of, peak_of_allocations, environment, release=lambda: gc.collect(1),
                  others=harness.others)
