"""How things are timed here: contestants take turns within one run, so that a busy or throttled machine slows all of them.

Nothing in this file knows an operation. A Contestant is a name and a function of no arguments; interleave() returns the samples
of each; environment() says where and with what they were taken.
"""

from __future__ import annotations

import datetime
import gc
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import megatron_kernels

ROOT = Path(__file__).resolve().parent.parent

FAR = 2.0  # times the distance from p20 to p80 that an outlier lies beyond p80: 4.2 standard deviations above a normal median

# With glibc's own thresholds every large tensor is mapped afresh and given back when freed, and the page faults of a fresh
# mapping take longer than a kernel that runs at the speed of memory. With these, freed blocks are used again.
REUSING_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


@dataclass(frozen=True)
class Contestant:
    """What is timed; `warm` runs it once right before, so that it finds its data in the caches.

    With a `setup`, that is called before each step, off the clock, and the step gets what it returns.
    """

    name: str
    step: Callable[..., object]
    warm: bool = False
    setup: Callable[[], object] | None = None

    def run(self) -> None:
        """Once, off the clock."""
        self.step() if self.setup is None else self.step(self.setup())


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one step: the median and the 20th and 80th percentiles of `samples` measurements.

    The median of steps like these lies between `low` and `high` (see `interval`); `outliers` counts samples far above the others.
    """

    median: float
    p20: float
    p80: float
    samples: int
    low: float
    high: float
    outliers: int = 0

    @classmethod
    def of(cls, *sittings: Sequence[float]) -> Timing:
        """From the milliseconds of one sitting or of several; then the interval also holds the median of each."""
        every = [ms for sitting in sittings for ms in sitting]
        median, p20, p80 = (quantile(every, q) for q in (0.5, 0.2, 0.8))
        low, high = interval(every)
        middles = [quantile(sitting, 0.5) for sitting in sittings]
        far = p80 + FAR * (p80 - p20)
        return cls(median, p20, p80, len(every), min(low, *middles), max(high, *middles), sum(ms > far for ms in every))

    def times(self, factor: float) -> Timing:
        return replace(self, **{name: factor * getattr(self, name) for name in ("median", "p20", "p80", "low", "high")})

    @property
    def width(self) -> float:
        """Of the interval around the median, as a part of it."""
        return (self.high - self.low) / self.median


def interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of the samples, as close as can be, that have the true median between them with that probability.

    For independent samples of any distribution: each lies below the median with probability 1/2, so the k-th smallest and the
    k-th largest of n miss it with probability 2 P(Bin(n, 1/2) < k). With fewer than six samples, the smallest and the largest,
    whatever their confidence. David and Nagaraja, Order Statistics (2003), section 7.1. ValueError when there are no samples.
    """
    if not samples:
        raise ValueError("interval: no samples")
    ordered, n = sorted(samples), len(samples)
    tail, k = 2.0 ** -n, 1
    while k < (n + 1) // 2 and 2 * (tail := tail + math.comb(n, k) * 2.0 ** -n) <= 1 - confidence:
        k += 1
    return ordered[k - 1], ordered[n - k]


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of samples, linear between the two nearest; ValueError when there are none."""
    if not samples:
        raise ValueError("quantile: no samples")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def cpu_clock(contestant: Contestant, flush: Callable[[], object] | None = None) -> float:
    """Milliseconds of one step, behind `flush` unless it is warm. Its result is dropped before the clock stops: freeing it belongs
    to the step."""
    if contestant.warm:
        contestant.run()
    made = () if contestant.setup is None else (contestant.setup(),)
    if flush is not None and not contestant.warm:
        flush()
    start = time.perf_counter()
    contestant.step(*made)
    return (time.perf_counter() - start) * 1e3


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps Python's garbage collector out of the samples."""
    was_enabled = gc.isenabled()
    if was_enabled:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(contestants: Sequence[Contestant], **options: Any) -> dict[str, Timing]:
    """The timings of one sitting; the options are those of `sample`."""
    return {name: Timing.of(milliseconds) for name, milliseconds in sample(contestants, **options).items()}


def sample(contestants: Sequence[Contestant], *, seconds: float, min_rounds: int, max_rounds: int = 1000, warmup: int = 2,
           clock: Callable[[Contestant], float] = cpu_clock, settled: float = math.inf, patience: float = 1.0,
           seed: int = 0) -> dict[str, list[float]]:
    """Times every contestant once a round, in an order drawn anew for each round, until `seconds` have passed.

    At least min_rounds and at most max_rounds are run, after `warmup` rounds that are not counted. The order is drawn so that
    nobody always inherits the caches of the same neighbour. While some interval is wider than `settled`, as a part of its median,
    it goes on for up to `patience` times as long. Milliseconds by name.
    """
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    if len(samples) != len(contestants):
        raise ValueError(f"interleave: contestants' names repeat: {[contestant.name for contestant in contestants]}")
    order, draw = list(contestants), random.Random(seed)
    with no_collection():
        for _ in range(warmup):
            for contestant in order:
                contestant.run()
        start, rounds = time.perf_counter(), 0
        while rounds < max_rounds:
            spent = time.perf_counter() - start
            if rounds >= min_rounds and spent >= seconds and (
                    spent >= patience * seconds or all(Timing.of(those).width <= settled for those in samples.values())):
                break
            draw.shuffle(order)
            for contestant in order:
                samples[contestant.name].append(clock(contestant))
            rounds += 1
    return samples


def processor_seconds() -> tuple[float, float]:
    """Seconds that this process was running, and that anybody was; a virtual machine's host counts (steal).

    OSError or ValueError where the system keeps no account in /proc/stat.
    """
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    mine = os.times()
    return mine.user + mine.system, (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others() -> Callable[[], float | None]:
    """A function that tells which share of all processors' time since now went to other processes or other virtual machines.

    One thread too many makes parallel code wait for whole time slices, so that such a figure says nothing. None where the
    system keeps no account in /proc/stat.
    """
    try:
        mine, everybodys = processor_seconds()
    except (OSError, ValueError):
        return lambda: None
    start = time.perf_counter()

    def share() -> float:
        mine_now, everybodys_now = processor_seconds()
        available = (time.perf_counter() - start) * (os.cpu_count() or 1)
        return max(0.0, (everybodys_now - everybodys) - (mine_now - mine)) / max(available, 1e-9)

    return share


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def why_unavailable(implementation: str) -> str:
    """Why ops can't run in that implementation here, or nothing."""
    known = megatron_kernels.implementations()
    if implementation not in known:
        return f"{implementation}: unknown implementation; known are {', '.join(known)}"
    return "" if known[implementation].available else f"{implementation}: {known[implementation].detail}"


def is_reusing_allocator(env: Mapping[str, str] = os.environ) -> bool:
    return all(env.get(name) == value for name, value in REUSING_ALLOCATOR.items())


def allocator_environment(reusing: bool, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """env with glibc's allocator set to keep what is freed, or to its defaults."""
    rest = {name: value for name, value in env.items() if name not in REUSING_ALLOCATOR}
    return {**rest, **REUSING_ALLOCATOR} if reusing else rest


def restart_reusing(module: str, argv: Sequence[str]) -> None:
    """Go on as a new `python -m module argv` under the allocator that keeps what is freed, unless this process has it."""
    if not is_reusing_allocator():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", module, *argv], allocator_environment(reusing=True))


@dataclass(frozen=True)
class Environment:
    """Where and with what a result was measured."""

    date: str
    device: str
    threads: int
    torch: str
    megatron_kernels: str
    commit: str
    python: str
    system: str
    instruction_set: str
    huge_pages: str
    clocks: str = "unknown"


def environment() -> Environment:
    return Environment(
        date=datetime.date.today().isoformat(),
        device=cpu_model(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        megatron_kernels=megatron_kernels.__version__,
        commit=commit(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        huge_pages=_huge_pages(),
        clocks=_clocks(),
    )


def _huge_pages() -> str:
    """The kernel's choice for transparent huge pages, the word in brackets; empty where there is no such file."""
    try:
        words = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return ""
    return words.partition("[")[2].partition("]")[0]


def _clocks() -> str:
    """The processors' present clock rates as the system gives them; on many virtual machines that is the nominal rate."""
    try:
        rates = [float(line.partition(":")[2]) for line in Path("/proc/cpuinfo").read_text().splitlines() if "cpu MHz" in line]
    except (OSError, ValueError):
        rates = []
    return f"{min(rates):.0f}-{max(rates):.0f} MHz" if rates else "unknown"


def cache_bytes() -> int:
    """Of the largest cache that the system names, 32 MiB where it names none."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1))
    return max(sizes) or 2**25


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The short commit of this checkout, with a + when files that git tracks have changed; "unknown" outside a repository."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
