"""One rank of the parallel tests: runs every case of the modules named on the command line, and writes what each gave.

    torchrun --nproc-per-node 4 tests/parallel_worker.py OUT parallel_tensor parallel_losses ...

A module has `cases() -> dict[name, function]`. All ranks run the functions in the same order; each returns numbers and booleans by
name. A case that raises ends the run, because the other ranks may be waiting for this one.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_kernels import parallel


@functools.cache
def mesh(pp: int, dp: int, tp: int):
    """The mesh of that shape over all ranks; making one is collective, so each shape is made once."""
    return parallel.make_mesh(pipeline_parallel=pp, data_parallel=dp, tensor_parallel=tp, device_type="cpu")


def main() -> None:
    out, modules = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    rank = dist.get_rank()
    only = os.environ.get("CASES", "")
    for name in modules:
        results = {}
        for case, run in importlib.import_module(name).cases().items():
            if only not in case:
                continue
            start = time.perf_counter()
            try:
                results[case] = run()
            except BaseException:
                results[case] = {"error": traceback.format_exc()}
                print(f"rank {rank}: {name}.{case}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            seconds = time.perf_counter() - start
            if rank == 0:
                print(f"{seconds:6.1f} s  {name}.{case}", file=sys.stderr, flush=True)
            (out / f"{name}.{rank}.json").write_text(json.dumps(results))
            if "error" in results[case]:
                os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.modules["parallel_worker"] = sys.modules["__main__"]  # cases import the meshes of this very run
    main()
