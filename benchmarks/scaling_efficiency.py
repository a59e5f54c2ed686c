"""Weak and strong scaling efficiency of one run against another, and what the paper reports.

Weak: model FLOP/s per device over the baseline's. The model, or the batch, grows with the devices, and each has the same work.
Strong: (T1 / Tn) / n, the time of the baseline's device over the devices' together. The work is the same, shared by more of them.
Each is refused where the two runs are not what it compares; a run against itself is 100%.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Work per device that still counts as the same, in FLOPs of a step. Those of the paper's four models are within 1 : 0.82.
LEAST, MOST = 2 / 3, 3 / 2
MODEL = ("layers", "hidden", "heads", "vocab", "sequence")
COMPUTED = ("dtype", "master_weights", "attention", "recompute", "dropout")  # how a device computes, not how much


class Efficiency(NamedTuple):
    """Shares of 1, or None and why there is none."""

    weak: float | None
    weak_why: str
    strong: float | None
    strong_why: str


def compare(run: dict[str, Any], baseline: dict[str, Any]) -> Efficiency:
    """Of two records that `scaling_run.record` made."""
    why = _other_device(run, baseline)
    weak_why, strong_why = why or _not_weak(run, baseline), why or _not_strong(run, baseline)
    weak = run["model_tflops_per_device"] / baseline["model_tflops_per_device"]
    strong = (baseline["median_ms"] * baseline["world"]) / (run["median_ms"] * run["world"])
    return Efficiency(None if weak_why else weak, weak_why, None if strong_why else strong, strong_why)


def _other_device(run: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Why the two runs' devices are not alike, or nothing. A device of a CPU is a rank with its threads."""
    for name, one, other in [(name, run["environment"][name], baseline["environment"][name]) for name in ("kind", "device")] + [
            (name, run["settings"][name], baseline["settings"][name]) for name in COMPUTED]:
        if one != other:
            return f"{name} is {one} here and {other} in the baseline"
    if run["environment"]["kind"] == "cpu" and run["environment"]["threads"] != baseline["environment"]["threads"]:
        return (f"a rank has {run['environment']['threads']} threads here and {baseline['environment']['threads']} in the "
                "baseline; --threads sets them")
    return ""


def _not_weak(run: dict[str, Any], baseline: dict[str, Any]) -> str:
    if run["settings"]["sequence"] != baseline["settings"]["sequence"]:
        return f"sequence is {run['settings']['sequence']} here and {baseline['settings']['sequence']} in the baseline"
    ratio = _work(run) / _work(baseline)
    if not LEAST <= ratio <= MOST:
        return f"a device has {ratio:.2f} times the baseline's FLOPs in a step, which is not the same work"
    return ""


def _not_strong(run: dict[str, Any], baseline: dict[str, Any]) -> str:
    for name in MODEL:
        one, other = run["settings"][name], baseline["settings"][name]
        if one != other:
            return f"another model: {name} is {one} here and {other} in the baseline"
    if run["global_batch"] != baseline["global_batch"]:
        return f"the global batch is {run['global_batch']} here and {baseline['global_batch']} in the baseline"
    return ""


def _work(run: dict[str, Any]) -> float:
    """Model FLOPs of one device in one step."""
    return run["flops"]["model"] * run["mesh"]["dp"] / run["world"]


class Reported(NamedTuple):
    preset: str
    devices: int
    efficiency: float | None  # weak
    tflops: float | None  # sustained, per device


PAPER_SOURCE = ("Megatron-LM, arXiv 1909.08053, on V100 GPUs of 32 GB, 8 sequences a replica: section 5.1 for 77% and 74%, the "
                "abstract for 39 TFLOP/s, which are 30% of the GPU's peak. For 512 GPUs the abstract has 76%, and 15.1 PFLOP/s.")
PAPER = (Reported("1.2B", 1, 1.0, 39.0), Reported("8.3B", 8, 0.77, None), Reported("8.3B", 512, 0.74, None))


def paper() -> list[list[str]]:
    """A table of what the paper reports: a header, and the rows."""
    return [["paper", "GPUs", "weak efficiency", "TFLOP/s per GPU"],
            *([row.preset, str(row.devices), "-" if row.efficiency is None else f"{row.efficiency:.0%}",
               "-" if row.tflops is None else f"{row.tflops:.0f}"] for row in PAPER)]
