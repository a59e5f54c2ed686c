"""How rows are measured, on CPU tensors and with events that are made up: what is timed, what is refused, which rows there are."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from dataclasses import replace

import pytest
import torch
from test_benchmarks import SMALL_CASES, one_thread
from test_benchmarks_clock import Stopwatch

import megatron_kernels as mk
from benchmarks import cases, cuda, harness, measure, ops, peers, shapes
from benchmarks.cases import Made, prepare
from benchmarks.cuda import EventClock
from benchmarks.device import Device
from benchmarks.harness import Contestant, Timing
from benchmarks.rows import Results
from benchmarks.shapes import Sizes

assert one_thread  # a fixture for every test here
OPS = [case.op for case in cases.CASES]
ENVIRONMENT = {"kind": "cuda", "date": "2026-01-01", "device": "Abacus 2000", "compute_capability": "9.0", "multiprocessors": 2,
               "memory_gib": 1.0, "l2_mib": 0.5, "driver": "1.2", "clocks": "SM 1 MHz of 2 MHz, memory 3 MHz, 4 W", "cuda": "13.0",
               "torch": torch.__version__, "triton": "3", "megatron_kernels": "0", "commit": "abc", "python": "3", "host": "x",
               "system": "y"}


def fake(event=Stopwatch, peak=lambda contestant: 2**20) -> Device:
    return Device("cpu", lambda: EventClock(torch.empty(4096), event), cuda.copying, peak, lambda: dict(ENVIRONMENT))


@pytest.fixture
def small(monkeypatch):
    """The benchmark of a GPU on small shapes of CPU tensors, by the reference: the op library is not what is tested here."""
    monkeypatch.setattr(shapes, "CASES", SMALL_CASES)
    monkeypatch.setattr(shapes, "GPT2", {"355M": (48, 3, 301), "8.3B": (24, 2, 37)})
    monkeypatch.setattr(shapes, "LENGTH", 6)
    monkeypatch.setattr(shapes, "CUDA", Sizes(batch=2, rows=6, elements=400, tokens=5))
    monkeypatch.setattr(measure, "PIECE", {"cpu": 200, "cuda": 200})

    def run(*arguments: str, on: Device | None = None) -> int:
        given = {"--columns": ["16", "64"], "--vocabulary": ["32"], "--peers": ["eager"], "--rounds": ["3"], "--seconds": ["0"],
                 "--device": ["cuda"], "--implementation": ["reference"]}
        filled = itertools.chain.from_iterable([name, *values] for name, values in given.items() if name not in arguments)
        return ops.main([*filled, *arguments], on or fake())

    return run


def arguments(*given: str) -> argparse.Namespace:
    return ops.parse(["--device", "cuda", *given])


def entries(*given: str) -> list[shapes.Entry]:
    return list(shapes.entries(arguments(*given)))


def stored(file) -> Results:
    return Results.from_json(json.loads(file.read_text()))


def test_shapes_of_a_gpu():
    everything = entries()
    by_columns = [entry for entry in everything if entry.group == "columns"]
    assert {entry.group for entry in everything} == set(shapes.SETS)
    assert sorted({entry.case.shape[1] for entry in by_columns}) == [2**n for n in range(8, 19)]
    assert len(by_columns) == 3 * 11 * len(OPS) and {entry.case.op for entry in by_columns} == set(OPS)
    assert all(4096 <= entry.case.shape[0] <= 32768 and torch.Size(entry.case.shape).numel() <= 2**30 for entry in by_columns)
    models = {(entry.case.op, entry.case.shape) for entry in everything if entry.group in ("main", "gpt2")}
    assert {("scaled_masked_softmax", (8, 12, 1024, 1024)), ("bias_gelu", (8192, 4096)), ("layer_norm", (8192, 3072)),
            ("cross_entropy", (8192, 50304)), ("cross_entropy", (8192, 51200)), ("bias_gelu", (8192, 6400))} <= models
    per_dtype = [(entry.group, entry.case.op, entry.case.shape) for entry in everything if entry.dtype == "bf16"]
    assert len(set(per_dtype)) == len(per_dtype)  # no shape twice in a set, nor in main and gpt2
    assert not {(op, shape) for group, op, shape in per_dtype if group == "main"} & \
        {(op, shape) for group, op, shape in per_dtype if group == "gpt2"}
    vocabulary = [entry.case.shape for entry in everything if entry.group == "vocabulary" and entry.dtype == "bf16"]
    assert vocabulary == [(8192, 2**n) for n in range(12, 19)]
    dtypes = [entry.dtype for entry in everything]
    assert dtypes == sorted(dtypes, key=["bf16", "fp32", "fp16"].index)


def test_shapes_of_a_cpu():
    def named(*given: str) -> list[shapes.Entry]:
        args = ops.parse(["--device", "cpu", *given])
        args.allocator = "reusing"
        return list(shapes.entries(args))

    everything, quick = named(), named("--quick")
    assert [(entry.case.op, entry.case.shape) for entry in quick if entry.dtype == "fp32"] == \
        [(case.op, case.shape) for case in cases.CASES]
    assert {entry.group for entry in everything} == set(shapes.SETS) and {entry.dtype for entry in everything} == {"fp32", "bf16"}
    compiled = {(entry.group, entry.dtype) for entry in everything if "compile" in entry.peers}
    assert compiled == {("main", "fp32"), ("main", "bf16")}  # for which there is time
    assert {entry.dtype for entry in quick if "compile" in entry.peers} == {"fp32"}
    assert all(entry.peers == ("compile",) for entry in named("--peers", "compile"))
    assert quick[0].share("forward") == 0.67 and quick[0].lead("forward") == 3.0 and quick[0].share("backward") is None
    assert all(entry.share("both") is None and entry.lead("both") is None for entry in everything if entry.group != "main")
    assert replace(quick[0], allocator="default").share("forward") is None


def test_quick_is_a_part():
    def names(*given: str) -> set[tuple]:
        return {(entry.name, entry.group) for entry in entries(*given)}

    quick = entries("--quick")
    assert {(entry.name, entry.group) for entry in quick} < names() and len(quick) < 35
    assert ("cross-entropy 8192x131072 bf16", "vocabulary") in names("--quick")
    assert sum("compile" in entry.peers for entry in quick) <= 5
    assert names("--shapes", "columns", "--columns", "512", "--ops", "layer_norm", "--dtypes", "fp16") == \
        {("layer norm 32768x512 fp16", "columns")}


def test_compile_where_it_was_not_asked_for_elsewhere():
    compiled = {(entry.group, entry.dtype, entry.case.shape[-1]) for entry in entries() if "compile" in entry.peers}
    assert {(dtype, columns) for group, dtype, columns in compiled if group == "columns"} == \
        {("bf16", columns) for columns in (256, 1024, 4096, 16384, 65536, 262144)}
    assert {dtype for group, dtype, _ in compiled if group == "main"} == {"bf16", "fp32"}
    assert all(entry.peers == ("compile",) for entry in entries("--peers", "compile"))


@pytest.mark.parametrize(("op", "dtype", "columns", "forward", "backward"), [
    ("scaled_masked_softmax", "bf16", 4096, 2, 3), ("scaled_masked_softmax", "bf16", 65536, 2, 3),
    ("scaled_masked_softmax", "bf16", 131072, 3, 5), ("scaled_masked_softmax", "fp32", 32768, 2, 3),
    ("layer_norm", "fp32", 65536, 3, 5), ("layer_norm", "fp16", 65536, 2, 3),
    ("bias_gelu", "fp32", 262144, 2, 3), ("cross_entropy", "fp32", 262144, 1, 2)])
def test_bytes_and_expected_shares_by_columns(op, dtype, columns, forward, backward):
    entry, = entries("--shapes", "columns", "--columns", str(columns), "--ops", op, "--dtypes", dtype)
    tensor = entry.case.shape[0] * columns * cases.DTYPES[dtype].itemsize
    assert [entry.nbytes(mode) / tensor for mode in cases.MODES] == [forward, backward, forward + backward]
    stays = (forward, backward) in ((2, 3), (1, 2))
    assert [entry.share(mode) for mode in cases.MODES] == ([0.9, 0.85, None] if stays else [None] * 3)


def test_nothing_is_expected_of_short_rows_and_single_shapes():
    short, *_ = entries("--shapes", "columns", "--columns", "2048")
    single, *_ = entries("--shapes", "main")
    assert short.share("forward") is single.share("forward") is single.lead("both") is None
    assert single.case.title == "causal softmax" and single.nbytes("backward") / single.nbytes("forward") == 2 / 1.5


def test_gradients_come_in_the_dtype_of_the_output(monkeypatch):
    case = SMALL_CASES[3]
    inputs, gradient = prepare(case, case.shape, torch.bfloat16, "cpu")
    assert gradient.shape == (12,) and gradient.dtype == torch.bfloat16
    seen, grad = [], torch.autograd.grad

    def watched(output, wanted, incoming):
        seen.append((output.dtype, incoming.dtype))
        return grad(output, wanted, incoming)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    for mode, function in itertools.product(("backward", "both"), (case.reference, case.eager)):
        measure.contestant_of("any", Made(function, inputs), gradient, mode).run()
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)] * 2
    without = Made(lambda logits, target: seen.append(logits.requires_grad), inputs)
    measure.contestant_of("any", without, gradient, "forward").run()
    assert seen[4:] == [False]


def test_table_csv_and_json(small, tmp_path, capsys):
    assert small("--dtypes", "bf16", "fp32", "--json", str(tmp_path / "new" / "r.json"), "--csv", str(tmp_path / "r.csv")) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("causal softmax", "cross-entropy", "2x3x6x6", "bf16 by columns", "fp32 by columns",
                                            "by vocabulary", "of copy", "Abacus 2000", "driver 1.2", "SM 1 MHz"))
    text = (tmp_path / "new" / "r.json").read_text()
    results = stored(tmp_path / "new" / "r.json")
    assert results.as_json() == json.loads(text) and results.environment == ENVIRONMENT
    assert [(row.dtype, row.group, row.op, tuple(row.shape), row.mode) for row in results.rows] == [
        (entry.dtype, entry.group, entry.case.op, entry.case.shape, mode)
        for entry in entries("--dtypes", "bf16", "fp32", "--columns", "16", "64", "--vocabulary", "32") for mode in cases.MODES]
    assert {row.group for row in results.rows} == set(shapes.SETS)
    assert all(list(row.timings) == ["copy", "ours", "eager"] for row in results.rows)
    assert all(timing.samples == 3 and timing.median > 0 for row in results.rows for timing in row.timings.values())
    assert all(row.peak == {"ours": 2**20, "eager": 2**20} for row in results.rows)
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * len(results.rows) and {line["driver"] for line in lines} == {"1.2"}
    row, line = results.rows[0], next(line for line in lines if line["contestant"] == "ours")
    assert float(line["of_copy"]) == pytest.approx(row.share, rel=1e-3) and line["checked"] == "float64"
    assert float(line["gb_per_s"]) == pytest.approx(row.bytes / row.timings["ours"].median / 1e6, rel=1e-3)
    assert line["peak_mib"] == "1.00"


def test_a_cpu_has_rows_in_cache_and_sittings(small, tmp_path, monkeypatch):
    """Two sittings with inputs made anew and one check; the piece in cache is timed warm."""
    checks, made = [], []
    check, prepare = cases.Truth.mismatch, measure.prepare
    monkeypatch.setattr(cases.Truth, "mismatch", lambda self, *rest: checks.append(1) or check(self, *rest))
    monkeypatch.setattr(measure, "prepare", lambda *rest: made.append(rest[1]) or prepare(*rest))
    for name, value in harness.REUSING_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    assert small("--device", "cpu", "--allocator", "reusing", "--shapes", "main", "--ops", "layer_norm", "--dtypes", "fp32",
                 "--modes", "both", "--threads", "1", "--json", str(tmp_path / "r.json")) == 0
    row, = stored(tmp_path / "r.json").rows
    assert list(row.timings) == ["copy", "in cache", "ours", "eager"] and row.allocator == "reusing"
    assert all(timing.samples == 6 for timing in row.timings.values())
    assert len(checks) == 1 and len(made) == 4  # the op and its piece, in each sitting


class Tick(Stopwatch):
    """Every step takes a millisecond, and the host is always late."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end) -> float:
        return 1.0


def test_copy_to_scale_and_late_contestants(small, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "COPY", 100)
    assert small("--shapes", "columns", "--columns", "16", "--rounds", "2", "--dtypes", "fp32", "--json", str(tmp_path / "r.json"),
                 on=fake(Tick)) == 0
    rows = stored(tmp_path / "r.json").rows
    assert len(rows) == 3 * len(OPS) and all(row.timings["ours"] == Timing(1.0, 1.0, 1.0, 2, 1.0, 1.0) for row in rows)
    assert [row.share for row in rows] == [row.bytes / 2 / 100 for row in rows] and rows[0].bytes == 2 * 6 * 16 * 4
    assert all(sorted(row.late) == ["copy", "eager", "ours"] for row in rows)


def test_wrong_op_is_not_timed(small, tmp_path, monkeypatch, capsys):
    wrong = replace(SMALL_CASES[1], ours=lambda x, bias: 1.1 * mk.bias_gelu(x, bias))
    monkeypatch.setattr(shapes, "CASES", [wrong, SMALL_CASES[2]])
    monkeypatch.setattr(harness, "ROOT", tmp_path)  # where there is no README to write
    assert small("--dtypes", "fp32", "--json", str(tmp_path / "r.json"), "--readme") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "bias-GeLU 12x192 fp32 forward/backward/both" in shown and "is wrong, so it was not timed: output[" in shown
    rows = stored(tmp_path / "r.json").rows
    assert all(bool(row.timings) == (row.op == "layer_norm") == (not row.failure) for row in rows)


def test_op_that_cannot_be_launched_is_wrong(small, monkeypatch, capsys):
    def broken(x, bias):
        raise RuntimeError("bias_gelu: CUDA error\nand a stack")

    monkeypatch.setattr(shapes, "CASES", [replace(SMALL_CASES[1], ours=broken)])
    assert small("--dtypes", "fp32") == 1
    assert "is wrong, so it was not timed: RuntimeError: bias_gelu: CUDA error" in " ".join(capsys.readouterr().out.split())


def test_shapes_that_do_not_fit_are_skipped_by_name(small, tmp_path, monkeypatch, capsys):
    """Out of memory: our op at 64 columns, and eager's backward at the others."""
    def ours(x, weight, bias):
        if x.shape[-1] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return mk.layer_norm(x, weight, bias)

    def eager(x, weight, bias):
        if x.requires_grad and len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return SMALL_CASES[2].eager(x, weight, bias)

    monkeypatch.setattr(shapes, "CASES", [replace(SMALL_CASES[2], ours=ours, eager=eager)])
    assert small("--dtypes", "bf16", "--shapes", "main", "columns", "--json", str(tmp_path / "r.json"), "--csv",
                 str(tmp_path / "r.csv")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Skipped, out of memory: layer norm 6x64 bf16 forward/backward/both" in shown
    assert "eager is missing (out of memory): layer norm 12x48 bf16" in shown
    rows = stored(tmp_path / "r.json").rows
    assert [(row.shape[-1], sorted(row.timings), row.skipped) for row in rows if row.mode == "both"] == \
        [(48, ["copy", "ours"], ""), (16, ["copy", "ours"], ""), (64, [], "out of memory")]
    with (tmp_path / "r.csv").open() as file:
        remarks = [(line["shape"], line["contestant"]) for line in csv.DictReader(file) if line["remark"] == "out of memory"]
    assert ("6x64", "ours") in remarks and ("6x16", "eager") in remarks


def test_op_that_does_not_fit_when_it_is_timed_is_skipped(small, monkeypatch, capsys):
    def ours(x, bias):
        if not x.requires_grad:  # as only the forward is run
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return mk.bias_gelu(x, bias)

    monkeypatch.setattr(shapes, "CASES", [replace(SMALL_CASES[1], ours=ours)])
    assert small("--dtypes", "bf16", "--shapes", "main", "--modes", "both", "forward") == 0
    assert "Skipped, out of memory: bias-GeLU 12x192 bf16 forward" in capsys.readouterr().out


def test_peer_that_does_not_compile_is_left_out(small, tmp_path, monkeypatch):
    def compile(function, **options):
        def compiled(*inputs):
            raise ImportError("no Triton here")
        return compiled if function is SMALL_CASES[0].eager else function

    monkeypatch.setattr(torch, "compile", compile)
    assert small("--ops", "scaled_masked_softmax", "--dtypes", "fp32", "--shapes", "main", "--peers", "eager", "compile",
                 "--json", str(tmp_path / "r.json")) == 0
    for row in stored(tmp_path / "r.json").rows:
        assert row.missing == {"compile": "ImportError: no Triton here"}
        assert row.peers == ["eager", "compile, mask from indices"] and row.libraries == []


def test_inexact_peer_is_timed_and_marked(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "CASES", [replace(SMALL_CASES[1], eager=lambda x, bias: 1.1 * SMALL_CASES[1].eager(x, bias))])
    assert small("--dtypes", "fp32", "--shapes", "main", "--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")) == 0
    assert "* eager is further from float64 than a peer should be: bias-GeLU 12x192 fp32 forward/backward/both (output[" in \
        " ".join(capsys.readouterr().out.split())
    assert all(row.inexact["eager"].startswith("output[") and "eager" in row.timings for row in stored(tmp_path / "r.json").rows)
    with (tmp_path / "r.csv").open() as file:
        assert {line["checked"] for line in csv.DictReader(file) if line["contestant"] == "eager"} == {"inexact"}


def test_what_time_is_short_for_is_named(small, capsys):
    assert small("--minutes", "0", "--ops", "layer_norm", "--dtypes", "bf16") == 0
    assert "Skipped, time was up: layer norm 12x48 bf16 forward/backward/both, layer norm 12x24" in " ".join(
        capsys.readouterr().out.split())


def test_interruption_keeps_what_is_there(small, tmp_path, monkeypatch):
    def eager(x, bias):
        if x.shape[-1] == 64:
            raise KeyboardInterrupt
        return SMALL_CASES[1].eager(x, bias)

    monkeypatch.setattr(shapes, "CASES", [replace(SMALL_CASES[1], eager=eager)])
    assert small("--dtypes", "bf16", "fp32", "--shapes", "columns", "--json", str(tmp_path / "r.json")) == 0
    rows = stored(tmp_path / "r.json").rows
    assert [bool(row.timings) for row in rows[::3]] == [True, False, False, False]
    assert {row.skipped for row in rows[3:]} == {"interrupted"}


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.main(["--device", "cuda"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith("benchmarks.ops: --device cuda: torch ")
    assert ops.main(["--device", "cuda", "--implementation", "abacus"], fake()) == 1
    assert "--implementation abacus: unknown implementation" in capsys.readouterr().err
    assert ops.parse([]).device == "cpu"


def test_defaults_by_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu, gpus = ops.parse(["--device", "cpu"]), ops.parse([])
    assert (gpus.device, gpus.implementation, gpus.dtypes) == ("cuda", "cuda", ["bf16", "fp32", "fp16"])
    assert (cpu.implementation, cpu.dtypes, cpu.modes) == ("cpu", ["fp32", "bf16"], ["forward", "backward", "both"])
    assert cpu.peers == ("eager", "compile") and gpus.peers == peers.NAMES and (cpu.sittings, gpus.sittings) == (2, 1)


def test_contestants_of_a_forward_run_without_gradients(small, monkeypatch):
    """A module's own parameters would make a graph even where the inputs ask for none."""
    seen = set()

    def eager(x, bias):
        seen.add((torch.is_grad_enabled(), x.requires_grad))
        return SMALL_CASES[1].eager(x, bias)

    monkeypatch.setattr(shapes, "CASES", [replace(SMALL_CASES[1], eager=eager)])
    entry = replace(entries("--shapes", "main", "--ops", "bias_gelu")[0], peers=("eager",))
    job = measure.Job(entry, arguments("--seconds", "0"), fake())
    job.checked = True
    with mk.use("reference"):
        job.sit(lambda text: seen.clear() if text.endswith("forward") else seen.add(text))
    assert {entry for entry in seen if isinstance(entry, tuple)} == {(False, False), (True, True)}


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    assert ops.main(["--device", "cuda", "--peers", "eager", "--columns", "256", "4096", "--shapes", "columns", "--rounds", "3",
                     "--seconds", "0", "--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]) == 0
    results = stored(tmp_path / "r.json")
    assert len(results.rows) == 2 * len(OPS) * 9 and all(list(row.timings) == ["copy", "ours", "eager"] for row in results.rows)
    assert results.environment["device"] == torch.cuda.get_device_name()
    assert all(0.01 < row.share < 2 and row.peak["ours"] > 0 for row in results.rows)


def test_flush_of_a_step_that_has_a_setup():
    numbers = itertools.count()
    seen: list[int] = []
    backward = Contestant("backward", seen.append, setup=lambda: next(numbers))
    harness.interleave([backward], seconds=0, min_rounds=3, warmup=1, clock=fake().clock())
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(("shares", "kept"), [([0.01], 0.01), ([0.3, 0.02], 0.02), ([0.3, 0.2, 0.25], 0.2), ([None], None)])
def test_a_disturbed_sitting_is_taken_again(small, tmp_path, shares, kept):
    """At most twice; the quietest counts, with its own samples."""
    asked, sittings = iter(shares), []

    class Numbered(EventClock):
        """Its times tell which sitting they are of."""

        def __call__(self, contestant: Contestant) -> float:
            super().__call__(contestant)
            return float(len(sittings))

    def others():
        sittings.append(next(asked))
        return lambda share=sittings[-1]: share

    device = replace(fake(), clock=lambda: Numbered(torch.empty(4096), Stopwatch), others=others)
    assert small("--ops", "layer_norm", "--dtypes", "fp32", "--shapes", "columns", "--columns", "16", "--modes", "forward",
                 "--json", str(tmp_path / "r.json"), on=device) == 0
    row, = stored(tmp_path / "r.json").rows
    assert sittings == shares and row.others == kept and row.timings["ours"].median == 1 + shares.index(kept)
