"""How things are timed here: contestants take turns within one run, so that a busy or throttled machine slows all of them.

Nothing in this file knows an operation. A Contestant is a name and a function of no arguments; interleave() returns the samples
of each; environment() says where and with what they were taken.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import megatron_kernels

ROOT = Path(__file__).resolve().parent.parent

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
    """Milliseconds for one step: the median and the 20th and 80th percentiles of `samples` measurements."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        return cls(*(quantile(milliseconds, q) for q in (0.5, 0.2, 0.8)), samples=len(milliseconds))

    def times(self, factor: float) -> Timing:
        return Timing(self.median * factor, self.p20 * factor, self.p80 * factor, self.samples)


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of samples, linear between the two nearest; ValueError when there are none."""
    if not samples:
        raise ValueError("quantile: no samples")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def cpu_clock(step: Callable[[], object]) -> float:
    """Milliseconds of one step. The result is dropped before the clock stops: freeing it belongs to the step."""
    start = time.perf_counter()
    step()
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


def interleave(contestants: Sequence[Contestant], *, seconds: float, min_rounds: int, max_rounds: int = 1000, warmup: int = 2,
               clock: Callable[..., float] = cpu_clock, seed: int = 0) -> dict[str, Timing]:
    """Times every contestant once a round, in an order drawn anew for each round, until `seconds` have passed.

    At least min_rounds and at most max_rounds are run, after `warmup` rounds that are not counted. The order is drawn so that
    nobody always inherits the caches of the same neighbour. The clock gets the step, and the setup where there is one.
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
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start < seconds):
            draw.shuffle(order)
            for contestant in order:
                if contestant.warm:
                    contestant.step()
                timed = (contestant.step,) if contestant.setup is None else (contestant.step, contestant.setup)
                samples[contestant.name].append(clock(*timed))
            rounds += 1
    return {name: Timing.of(milliseconds) for name, milliseconds in samples.items()}


def others() -> Callable[[], float | None]:
    """A function that tells which share of all processors' time since now went to other processes or other virtual machines.

    One thread too many makes parallel code wait for whole time slices, so that such a figure says nothing. None where the
    system keeps no account in /proc/stat.
    """
    def account() -> tuple[float, float]:
        """Seconds that this process was running, and that anybody was; a virtual machine's host counts (steal)."""
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        mine = os.times()
        return mine.user + mine.system, (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    try:
        mine, everybodys = account()
    except (OSError, ValueError):
        return lambda: None
    start = time.perf_counter()

    def share() -> float:
        mine_now, everybodys_now = account()
        available = (time.perf_counter() - start) * (os.cpu_count() or 1)
        return max(0.0, (everybodys_now - everybodys) - (mine_now - mine)) / max(available, 1e-9)

    return share


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
    )


def _huge_pages() -> str:
    """The kernel's choice for transparent huge pages, the word in brackets; empty where there is no such file."""
    try:
        words = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return ""
    return words.partition("[")[2].partition("]")[0]


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
