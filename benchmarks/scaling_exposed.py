"""Communication that no computation hides, from a trace of torch's profiler.

The same definition on every device: the time in which a collective or a message is under way and nothing is computed on this rank,
that is the union of the communication's intervals less the union of the computation's. A collective is under way from when this
rank has begun it until it is complete, so waiting for a rank that comes later counts, a pipeline's bubbles included.

On a GPU the intervals are kernels, copies and fills: NCCL's kernels are communication, all others computation. On a CPU gloo's
annotations are communication, and the operators that call no other operators, on the thread that runs the step, computation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "benchmarks.scaling: one step"
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace; annotations are on the GPU's timeline, too
NO_WORK = ("c10d::", "_c10d_functional::", "autograd::", "torch::", "record_param_comms")  # operators that wait, or wrap others

Interval = tuple[float, float]


@dataclass(frozen=True)
class Exposed:
    """Milliseconds of one step under the profiler: the whole, communication under way, and that of it in which nothing ran."""

    step: float
    communication: float
    exposed: float


def measure(step: Callable[[], object], on_gpu: bool) -> Exposed:
    """Run the step once under torch's profiler. The profiler makes it slower, so the parts belong to its own whole."""
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        with record_function(STEP):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return (of_gpu if on_gpu else of_cpu)(events)


def of_gpu(events: Iterable[dict[str, Any]]) -> Exposed:
    """From a trace's events: the step lasts from the first kernel's begin to the last one's end."""
    work = [event for event in events if event.get("ph") == "X" and event.get("cat") in ON_GPU]
    communication = [_interval(event) for event in work if "nccl" in event["name"].lower()]
    computation = [_interval(event) for event in work if "nccl" not in event["name"].lower()]
    return _of(communication, computation, [_interval(event) for event in work])


def of_cpu(events: Iterable[dict[str, Any]]) -> Exposed:
    """From a trace's events: the step is the annotation STEP, whose thread computes."""
    events = [event for event in events if event.get("ph") == "X"]
    whole = next(event for event in events if event["name"] == STEP)
    communication = [_interval(event) for event in events
                     if event.get("cat") == "user_annotation" and event["name"].startswith("gloo:")]
    operators = [event for event in events if event.get("cat") == "cpu_op" and event["tid"] == whole["tid"]]
    computation = [_interval(event) for event in _leaves(operators) if not event["name"].startswith(NO_WORK)]
    return _of(communication, computation, [_interval(whole)])


def _of(communication: Sequence[Interval], computation: Sequence[Interval], whole: Sequence[Interval]) -> Exposed:
    if not whole:
        return Exposed(0.0, 0.0, 0.0)
    begin, end = min(start for start, _ in whole), max(stop for _, stop in whole)
    under_way = union((max(start, begin), min(stop, end)) for start, stop in communication)
    exposed = length(under_way) - length(common(under_way, union(computation)))
    return Exposed((end - begin) / 1e3, length(under_way) / 1e3, exposed / 1e3)


def _interval(event: dict[str, Any]) -> Interval:
    """Microseconds, as traces have them."""
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _leaves(operators: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The operators of one thread in which no other begins."""
    ordered = sorted(operators, key=lambda event: (float(event["ts"]), -float(event["dur"])))
    return [event for event, later in zip(ordered, [*ordered[1:], None], strict=True)
            if later is None or float(later["ts"]) >= _interval(event)[1]]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals, in order, that cover the same."""
    joined: list[Interval] = []
    for start, stop in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What two unions share."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, stop = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < stop:
            found.append((start, stop))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)
