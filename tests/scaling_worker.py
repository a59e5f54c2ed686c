"""One rank of the scaling tests: several settings in one launch of torchrun, each run as benchmarks.scaling runs it.

    torchrun --nproc-per-node 2 scaling_worker.py OUT NAME NAME ...      a file for each, "rates" being --measure-rates
    torchrun --nproc-per-node 2 scaling_worker.py --fail FILE            a run whose second rank breaks in its third step
"""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import files, rates, scaling, scaling_run
from benchmarks.trainer import PRESETS, Training

RUNS = {
    "dp": {}, "tp": {"tensor_parallel": 2}, "sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp": {"pipeline_parallel": 2, "microbatches": 2}, "fsdp": {"data_parallel": "fsdp"},
    "accumulated": {"microbatches": 2, "fuse_linear_loss": True},
    "recomputed": {"recompute": True, "dtype": "bf16"}, "sdpa": {"attention": "sdpa"},
    "long": {"sequence": 256, "batch": 1, "tensor_parallel": 2},  # longer than a block of queries
    "padded": {"vocab": 1000, "tensor_parallel": 2},  # 1024 rows
    "interleaved": {"pipeline_parallel": 2, "microbatches": 2, "schedule": "Interleaved1F1B"},
    "split": {"pipeline_parallel": 2, "microbatches": 4, "schedule": "ZBVZeroBubble", "data_parallel": "fsdp"},
    "mixed": {"data_parallel": "fsdp", "dtype": "bf16", "master_weights": True},
}


def measure_rates(path: Path, device: torch.device) -> None:
    """The few sizes that a test needs."""
    rates.SECONDS, rates.LEAST, rates.LARGEST, rates.COPIED, rates.OPERANDS = 0.0, 2, {"cpu": 2**12}, {"cpu": 2**22}, 2**16
    scaling.measure_rates([PRESETS["tiny"]], device, 2, path)


def fail(path: str) -> None:
    steps, real = [], Training.step

    def step(self):
        steps.append(1)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            raise RuntimeError("planted")
        return real(self)

    Training.step = step
    raise SystemExit(scaling.main(["--preset", "tiny", "--device", "cpu", "--iterations", "3", "--warmup", "1", "--json", path]))


def main() -> None:
    if sys.argv[1] == "--fail":
        fail(sys.argv[2])
    out, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    device = scaling_run.start("cpu", 0, datetime.timedelta(seconds=120))
    for name in names:
        if name == "rates":
            measure_rates(out / "rates.json", device)
            continue
        settings = replace(PRESETS["tiny"], **RUNS[name])
        found = scaling_run.measure(settings, settings.mesh("cpu"), device, iterations=3, warmup=1,
                                    ranks_here=int(os.environ["LOCAL_WORLD_SIZE"]))
        if dist.get_rank() == 0:
            files.write_json(out / f"{name}.json", found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
