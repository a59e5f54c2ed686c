"""What a measurement needs of a GPU: a clock of events behind a flushed cache, its memory, and its name and clock rates.

Nothing in this file knows an operation.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from . import harness
from .device import Device
from .harness import Contestant

SMI_FIELDS = ("uuid", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
FLUSH_BYTES = 2**27  # at least, so that the host has some time to enqueue a step
COPY = 2**30  # bytes that the copy reads, at most; beyond, it is taken to scale
SMI_SECONDS = 20  # that nvidia-smi gets


class Event(Protocol):
    """torch.cuda.Event(enable_timing=True), as far as it is used."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Event, /) -> float: ...


class EventClock:
    """Milliseconds of a step on a GPU, from an event in front of it to one behind it.

    Before that a buffer larger than the L2 cache is written, so that the step finds none of its data there. Meanwhile the host
    enqueues the step. Where the first event has not happened by the time the last one is enqueued, the GPU can't have waited for
    the host; where it has, the sample is thrown away, and the next one is behind twice as many writes. A step for which `most`
    writes are too few is in `late`: its time may be the host's. Such is one that waits for the GPU itself.
    """

    def __init__(self, buffer: Tensor, event: Callable[[], Event], most: int = 64):
        self.buffer, self.event, self.most = buffer, event, most
        self.writes: dict[Callable[..., object], int] = {}
        self.late: set[Callable[..., object]] = set()

    def __call__(self, contestant: Contestant) -> float:
        step, setup = contestant.step, contestant.setup
        while True:
            arguments = () if setup is None else (setup(),)
            writes = self.writes.setdefault(step, 1)
            start, end = self.event(), self.event()
            for _ in range(writes):
                self.buffer.zero_()
            start.record()
            step(*arguments)
            end.record()
            late = start.query()
            end.synchronize()
            if late and writes < self.most:
                self.writes[step] = 2 * writes
                continue
            if late:
                self.late.add(step)
            return start.elapsed_time(end)


def why_not() -> str:
    """Why there is no GPU to measure, or nothing."""
    if torch.cuda.is_available():
        return ""
    build = torch.version.cuda or torch.version.hip
    return f"torch {torch.__version__} " + ("finds no GPU (torch.cuda.is_available() is False)" if build else "is a CPU build")


def device() -> Device:
    """The current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush_bytes = max(2 * properties.L2_cache_size, FLUSH_BYTES)

    def clock() -> EventClock:
        return EventClock(torch.empty(flush_bytes, dtype=torch.uint8, device="cuda"), lambda: torch.cuda.Event(enable_timing=True))

    return Device("cuda", clock, copying, peak, environment, torch.cuda.synchronize, torch.cuda.empty_cache)


def copying(x: Tensor, nbytes: float) -> tuple[Contestant, float]:
    """A copy on x's device that moves so many bytes, half of them read and half written; to scale where they are too many."""
    half = max(1, round(nbytes / 2))
    source = torch.ones(min(half, COPY), dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)
    return Contestant("copy", lambda: target.copy_(source)), half / source.numel()


def peak(contestant: Contestant) -> int:
    """From the account that PyTorch's caching allocator keeps."""
    made = () if contestant.setup is None else (contestant.setup(),)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.step(*made)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment() -> dict[str, object]:
    """Where and with what: the clock rates are those of a busy GPU. "unknown" stands for what nvidia-smi doesn't tell."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def busy() -> None:
        for _ in range(100):
            buffer.zero_()
        torch.cuda.synchronize()

    smi = nvidia_smi(str(properties.uuid), busy)
    clocks = "unknown"
    if smi:
        clocks = f"SM {smi['clocks.sm']} of {smi['clocks.max.sm']}, memory {smi['clocks.mem']}, {smi['power.limit']}"
    host = harness.environment()
    return {"kind": "cuda", "date": host.date, "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1), "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": smi.get("driver_version", "unknown"), "clocks": clocks, "cuda": torch.version.cuda or "none",
            "torch": host.torch, "triton": _triton(), "megatron_kernels": host.megatron_kernels, "commit": host.commit,
            "python": host.python, "host": host.device, "system": host.system}


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def nvidia_smi(uuid: str, busy: Callable[[], None]) -> dict[str, str]:
    """SMI_FIELDS of the GPU with that uuid, or of the only one; {} where nvidia-smi is missing, fails or hangs.

    `busy` is called over and over until nvidia-smi has answered: an idle GPU has other clock rates.
    """
    try:
        process = subprocess.Popen(["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return {}
    end = time.monotonic() + SMI_SECONDS
    with process:
        while process.poll() is None:
            busy()
            if time.monotonic() > end:
                process.kill()
        assert process.stdout is not None
        lines = [dict(zip(SMI_FIELDS, line.split(", "), strict=False)) for line in process.stdout.read().splitlines()]
    if process.returncode:
        return {}
    complete = [line for line in lines if len(line) == len(SMI_FIELDS)]
    ours = [line for line in complete if uuid in line["uuid"]] or (complete if len(complete) == 1 else [])
    return ours[0] if ours else {}
