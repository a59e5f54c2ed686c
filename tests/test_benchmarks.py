"""The benchmark measures what it says: fair turns, the same computation by every contestant, and nothing for a wrong op."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import megatron_kernels as mk
from benchmarks import harness, ops, report
from benchmarks.harness import Contestant, Timing, interleave, quantile

SMALL = {"scaled_masked_softmax": (2, 3, 17, 17), "bias_gelu": (33, 40), "layer_norm": (32, 48), "cross_entropy": (12, 301)}
CASES = [replace(case, shape=SMALL[case.op], piece=SMALL[case.op]) for case in ops.CASES]
by_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)


@pytest.fixture
def small(monkeypatch):
    """The benchmark on small shapes, in this process, by the reference: the C++ library is not what is tested here."""
    monkeypatch.setattr(ops, "CASES", CASES)
    for name, value in harness.REUSING_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()

    def run(*arguments: str) -> int:
        return ops.main(["--implementation", "reference", "--allocator", "reusing", "--rounds", "3", "--seconds", "0",
                         "--peers", "eager", *arguments])

    yield run
    torch.set_num_threads(threads)


def test_quantiles():
    samples = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert [quantile(samples, q) for q in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert Timing.of(samples) == Timing(3.0, quantile(samples, 0.2), quantile(samples, 0.8), 5)
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_contestants_take_turns():
    calls: list[str] = []
    contestants = [Contestant(name, lambda name=name: calls.append(name)) for name in "abc"]
    timings = interleave(contestants, seconds=0, min_rounds=20, warmup=1)
    rounds = [calls[i:i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 21 and all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1  # not always behind the same neighbour
    assert {name: timing.samples for name, timing in timings.items()} == {"a": 20, "b": 20, "c": 20}
    with pytest.raises(ValueError, match="names repeat"):
        interleave([contestants[0]] * 2, seconds=0, min_rounds=1)


def test_time_and_rounds_bound_a_measurement():
    ticks = iter(range(1000))
    nothing = Contestant("a", lambda: None)
    timings = interleave([nothing], seconds=60, min_rounds=2, max_rounds=5, clock=lambda step: next(ticks))
    assert timings["a"] == Timing(2.0, 0.8, 3.2, 5)


def test_warm_contestant_runs_right_before_it_is_timed():
    calls: list[str] = []
    cold, warm = (Contestant(name, lambda name=name: calls.append(name), warm=name == "warm") for name in ("cold", "warm"))
    timings = interleave([cold, warm], seconds=0, min_rounds=4, warmup=0)
    assert calls.count("cold") == 4 and calls.count("warm") == 8 and timings["warm"].samples == 4
    assert "warm,warm" in ",".join(calls)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system keeps no account there")
def test_others_are_seen_and_we_are_not():
    def spin(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    share = harness.others()
    spin(0.5)
    alone = share()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        share = harness.others()
        time.sleep(1)
        beside = share()
    finally:
        busy.kill()
        busy.wait()
    assert beside > 0.4 / os.cpu_count()  # half of one processor at least, also where others compete for it
    assert 0 <= alone <= 1 - 0.2 / os.cpu_count()


def test_allocator_environment():
    env = {"HOME": "x", "MALLOC_TRIM_THRESHOLD_": "1"}
    assert not harness.is_reusing_allocator(env)
    reusing = harness.allocator_environment(True, env)
    assert harness.is_reusing_allocator(reusing) and reusing["HOME"] == "x"
    assert harness.allocator_environment(False, reusing) == {"HOME": "x"}


def test_bytes():
    elements = 2 * 16 * 1024 * 1024
    softmax, gelu, norm, entropy = ops.CASES
    assert softmax.nbytes(torch.float32, "forward") == elements * 4 * 1.5  # half is not read
    assert softmax.nbytes(torch.float32, "both") == elements * 4 * 3.5
    assert gelu.nbytes(torch.bfloat16, "both") == 2048 * 4096 * 2 * 5
    assert norm.nbytes(torch.bfloat16, "forward") == 4096 * 1024 * 2 * 2
    assert entropy.nbytes(torch.float32, "forward") == 512 * 50304 * 4


@by_op
def test_every_contestant_computes_the_op(case):
    """In float32: in 16 bits eager rounds after every step, and sums some parameter gradients in 16 bits."""
    torch.manual_seed(0)
    inputs = ops.with_gradients(case.inputs(case.shape, torch.float32, "cpu"), "both")
    gradient = ops.incoming_gradient(case, inputs, "both")
    for function in (case.eager, *case.variants.values()):
        assert ops.mismatch(case, function, inputs, gradient, slack=8) == ""
    assert len(ops.results(case.eager, inputs, gradient)) == 1 + sum(x.is_floating_point() for x in inputs)


@by_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [0, 1], ids=["output", "gradient"])
def test_check_finds_one_wrong_element(case, dtype, at):
    """An error of a quarter in one element of the result or of the first gradient, however small that element."""
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return spoil(x) if at == 0 else x.clone()

        @staticmethod
        def backward(ctx, dx):
            return spoil(dx) if at == 1 else dx

    def spoil(x):
        x = x.clone()
        x.view(-1)[-1] *= 1.25
        return x

    def wrong(first, *rest):
        return Wrong.apply(case.reference(first, *rest)) if at == 0 else case.reference(Wrong.apply(first), *rest)

    torch.manual_seed(1)
    inputs = ops.with_gradients(case.inputs(case.shape, dtype, "cpu"), "both")
    gradient = ops.incoming_gradient(case, inputs, "both")
    assert ops.mismatch(case, case.reference, inputs, gradient, slack=4) == ""
    assert "times the tolerance" in ops.mismatch(case, wrong, inputs, gradient)


def test_nan_is_a_mismatch():
    case = CASES[1]
    inputs = ops.with_gradients(case.inputs(case.shape, torch.float32, "cpu"), "forward")
    assert "is nan" in ops.mismatch(case, lambda x, bias: case.reference(x, bias) * float("nan"), inputs, None)


def test_table_csv_and_json(small, tmp_path, capsys):
    assert small("--json", str(tmp_path / "new" / "r.json"), "--csv", str(tmp_path / "r.csv")) == 0
    (tmp_path / "new" / "r.json").rename(tmp_path / "r.json")
    shown = capsys.readouterr().out
    assert all(case.title in shown for case in CASES) and "torch " + torch.__version__ in shown
    results = report.Results.from_json(json.loads((tmp_path / "r.json").read_text()))
    assert [(row.op, row.dtype, row.mode) for row in results.rows] == \
        [(case.op, dtype, mode) for case in CASES for dtype in ("fp32", "bf16") for mode in ("forward", "both")]
    assert all(set(row.timings) == {"floor", "in cache", "ours", "eager"} for row in results.rows)
    assert all(timing.samples == 3 for row in results.rows for timing in row.timings.values())
    assert results.as_json() == json.loads((tmp_path / "r.json").read_text())
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * len(results.rows)
    first = results.rows[0].timings["ours"]
    line = next(line for line in lines if line["contestant"] == "ours")
    assert float(line["median_ms"]) == pytest.approx(first.median, rel=1e-3) and line["torch"] == torch.__version__


def test_wrong_op_is_not_timed(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "CASES", [replace(CASES[0], ours=lambda x, future: mk.scaled_masked_softmax(x)), CASES[1]])
    assert small("--dtypes", "fp32", "--json", str(tmp_path / "r.json")) == 1
    assert "is wrong, so it was not timed" in capsys.readouterr().out
    wrong, right = report.Results.from_json(json.loads((tmp_path / "r.json").read_text())).rows[::2]
    assert wrong.failure and not wrong.timings
    assert right.timings and not right.failure


def test_unknown_implementation(small, capsys):
    assert ops.main(["--implementation", "abacus", "--allocator", "reusing"]) == 1
    assert "unknown implementation" in capsys.readouterr().err


def test_limits():
    row = report.Row("bias_gelu", "bias-GeLU", [8, 8], "bf16", "both", 640.0, "reusing",
                     {name: Timing(ms, ms, ms, 3) for name, ms in
                      {"floor": 1, "in cache": 1, "ours": 2, "eager": 7, "compile": 5, "another way": 1}.items()})
    assert (row.times_floor, row.floor_limit, row.lead_over_best, row.lead) == (2.0, 2.5, 2.5, 3.0)
    assert report.against(row.times_floor, row.floor_limit, at_most=True) == "2.00 ≤2.5 ✓"
    assert report.against(row.lead_over_best, row.lead, at_most=False) == "2.50 ≥3 ✗"
    assert row.gigabytes_per_second("ours") == pytest.approx(640 / 2e-3 / 1e9)
    ungoverned = replace(row, allocator="default")
    assert ungoverned.floor_limit is None and ungoverned.lead is None


def test_readme_section_is_replaced(small, tmp_path):
    assert small("--ops", "layer_norm", "--json", str(tmp_path / "r.json")) == 0
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    results = report.Results.from_json(json.loads((tmp_path / "r.json").read_text()))
    busy, results = (replace(results, rows=[replace(row, others=share) for row in results.rows]) for share in (0.3, 0.01))
    with pytest.raises(ValueError, match="took 30% of the processors"):
        report.write_readme(readme, busy)
    report.write_readme(readme, results)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| layer norm |") == 4
    report.write_readme(readme, results)
    assert readme.read_text() == text
    readme.write_text("nothing here\n")
    with pytest.raises(ValueError, match="expected the lines"):
        report.write_readme(readme, results)


def test_environment_names_the_machine():
    e = harness.environment()
    assert e.device and e.threads == torch.get_num_threads() and e.torch == torch.__version__
    assert e.commit == "unknown" or len(e.commit.rstrip("+")) >= 7
    assert os.fspath(harness.ROOT / "benchmarks") == os.path.dirname(harness.__file__)
