"""What a step holds at its highest on a CPU, by the resident memory of a process that does nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import harness

# Every block above 64 KiB is mapped for itself and unmapped when freed, so that resident memory is what is alive.
EXACT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def resident(field: str) -> float:
    """MiB of this process: field is VmRSS (now) or VmHWM (highest since `forget_peak`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """From here on VmHWM counts. OSError where the system does not let a process do that."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(step: Callable[[], object]) -> dict[str, float]:
    """MiB at the highest point of a step, in all ("total") and above what was there before it ("step")."""
    before = resident("VmRSS")
    forget_peak()
    step()
    peak = resident("VmHWM")
    return {"total": peak, "step": peak - before}


def in_own_process(module: str, arguments: Sequence[object], what: str) -> Any:
    """What `python -m module arguments` prints as JSON in its last line, under that allocator. SystemExit, naming `what`, where
    it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | EXACT_ALLOCATOR, cwd=harness.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the process that measures the memory of {what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
