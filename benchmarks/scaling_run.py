"""One measured run of benchmarks.scaling: what every rank measures, and what is made of it.

All ranks run the same number of steps, given beforehand: a number that each rank found for itself would leave one of them alone
in a collective.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_kernels import backend
from megatron_kernels.models import GPT2

from . import cuda, files, flops, harness, memory, scaling_exposed
from .trainer import DTYPES, Settings, Training

KIND = "benchmarks.scaling run"
DIRECTORY = Path("scaling-runs")
PROFILED_STEPS = 3
QUIET = {"KINETO_LOG_LEVEL": "9"}  # the profiler's own reports
SPLIT_SCHEDULES = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")  # weights' gradients apart from the inputs'


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def why_not(device_type: str, ranks_here: int) -> str:
    """Why so many ranks can't run on this machine's devices, or nothing."""
    if device_type != "cuda":
        return ""
    if why := cuda.why_not():
        return f"--device cuda: {why}"
    devices = torch.cuda.device_count()
    if ranks_here <= devices:
        return ""
    return f"{ranks_here} ranks on a machine with {devices} GPU{'s' * (devices > 1)}: a GPU serves one rank"


def measure(settings: Settings, mesh: DeviceMesh, device: torch.device, *, iterations: int, warmup: int, ranks_here: int,
            peak_tflops: float | None = None) -> dict[str, Any]:
    """Run `settings` on all ranks of the mesh; the record of the run, the same on every rank. Collective.

    In order: model and optimizer, `warmup` steps, `iterations` timed ones, one that counts FLOPs, three under the profiler.
    """
    memory = _Memory(device)
    training = Training(settings, mesh, device)
    memory.begin()
    for _ in range(warmup):
        first = training.step()
    before, milliseconds = _account(), []
    start = time.perf_counter()
    with harness.no_collection():
        for _ in range(iterations):
            _fence(device)
            begun = time.perf_counter()
            last = training.step()
            _finish(device)
            milliseconds.append((time.perf_counter() - begun) * 1e3)
    used = [now - then for now, then in zip(_account(), before, strict=True)]
    elapsed, peak_bytes = time.perf_counter() - start, memory.peak()
    with flops.counter() as count:
        training.step()
    profiled = []
    for _ in range(PROFILED_STEPS if mesh.size() > 1 else 0):
        _fence(device)
        profiled.append(scaling_exposed.measure(training.step, device.type == "cuda"))
    mine = {"milliseconds": milliseconds, "flops": count.get_total_flops(), "memory": peak_bytes, "host": socket.gethostname(),
            "used": used, "elapsed": elapsed, "losses": [float(first), float(last)] if warmup else [float(last)],
            "exposed": {name: harness.quantile([getattr(one, name) for one in profiled], 0.5)
                        for name in ("step", "communication", "exposed")} if profiled else None}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    where = environment(device, ranks_here)
    return record(settings, ranks, where, {"iterations": iterations, "warmup": warmup}, peak_tflops)


def record(settings: Settings, ranks: Sequence[dict[str, Any]], where: dict[str, Any], steps: dict[str, int],
           peak_tflops: float | None = None) -> dict[str, Any]:
    """What a run's file holds, of what each rank measured."""
    world, config = len(ranks), settings.config
    replicas = settings.replicas(world)
    iterations = [max(times) for times in zip(*(rank["milliseconds"] for rank in ranks), strict=True)]
    median, p10, p90 = (harness.quantile(iterations, q) for q in (0.5, 0.1, 0.9))
    counted = _flops(settings, [rank["flops"] for rank in ranks], where["kind"] == "cpu")
    per_device = {name: counted[key] * replicas / world / (median * 1e9) for name, key in
                  (("model_tflops_per_device", "model"), ("hardware_tflops_per_device", "counted"))}
    peak = ((peak_tflops * 1e12, "--peak-tflops") if peak_tflops
            else None if where["kind"] == "cpu" else flops.peak(where["device"], DTYPES[settings.dtype]))
    tokens = settings.batch * replicas * settings.sequence
    found: dict[str, Any] = {
        "kind": KIND, "environment": where, "settings": settings.as_json(), "world": world,
        "mesh": {"pp": settings.pipeline_parallel, "dp": replicas, "tp": settings.tensor_parallel},
        "parameters": sum(parameter.numel() for parameter in GPT2(config, device="meta").parameters()),
        "padded_vocab": config.padded_vocab_size, "global_batch": settings.batch * replicas, **steps,
        "iterations_ms": iterations, "median_ms": median, "p10_ms": p10, "p90_ms": p90,
        "tokens_per_second": tokens / median * 1e3, "tokens_per_second_per_device": tokens / median * 1e3 / world,
        "flops": counted, **per_device,
        "peak": None if peak is None else {"tflops": peak[0] / 1e12, "source": peak[1]},
        "mfu": None if peak is None else per_device["model_tflops_per_device"] * 1e12 / peak[0],
        "hfu": None if peak is None else per_device["hardware_tflops_per_device"] * 1e12 / peak[0],
        "mfu_why": "" if peak else f"no peak is known of {where['device']} in {settings.dtype}; --peak-tflops gives one",
        "exposed": _exposed([rank["exposed"] for rank in ranks]),
        "memory": {"peak_bytes": [rank["memory"] for rank in ranks], "what": "peak of torch.cuda.max_memory_allocated in the steps"
                   if where["kind"] != "cpu" else "growth of resident memory to its peak, from before the model was made"},
        "losses": ranks[0]["losses"], "others": _others(ranks, os.cpu_count() or 1)}
    found["notes"] = _notes(found)
    return found


def expected_flops(settings: Settings, on_cpu: bool) -> tuple[int | None, str]:
    """What the ranks of one replica should count in a step, together, and why that is not `flops.model_flops`; None where it is
    not known beforehand."""
    config = settings.config
    whole = flops.model_flops(config, settings.batch, settings.sequence)
    if settings.recompute:
        return None, "layers run again in the backward"
    if settings.attention == "sdpa":
        return None, "flash attention forms the scores again in its backward"
    if on_cpu and settings.pipeline_parallel > 1 and settings.schedule in SPLIT_SCHEDULES:
        return None, f"on a CPU schedule {settings.schedule} runs the backward of the head and of float32 linear layers twice"
    omitted = flops.omitted_flops(config, settings.batch, settings.sequence) if on_cpu else 0
    return whole - omitted, "on a CPU attention leaves out products that the causal mask hides" if omitted else ""


def _flops(settings: Settings, counted: Sequence[int], on_cpu: bool) -> dict[str, Any]:
    """The closed forms for one replica beside the counter's sum over its ranks."""
    replicas = settings.replicas(len(counted))
    total = sum(counted) / replicas
    model = flops.model_flops(settings.config, settings.batch, settings.sequence)
    expected, why = expected_flops(settings, on_cpu and backend_is_ours())
    wrong = expected is not None and total != expected
    return {"model": model, "hardware_form": flops.hardware_flops(settings.config, settings.batch, settings.sequence),
            "counted": int(total) if total == int(total) else total, "per_rank": list(counted), "expected": expected,
            "exact": total == model, "why": f"expected {expected} for one replica, counted {total:.0f}" if wrong else why,
            "wrong": wrong}


def backend_is_ours() -> bool:
    """Whether the fused softmax answers on a CPU, which is where attention leaves products out."""
    return backend.choose("scaled_masked_softmax", torch.empty(1)) != backend.REFERENCE


def _exposed(ranks: Sequence[dict[str, float] | None]) -> dict[str, Any] | None:
    """The ranks' mean, in milliseconds, and the exposed part of the profiled step; None of one rank, which sends nothing."""
    found = [rank for rank in ranks if rank is not None]
    if not found:
        return None
    mean = {f"{name}_ms": sum(rank[name] for rank in found) / len(found) for name in ("step", "communication", "exposed")}
    return {**mean, "share": mean["exposed_ms"] / mean["step_ms"] if mean["step_ms"] else 0.0,
            "per_rank_ms": [rank["exposed"] for rank in found]}


def _notes(found: dict[str, Any]) -> list[str]:
    """What a reader must know of the run."""
    notes, where = [], found["environment"]
    if where["kind"] == "cpu" and where["ranks_per_node"] > where["processors"]:
        notes.append(f"more ranks than processors: {where['processors']}")
    if found["others"] is not None and found["others"] > 0.05:
        notes.append(f"other processes took {found['others']:.0%} of the processors: these times say little")
    if not all(map(math.isfinite, found["losses"])):
        notes.append("the loss is not finite" + (": fp16 has no loss scaling here" if found["settings"]["dtype"] == "fp16" else ""))
    if found["flops"]["wrong"]:
        notes.append(f"WRONG: {found['flops']['why']}")
    return notes


def _others(ranks: Sequence[dict[str, Any]], processors: int) -> float | None:
    """The share of the first rank's machine that went to processes that are no ranks of this run."""
    here = [rank for rank in ranks if rank["host"] == ranks[0]["host"]]
    if not here[0]["used"]:
        return None
    theirs = here[0]["used"][1] - sum(rank["used"][0] for rank in here)
    return max(0.0, theirs) / max(here[0]["elapsed"] * processors, 1e-9)


def _account() -> tuple[float, ...]:
    try:
        return harness.processor_seconds()
    except (OSError, ValueError):
        return ()


def environment(device: torch.device, ranks_here: int) -> dict[str, Any]:
    """Where and with what, as the first rank sees it. Collective."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        own = {"kind": "cpu", **asdict(harness.environment())} if device.type == "cpu" else cuda.environment()
        nccl = {"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if device.type == "cuda" else {}
        found = [{**own, **nccl, "backend": dist.get_backend(), "nodes": -(-dist.get_world_size() // ranks_here),
                  "ranks_per_node": ranks_here, "processors": processors(), "threads": torch.get_num_threads()}]
    dist.broadcast_object_list(found, src=0, device=device)
    return found[0]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fence(device: torch.device) -> None:
    """All ranks are here, and have done all that they were given."""
    _finish(device)
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    _finish(device)


class _Memory:
    """The peak of this rank's memory: in the steps, of torch's allocator on a GPU; since this was made, of the process above what
    it had then, on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0.0
        if device.type == "cpu":
            try:
                memory.forget_peak()
                self.before = memory.resident("VmRSS")
            except OSError:
                self.before = math.nan

    def begin(self) -> None:
        """The model is made: on a GPU what making it took beside it is forgotten."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if math.isnan(self.before) else round((memory.resident("VmHWM") - self.before) * 2**20)


def start(device_type: str, local_rank: int, timeout: Any) -> torch.device:
    """Join the ranks that torchrun started, or be the only one; this rank's device."""
    own = torch.device("cpu") if device_type == "cpu" else torch.device("cuda", local_rank)
    if device_type == "cuda":
        torch.cuda.set_device(own)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout, **alone)
    return own


def check_writable(path: Path) -> None:
    """Make the directory, before a run that would be lost; ValueError where the file could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot write: {error.strerror}") from error


def load(path: str | Path) -> dict[str, Any]:
    """A run's file; ValueError where it is none."""
    found = files.read_json(path, "a run that --json wrote", KIND)
    try:
        Settings.from_json(found.get("settings", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def name_of(settings: Settings, world: int) -> str:
    """A file's name for the run: preset, and the mesh where it is more than one rank."""
    parts = {"tp": settings.tensor_parallel, "pp": settings.pipeline_parallel, "dp": settings.replicas(world)}
    return "-".join([settings.preset, *(f"{name}{size}" for name, size in parts.items() if size > 1)])


def check(settings: Settings, world: int) -> None:
    """Raise ValueError for what would fail on every rank, before any of them sends anything."""
    settings.replicas(world)
    config, ranks = settings.config, settings.tensor_parallel
    for name, size in (("heads", config.num_attention_heads), ("hidden", config.hidden_size)):
        if size % ranks:
            raise ValueError(f"settings: tensor_parallel {ranks} does not divide {name} {size}")
    if settings.pipeline_parallel > 1 and config.num_layers % settings.pipeline_parallel:
        raise ValueError(f"settings: pipeline_parallel {settings.pipeline_parallel} does not divide layers {config.num_layers}")
