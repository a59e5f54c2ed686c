"""A rank that is killed: the others end by themselves with an error that names the group, and the run resumes bit for bit.

The four processes are started one by one, not by torchrun, which would end the peers itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_failing import CONFIG

from megatron_kernels import checkpoint, parallel
from megatron_kernels.models import GPT2
from megatron_kernels.parallel.failures import is_of_another_rank

SCRIPT = Path(__file__).parent / "parallel_failing.py"
TIMEOUT = 60  # of the process groups, in the script
KILLED = -9

pytestmark = pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and signals")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(folder: Path, steps: int, *runs: str) -> tuple[list[int], list[str], float]:
    """Return codes and error output of the four ranks, and how many seconds the others lived after the first death."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port())}
    logs = [open(folder / f"{rank}.log", "w") for rank in range(4)]  # noqa: SIM115 (closed below)
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(steps), *runs], stdout=log, stderr=log,
                              env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank, log in enumerate(logs)]
    try:
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.05)
        first = time.monotonic()
        for rank in ranks:
            rank.wait(timeout=2 * TIMEOUT)
        lived = time.monotonic() - first
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for log in logs:
            log.close()
    return [rank.returncode for rank in ranks], [(folder / f"{rank}.log").read_text() for rank in range(4)], lived


def ended_well(codes: list[int], logs: list[str], lived: float, killed: int) -> None:
    """The killed rank died of the signal, the others of one error each, which names a group; nobody waited for the timeout."""
    assert codes[killed] == KILLED, logs[killed]
    print(f"the others ended after {lived:.1f} s")
    assert lived < TIMEOUT / 2
    for rank in set(range(4)) - {killed}:
        assert codes[rank] == 1, (rank, codes, logs[rank])
        last = [line for line in logs[rank].splitlines() if "CollectiveError: " in line]
        assert last, logs[rank]
        print(f"rank {rank}: {last[-1][:300]}")
        assert "group 'tp'" in last[-1] or "group 'dp'" in last[-1]


def test_a_killed_rank_ends_the_run_and_it_resumes_bitwise(tmp_path):
    whole, run = str(tmp_path / "whole"), tmp_path / "run"
    ended_well(*launch(tmp_path / "first", 8, whole, "never", str(run), "step 5"), killed=3)
    assert checkpoint.latest(run) == run / "step_00000004"

    ended_well(*launch(tmp_path / "second", 8, str(run), "save 8"), killed=2)
    assert checkpoint.latest(run) == run / "step_00000006"
    assert checkpoint.load_training(run, GPT2(CONFIG, seed=5)).step == 6
    for rank in range(4):
        start, losses, weights = torch.load(f"{whole}.{rank}.pt", weights_only=True)
        resumed, again, found = torch.load(f"{run}.{rank}.pt", weights_only=True)
        assert (start, resumed, len(losses)) == (0, 4, 8)
        assert losses[4:] == again
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(("error", "communication"), [
    (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
    (dist.DistBackendError("NCCL communicator was aborted on rank 3"), True), (parallel.CollectiveError("all-reduce"), True),
    (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False), (ValueError("gloo"), False)])
def test_which_errors_are_of_another_rank(error, communication):
    assert is_of_another_rank(error) == communication


def test_without_a_mesh_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="^gloo says no$"), parallel.failures(None):
        raise RuntimeError("gloo says no")
