"""benchmarks.scaling with two ranks on CPU and gloo, as torchrun starts them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scaling_worker

from benchmarks import flops, harness, scaling_run
from benchmarks.scaling_efficiency import compare
from benchmarks.trainer import Settings

HERE = Path(__file__).parent
QUICK = ["tp", "sp", "pp", "recomputed", "rates"]
SLOW = [name for name in scaling_worker.RUNS if name not in QUICK]


def torchrun(*words: str, cwd: Path = HERE, ranks: int = 2) -> subprocess.CompletedProcess:
    """With the allocator that benchmarks.scaling would else start itself again for."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    paths = os.pathsep.join([str(harness.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**harness.allocator_environment(reusing=True), **scaling_run.QUIET, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling")
    return out, torchrun("scaling_worker.py", str(out), *QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling-slow")
    return out, torchrun("scaling_worker.py", str(out), *SLOW)


def load(done: tuple[Path, subprocess.CompletedProcess], name: str) -> dict:
    out, process = done
    path = out / f"{name}.json"
    assert path.exists(), process.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", [name for name in QUICK if name in scaling_worker.RUNS])
def test_two_ranks(quick, name):
    check(load(quick, name), name)


def test_every_layout_trains_alike(quick):
    """One replica on the same tokens, whoever shares it: the losses before the first step and after four."""
    losses = [load(quick, name)["losses"] for name in ("tp", "sp", "pp")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_of_two_ranks(slow, name):
    check(load(slow, name), name)


def check(run: dict, name: str) -> None:
    settings = Settings.from_json(run["settings"])
    model = flops.model_flops(settings.config, settings.batch, settings.sequence)
    assert run["world"] == 2 and run["mesh"]["tp"] * run["mesh"]["pp"] * run["mesh"]["dp"] == 2
    assert len(run["iterations_ms"]) == 3 and 0 < run["p10_ms"] <= run["median_ms"] <= run["p90_ms"]
    assert sum(run["flops"]["per_rank"]) == run["flops"]["counted"] * run["mesh"]["dp"] and not run["flops"]["wrong"]
    exact = name not in ("recomputed", "sdpa", "long", "split")
    assert run["flops"]["exact"] == exact == (run["flops"]["counted"] == model) == (run["flops"]["why"] == "")
    if name == "recomputed":  # torch's checkpointing leaves out what the backward does not need
        assert model < run["flops"]["counted"] < run["flops"]["hardware_form"]
    if name == "long":
        assert run["flops"]["counted"] == model - flops.omitted_flops(settings.config, settings.batch, settings.sequence) < model
    exposed = run["exposed"]
    assert 0 < exposed["exposed_ms"] <= exposed["communication_ms"] <= exposed["step_ms"] and len(exposed["per_rank_ms"]) == 2
    assert all(peak >= 0 for peak in run["memory"]["peak_bytes"]) and "resident" in run["memory"]["what"]
    assert run["losses"][-1] < run["losses"][0]
    assert compare(run, run) == (1.0, "", 1.0, "")
    assert run["environment"]["ranks_per_node"] == 2 and run["environment"]["backend"] == "gloo"
    assert ("more ranks than processors: 1" in run["notes"]) == (scaling_run.processors() == 1)


def test_rates(quick):
    found = load(quick, "rates")
    products = {(one["m"], one["n"], one["k"]) for one in found["matmul"]}
    # Of 4 x 64 tokens, 64 hidden and 512 rows of the table: forward, input's gradient, weight's gradient; whole and in halves.
    assert {(256, 192, 64), (256, 64, 192), (192, 64, 256), (256, 512, 64), (64, 256, 256)} <= products
    assert {(256, 96, 64), (256, 64, 96), (96, 64, 256), (256, 64, 32), (256, 256, 64)} <= products
    assert {(one["batch"], one["m"], one["n"], one["k"]) for one in found["batched_matmul"]} >= {(16, 64, 64, 16), (8, 64, 16, 64)}
    assert {(one["kind"], one["ranks"]) for one in found["collectives"]} == {
        ("all_reduce", 2), ("all_gather", 2), ("reduce_scatter", 2), ("send", 2)}
    assert sorted({one["bytes"] for one in found["collectives"]}) == [2**10, 2**12]
    timed = [*found["matmul"], *found["batched_matmul"], *found["collectives"], found["launch"]]
    assert all(0 < one["seconds"] < 1 for one in timed) and 1e7 < found["copy_bytes_per_second"] < 1e13
    assert found["world"] == 2 and found["environment"]["threads"] == 1


def test_the_command_prints_and_keeps_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    done = torchrun("-m", "benchmarks.scaling", "--preset", "tiny", "--iterations", "2", "--warmup", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    run = scaling_run.load(tmp_path / "scaling-runs" / "tiny-dp2.json")
    assert run["iterations"] == 2 and run["warmup"] == 1 and len(run["iterations_ms"]) == 2 and run["flops"]["exact"]
    assert run["efficiency"] == {"baseline": "itself", "weak": 1.0, "weak_why": "", "strong": 1.0, "strong_why": ""}
    assert re.search(r"tokens/s +[\d,]+", done.stdout) and re.search(r" counted +the same", done.stdout)
    assert done.stdout.count("100.0%") == 2 and "No MFU: no peak is known" in done.stdout
    assert sorted(path.name for path in (tmp_path / "scaling-runs").iterdir()) == ["tiny-dp2.json", "tiny-dp2.svg"]
    assert "Scaling efficiency" in (tmp_path / "scaling-runs" / "tiny-dp2.svg").read_text()


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_run(tmp_path):
    done = torchrun("scaling_worker.py", "--fail", str(tmp_path / "run.json"))
    assert done.returncode != 0
    assert "benchmarks.scaling: rank 1 of 2 failed: RuntimeError: planted" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_refusal_is_one_line_of_the_first_rank():
    done = torchrun("-m", "benchmarks.scaling", "--preset", "tiny", "--tensor-parallel", "4", cwd=harness.ROOT)
    assert done.returncode != 0 and done.stderr.count("benchmarks.scaling: settings: ") == 1
    assert "must be a multiple of 4, got 2" in done.stderr


@pytest.mark.slow
def test_a_sweep(tmp_path):
    command = [sys.executable, "-m", "benchmarks.scaling", "--sweep", "1,2", "--strong", "--along", "tp", "--preset", "tiny",
               "--iterations", "2", "--warmup", "1", "--out", str(tmp_path / "sweep"), "--device", "cpu"]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (scaling_run.load(tmp_path / "sweep" / f"{n}.json") for n in (1, 2))
    assert compare(two, one).strong == pytest.approx(one["median_ms"] / two["median_ms"] / 2)
    assert (one["environment"]["threads"], two["mesh"]["tp"]) == (two["environment"]["threads"], 2)
    assert f"{compare(two, one).strong:.1%}" in done.stdout and (tmp_path / "sweep" / "table.md").exists()
