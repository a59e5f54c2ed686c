"""Everything that needs several ranks, in one launch of torchrun: four processes on CPU with gloo.

Each module of cases says in its own text what it compares. A number is an error in float64 and must be at most 1e-12; a boolean
must be true.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RANKS = 4
MODULES = ["parallel_tensor", "parallel_losses", "parallel_pipeline", "parallel_data", "parallel_checkpoints", "parallel_bert",
           "parallel_docs"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    out = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
               str(HERE / "parallel_worker.py"), str(out), *MODULES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor")}
    run = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=900)
    return out, run.stderr[-6000:]


@pytest.mark.parametrize("module", MODULES)
def test_four_ranks(launch, module):
    out, log = launch
    problems, count = [], 0
    for rank in range(RANKS):
        path = out / f"{module}.{rank}.json"
        assert path.exists(), f"rank {rank} never came to {module}:\n{log}"
        for case, values in json.loads(path.read_text()).items():
            for name, value in values.items():
                count += 1
                good = value is True or (isinstance(value, float) and value <= 1e-12)
                if not good:
                    problems.append(f"rank {rank}, {case}: {name}: {value}")
    assert count and not problems, "\n".join([*problems, log if "error" in str(problems) else ""])
