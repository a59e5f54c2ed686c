"""benchmarks.plan's times: from rates whose answer is known, and beside runs whose times are known."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import plan, plan_report, plan_time, plan_trace, rates, scaling_run
from benchmarks.plan_time import BEYOND, INTERPOLATED, MEASURED, Rates
from benchmarks.plan_trace import Collective, Product, Trace
from benchmarks.trainer import PRESETS, Settings

SPEED, COPY, LAUNCH, LATENCY, BANDWIDTH = 5e9, 2e10, 3e-6, 4e-5, 1e9
ENVIRONMENT = {"kind": "cpu", "device": "a processor", "threads": 1}
SETTINGS = replace(PRESETS["tiny"], tensor_parallel=2)


def seconds_of(*sizes: int) -> float:
    product = 2.0
    for size in sizes:
        product *= size
    return product / SPEED


def file_of_rates(**changes) -> dict:
    """Products all at one speed, collectives of a latency and a bandwidth."""
    shapes = [(m, n, k) for m in (16, 300, 5000) for n in (16, 300, 5000) for k in (16, 300, 5000)]
    return {"kind": rates.KIND, "environment": ENVIRONMENT, "world": 2, "presets": ["tiny"],
            "matmul": [{"m": m, "n": n, "k": k, "dtype": "fp32", "seconds": seconds_of(m, n, k)} for m, n, k in shapes],
            "batched_matmul": [{"batch": b, "m": m, "n": n, "k": k, "dtype": "fp32", "seconds": seconds_of(b, m, n, k)}
                               for b in (2, 64) for m, n, k in shapes],
            "collectives": [{"kind": kind, "ranks": 2, "bytes": 4 ** i, "dtype": "fp32", "seconds": LATENCY + 4 ** i / BANDWIDTH}
                            for kind in ("all_reduce", "all_gather", "reduce_scatter", "send") for i in range(5, 12)],
            "copy_bytes_per_second": COPY, "launch": {"op": "add_", "seconds": LAUNCH}, **changes}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(file_of_rates()))
    return path


def test_known_rates_give_the_known_time(path):
    found = plan_trace.trace(SETTINGS, 4, target="cpu")
    times = plan_time.estimate([found], SETTINGS, Rates.load(path))
    assert times.products == pytest.approx(found.total_flops / SPEED)
    assert times.others == pytest.approx(sum(found.moved.values()) / COPY)
    assert times.launches == pytest.approx(sum(found.ops.values()) * LAUNCH)
    for group in ("tp", "dp"):
        expected = sum(count * (LATENCY + max(one.bytes, 4 ** 5) / BANDWIDTH) for one, count in found.collectives.items()
                       if one.group == group)
        assert times.communication[group] == pytest.approx(expected)
    assert times.total == pytest.approx(times.products + times.others + times.launches + sum(times.communication.values()))
    assert times.beyond == [] and times.bubble == 0
    backward = sum(count * (LATENCY + one.bytes / BANDWIDTH) for one, count in found.collectives.items()
                   if (one.group, one.phase) == ("dp", "backward"))
    assert times.hidden == pytest.approx(backward)
    assert sum(times.found.values()) == pytest.approx(1)


def test_products_are_looked_up_before_they_are_interpolated(path):
    data = file_of_rates()
    data["matmul"][3]["seconds"] = 7.0
    shape = tuple(data["matmul"][3][name] for name in ("m", "n", "k"))
    path.write_text(json.dumps(data))
    known = Rates.load(path)
    assert known.product(Product(1, *shape, "fp32")) == (7.0, MEASURED)
    turned = Product(1, 100, 120, 140, "fp32")
    seconds, way = known.product(turned)
    assert way == INTERPOLATED and seconds > seconds_of(100, 120, 140)  # the slow one is heard, a little
    assert seconds < 7.0
    known.products["fp32", 3][100, 120, 140] = 1.5
    assert known.product(turned) == known.product(Product(1, 120, 100, 140, "fp32")) == (1.5, MEASURED)
    assert known.product(Product(1, 100, 120, 140_000, "fp32"))[1] == BEYOND
    near = known.product(Product(1, 101, 121, 141, "fp32"))[0]
    assert near == pytest.approx(1.5, rel=0.1)  # beside a measured one


@pytest.mark.parametrize(("count", "seconds", "way"), [
    (4 ** 6, LATENCY + 4 ** 6 / BANDWIDTH, MEASURED), (5000, LATENCY + 5000 / BANDWIDTH, INTERPOLATED),
    (8, LATENCY + 4 ** 5 / BANDWIDTH, MEASURED), (4 ** 12, 4 * (LATENCY + 4 ** 11 / BANDWIDTH), BEYOND)])
def test_collectives_between_and_beyond(path, count, seconds, way):
    found = Rates.load(path).collective(Collective("forward", "all_reduce", "tp", 2, count))
    assert found == (pytest.approx(seconds), way)


@pytest.mark.parametrize(("one", "says"), [
    (Collective("forward", "all_gather", "tp", 8, 64), "no all_gather among 8 ranks was measured"),
    (Product(1, 16, 16, 16, "bf16"), "no product in bf16 was measured"),
    (Product(4, 16, 16, 16, "fp16"), "no batched product in fp16 was measured")])
def test_what_nobody_measured_is_refused(path, one, says):
    known = Rates.load(path)
    with pytest.raises(ValueError, match=says):
        known.collective(one) if isinstance(one, Collective) else known.product(one)


def test_sends_and_broadcasts(path):
    known = Rates.load(path)
    assert known.collective(Collective("schedule", "send", "pp", 16, 4 ** 8))[0] == pytest.approx(LATENCY + 4 ** 8 / BANDWIDTH)
    assert known.collective(Collective("schedule", "broadcast", "pp", 2, 4)) == known.collective(
        Collective("forward", "all_reduce", "tp", 2, 4))


@pytest.mark.parametrize(("changes", "share"), [
    ({"pipeline_parallel": 1}, 0), ({"schedule": "GPipe"}, 3 / 8), ({"schedule": "1F1B"}, 3 / 8),
    ({"schedule": "Interleaved1F1B"}, 3 / 16), ({"schedule": "ZBVZeroBubble"}, 0)])
def test_a_pipeline_waits(path, changes, share):
    settings = replace(SETTINGS, **{"pipeline_parallel": 4, "microbatches": 8, "batch": 8, **changes})
    assert plan_time.idle_share(settings) == share
    trace = Trace(0, {}, [], flops=Counter(forward=10), products=Counter({Product(1, 300, 300, 300, "fp32"): 10}),
                  moved=Counter(update=int(COPY)))
    times = plan_time.estimate([trace], settings, Rates.load(path))
    assert times.bubble == pytest.approx(10 * seconds_of(300, 300, 300) * share)
    assert times.total == pytest.approx(10 * seconds_of(300, 300, 300) * (1 + share) + 1)


def test_a_gpu_works_while_ops_are_called(path):
    path.write_text(json.dumps(file_of_rates(environment={**ENVIRONMENT, "kind": "cuda"})))
    known = Rates.load(path)
    busy = Trace(0, {}, [], products=Counter({Product(1, 5000, 5000, 5000, "fp32"): 1}), ops=Counter(forward=100))
    idle = Trace(0, {}, [], products=Counter({Product(1, 16, 16, 16, "fp32"): 100}), ops=Counter(forward=100))
    assert plan_time.estimate([busy], SETTINGS, known).total == pytest.approx(seconds_of(5000, 5000, 5000))
    assert plan_time.estimate([idle], SETTINGS, known).total == pytest.approx(200 * LAUNCH)
    assert plan_time.estimate([busy, idle], SETTINGS, known).total == pytest.approx(seconds_of(5000, 5000, 5000))


def test_bytes_that_ops_move():
    """Read and written once each; nothing for views, memory nobody wrote, and what an op overwrites without reading."""
    recorder = plan_trace._Recorder()
    x, y, total = torch.ones(1000), torch.ones(1000), torch.zeros(1000)
    for step, expected in ((lambda: x + 1, 8000), (lambda: x.add_(y), 12000), (lambda: x.view(10, 100).t(), 0),
                           (lambda: torch.empty(1000), 0), (lambda: x.copy_(y), 8000), (lambda: x.zero_(), 4000),
                           (lambda: torch.add(x, y, out=total), 12000), (lambda: torch.ones(1)[0].expand(1000).clone(), 4008)):
        recorder.found = Trace(0, {}, [])
        with recorder:
            step()
        assert recorder.found.moved["forward"] == expected


@pytest.mark.parametrize(("text", "says"), [
    ("{", "no JSON"), ("[]", "got 'list'"), ('{"kind": "else"}', "got 'else'"),
    (json.dumps({"kind": rates.KIND}), "lack 'matmul'"),
    (json.dumps(file_of_rates(copy_bytes_per_second=0)), "must be positive, got 0"),
    (json.dumps(file_of_rates(matmul=[{"m": 1, "n": 1, "k": 1, "dtype": "fp32", "seconds": "fast"}])), "got 'fast'"),
    (json.dumps(file_of_rates(collectives=3)), "unexpected form")])
def test_what_is_no_file_of_rates(path, capsys, text, says):
    path.write_text(text)
    assert plan.main(["--rates", str(path)]) == 2
    err = capsys.readouterr().err
    assert says in err and str(path) in err and err.count("\n") == 1


def file_of_a_run(settings: Settings, world: int, seconds: float, others: float = 0.01, **environment) -> dict:
    return {"others": others, "kind": scaling_run.KIND, "environment": {**ENVIRONMENT, **environment},
            "settings": settings.as_json(), "world": world,
            "mesh": {"pp": settings.pipeline_parallel, "dp": settings.replicas(world), "tp": settings.tensor_parallel},
            "median_ms": seconds * 1e3}


def test_measured_runs_beside_the_model(path, tmp_path, capsys):
    settings = replace(SETTINGS, hidden=128)
    modelled = plan_time.estimate([plan_trace.trace(settings, 2, target="cpu")], settings, Rates.load(path)).total
    for name, run in {"one": file_of_a_run(settings, 2, modelled / 1.25), "two": file_of_a_run(SETTINGS, 2, 1.0, threads=4),
                      "three": file_of_a_run(replace(SETTINGS, dtype="bf16"), 2, 1.0, others=0.4)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    code = plan.main(["--rates", str(path), "--json", str(tmp_path / "out.json"), "--check",
                      *(str(tmp_path / f"{name}.json") for name in ("one", "two", "three"))])
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and "ranks" not in data
    one, two, three = data["check"]
    assert one["error"] == pytest.approx(0.25) and one["measured_seconds"] == pytest.approx(modelled / 1.25)
    assert two["modelled"] is None and two["why"] == "threads is 4, of the rates 1"
    assert three["error"] is None and "no product in bf16 was measured" in three["why"]
    assert "+25%" in out and "25% on average, at most 25%, of 1 runs" in out and "threads is 4" in out
    assert "three: other processes took 40% of the processors" in out and "one: other" not in out
    assert "Rank 0" not in out  # nothing was asked about a run to come


def test_command_with_rates(path, tmp_path, capsys):
    code = plan.main(["--preset", "tiny", "--target", "cpu", "--rates", str(path), "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    modelled = json.loads((tmp_path / "out.json").read_text())["modelled"]
    assert code == 0 and "Modelled, not measured" in out and f"{modelled['total'] * 1e3:,.2f}" in out
    assert "communication" not in out and modelled["communication"] == {}


def test_a_file_that_is_no_run(path, capsys):
    assert plan.main(["--rates", str(path), "--check", str(path)]) == 2
    assert "expected a run" in capsys.readouterr().err


def test_extrapolation_is_named(path):
    trace = Trace(0, {}, [], products=Counter({Product(1, 16, 16, 10 ** 6, "fp32"): 1, Product(3, 8, 16, 16, "fp32"): 1}),
                  collectives=Counter({Collective("forward", "all_reduce", "tp", 2, 10 ** 9): 1}))
    times = plan_time.estimate([trace], SETTINGS, Rates.load(path))
    assert times.beyond == ["all_reduce of 1000000000 bytes among 2 ranks", "product [16, 1000000] @ [1000000, 16] in fp32",
                            "product 3 x [8, 16] @ [16, 16] in fp32"]
    notes = list(plan_report.time_notes(times))
    assert "100% from extrapolated ones" in notes[0] and "all_reduce of 1000000000 bytes" in notes[1]
