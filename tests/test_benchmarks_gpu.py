"""The GPU benchmark, on CPU tensors and with events that are made up: what is timed, what is refused, and what the tables say."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from dataclasses import replace

import pytest
import torch
from test_benchmarks_clock import Stopwatch

import megatron_kernels as mk
from benchmarks import cases, cuda, gpu, gpu_report, harness, ops, report
from benchmarks.harness import Timing

OPS = [case.op for case in cases.CASES]
SMALL = {"scaled_masked_softmax": ((2, 3, 17, 17),), "bias_gelu": ((33, 40),), "layer_norm": ((32, 48),),
         "cross_entropy": ((12, 301),)}
SMALL_CASES = [replace(case, shape=SMALL[case.op][0]) for case in cases.CASES]
ENVIRONMENT = {"kind": "cuda", "date": "2026-01-01", "device": "Abacus 2000", "compute_capability": "9.0", "multiprocessors": 2,
               "memory_gib": 1.0, "l2_mib": 0.5, "driver": "1.2", "clocks": "SM 1 MHz of 2 MHz, memory 3 MHz, 4 W", "cuda": "13.0",
               "torch": torch.__version__, "triton": "3", "megatron_kernels": "0", "commit": "abc", "python": "3", "host": "x",
               "system": "y"}


DEVICE = cuda.Device("cpu", 4096, Stopwatch, lambda: None, lambda: None, lambda: dict(ENVIRONMENT))


@pytest.fixture(autouse=True)
def one_thread():
    """Several take longer over so little, where others want the processors too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    """The benchmark on small shapes of CPU tensors, by the reference: the op library is not what is tested here."""
    monkeypatch.setattr(gpu, "CASES", SMALL_CASES)
    monkeypatch.setattr(gpu, "GPT2", SMALL)
    monkeypatch.setattr(gpu, "ROWS", 6)
    monkeypatch.setattr(gpu, "PIECE", 200)
    def run(*arguments: str) -> int:
        given = {"--columns": ["16", "64"], "--peers": ["eager"], "--rounds": ["3"], "--seconds": ["0"]}
        filled = itertools.chain.from_iterable([name, *values] for name, values in given.items() if name not in arguments)
        return gpu.main(ops.parse(["--device", "cuda", "--implementation", "reference", *filled, *arguments]), DEVICE)

    return run


def arguments(*given: str) -> argparse.Namespace:
    return ops.parse(["--device", "cuda", *given])


def timings(**milliseconds: float) -> dict[str, Timing]:
    return {name: Timing(ms, ms, ms, 3) for name, ms in milliseconds.items()}


def test_shapes():
    all_of_them = list(gpu.entries(arguments()))
    by_columns = [entry for entry in all_of_them if entry.group == "columns"]
    assert {entry.case.op for entry in by_columns} == {entry.case.op for entry in all_of_them if entry.group == "gpt2"} == set(OPS)
    assert sorted({entry.case.shape[1] for entry in by_columns}) == [2**n for n in range(8, 19)]
    assert len(by_columns) == 3 * 11 * len(OPS)
    assert all(entry.case.shape[0] <= 32768 and torch.Size(entry.case.shape).numel() <= 2**30 for entry in by_columns)
    assert all(entry.case.shape[0] >= 4096 for entry in by_columns)
    shapes = [(entry.case.op, entry.case.shape) for entry in all_of_them if entry.group == "gpt2" and entry.dtype == "bf16"]
    assert len(set(shapes)) == len(shapes) and {(case.op, case.shape) for case in cases.CASES} <= set(shapes)
    assert ("cross_entropy", (8192, 131072)) in shapes and ("layer_norm", (8192, 3072)) in shapes
    assert [entry.dtype for entry in all_of_them] == sorted((entry.dtype for entry in all_of_them),
                                                           key=["bf16", "fp32", "fp16"].index)


def test_quick_is_a_part():
    def names(*given: str) -> set[tuple]:
        return {(entry.name, entry.group) for entry in gpu.entries(arguments(*given))}

    quick = list(gpu.entries(arguments("--quick")))
    assert {(entry.name, entry.group) for entry in quick} < names() and len(quick) < 20
    assert ("cross-entropy 8192x131072 bf16", "gpt2") in names("--quick")
    assert sum("compile" in entry.peers for entry in quick) <= 5
    assert names("--shapes", "columns", "--columns", "512", "--ops", "layer_norm", "--dtypes", "fp16") == \
        {("layer norm 32768x512 fp16", "columns")}


def test_compile_where_it_was_not_asked_for_elsewhere():
    compiled = {(entry.group, entry.dtype, entry.case.shape[-1]) for entry in gpu.entries(arguments()) if "compile" in entry.peers}
    assert {(dtype, columns) for group, dtype, columns in compiled if group == "columns"} == \
        {("bf16", columns) for columns in (256, 1024, 4096, 16384, 65536, 262144)}
    assert {dtype for group, dtype, _ in compiled if group == "gpt2"} == {"bf16", "fp32"}
    assert all(entry.peers == ("compile",) for entry in gpu.entries(arguments("--peers", "compile")))


@pytest.mark.parametrize(("op", "dtype", "columns", "forward", "backward"), [
    ("scaled_masked_softmax", "bf16", 4096, 2, 3), ("scaled_masked_softmax", "bf16", 65536, 2, 3),
    ("scaled_masked_softmax", "bf16", 131072, 3, 5), ("scaled_masked_softmax", "fp32", 32768, 2, 3),
    ("layer_norm", "fp32", 65536, 3, 5), ("layer_norm", "fp16", 65536, 2, 3),
    ("bias_gelu", "fp32", 262144, 2, 3), ("cross_entropy", "fp32", 262144, 1, 2)])
def test_bytes_and_limits_by_columns(op, dtype, columns, forward, backward):
    entry, = gpu.entries(arguments("--shapes", "columns", "--columns", str(columns), "--ops", op, "--dtypes", dtype))
    tensor = entry.case.shape[0] * columns * cases.DTYPES[dtype].itemsize
    assert [entry.nbytes(mode) / tensor for mode in ("forward", "backward", "both")] == [forward, backward, forward + backward]
    stays = (forward, backward) in ((2, 3), (1, 2))
    assert [entry.limit(mode) for mode in ("forward", "backward", "both")] == ([0.9, 0.85, None] if stays else [None] * 3)


def test_no_limit_for_short_rows_and_single_shapes():
    short, *_ = gpu.entries(arguments("--shapes", "columns", "--columns", "2048"))
    single, *_ = gpu.entries(arguments("--shapes", "gpt2"))
    assert short.limit("forward") is single.limit("forward") is None
    assert single.case.title == "causal softmax" and single.nbytes("backward") / single.nbytes("forward") == 2 / 1.5


def prepared(case: cases.Case, dtype: torch.dtype):
    torch.manual_seed(0)
    inputs = cases.with_gradients(case.inputs(case.shape, dtype, "cpu"), "both")
    return inputs, gpu.incoming_gradient(case, inputs)


@pytest.mark.parametrize("case", [gpu.per_token(case) for case in SMALL_CASES] +
                         [replace(gpu.over_columns(case), shape=(12, 40)) for case in SMALL_CASES], ids=lambda case: case.title)
@pytest.mark.parametrize("rows", [None, 1, 5])
def test_check_in_pieces(case, rows):
    """The right op passes; one wrong element in the last row does not, nor does a wrong gradient of a parameter."""
    inputs, gradient = prepared(case, torch.float32)
    assert cases.mismatch(case, case.reference, inputs, gradient, rows=rows) == ""
    assert cases.mismatch(case, case.eager, inputs, gradient, slack=8, rows=rows) == ""

    def wrong_output(*inputs):
        factor = torch.ones_like(output := case.reference(*inputs))
        factor.view(-1)[-1] = 1.25
        return output * factor

    assert "times the tolerance" in (found := cases.mismatch(case, wrong_output, inputs, gradient, rows=rows))
    assert found.startswith(f"output[{case.shape[0] - 1}")

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return 1.01 * dx

    for i, x in enumerate(inputs):
        if x.requires_grad:
            def wrong_gradient(*inputs, i=i):
                return case.reference(*(Scaled.apply(x) if j == i else x for j, x in enumerate(inputs)))
            assert f"gradient of input {i}[" in cases.mismatch(case, wrong_gradient, inputs, gradient, rows=rows)


def test_half_precision_below_its_normal_numbers():
    """At 262144 columns probabilities in fp16 have a few bits, and the gradients that start from them no more."""
    case = replace(gpu.over_columns(SMALL_CASES[0]), shape=(1, 262144))
    inputs, gradient = prepared(case, torch.float16)
    assert cases.mismatch(case, case.reference, inputs, gradient) == ""

    class FromRounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(y := case.reference(x))
            return y

        @staticmethod
        def backward(ctx, dy):
            y, dy = ctx.saved_tensors[0].double(), dy.double()
            return (y * (dy - (y * dy).sum(-1, keepdim=True))).half()

    assert cases.mismatch(case, FromRounded.apply, inputs, 100 * gradient) == ""
    assert "times the tolerance" in cases.mismatch(case, lambda x: case.reference(x * 1.1), inputs, gradient)


def test_gradients_come_in_the_dtype_of_the_output(monkeypatch):
    case = gpu.per_token(SMALL_CASES[3])
    inputs, gradient = prepared(case, torch.bfloat16)
    assert gradient.shape == (12,) and gradient.dtype == torch.bfloat16
    seen, grad = [], torch.autograd.grad

    def watched(output, wanted, incoming):
        seen.append((output.dtype, incoming.dtype))
        return grad(output, wanted, incoming)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    for mode, function in itertools.product(("backward", "both"), (case.reference, case.eager)):
        gpu.contestant("any", function, inputs, gradient, mode).run()
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)] * 2
    gpu.contestant("any", lambda logits, target: seen.append(logits.requires_grad), inputs, gradient, "forward").run()
    assert seen[4:] == [False]


def test_copy_moves_the_bytes_of_the_op(monkeypatch):
    monkeypatch.setattr(gpu, "COPY", 1000)
    contestant, factor = gpu.copying(600.0, DEVICE)
    assert contestant.step().numel() == 300 and factor == 1
    contestant, factor = gpu.copying(8000.0, DEVICE)
    assert contestant.step().numel() == 1000 and factor == 4


def test_table_csv_and_json(small, tmp_path, capsys):
    assert small("--dtypes", "bf16", "fp32", "--json", str(tmp_path / "new" / "r.json"), "--csv", str(tmp_path / "r.csv")) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("causal softmax", "cross-entropy", "2x3x17x17", "bf16 by columns", "fp32 by columns",
                                            "of copy", "Abacus 2000", "driver 1.2", "SM 1 MHz"))
    stored = json.loads((tmp_path / "new" / "r.json").read_text())
    results = gpu_report.Results.from_json(stored)
    assert results.as_json() == stored and results.environment == ENVIRONMENT
    assert [(row.dtype, row.op, row.shape[-1], row.mode) for row in results.rows] == [
        (dtype, op, columns, mode) for dtype in ("bf16", "fp32")
        for op, columns in [*((op, SMALL[op][0][-1]) for op in OPS), *((op, n) for n in (16, 64) for op in OPS)]
        for mode in ("forward", "backward", "both")]
    assert all(list(row.timings) == ["copy", "ours", "eager"] for row in results.rows)
    assert all(timing.samples == 3 and timing.median > 0 for row in results.rows for timing in row.timings.values())
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * len(results.rows) and {line["driver"] for line in lines} == {"1.2"}
    row, line = results.rows[0], next(line for line in lines if line["contestant"] == "ours")
    assert float(line["of_copy"]) == pytest.approx(row.share, rel=1e-3)
    assert float(line["gb_per_s"]) == pytest.approx(row.bytes / row.timings["ours"].median / 1e6, rel=1e-3)


class Tick(Stopwatch):
    """Every step takes a millisecond, and the host is always late."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end) -> float:
        return 1.0


def test_copy_to_scale_and_late_contestants(small, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "COPY", 100)
    args = arguments("--implementation", "reference", "--shapes", "columns", "--columns", "16", "--peers", "eager", "--rounds", "2",
                     "--seconds", "0", "--dtypes", "fp32")
    rows = gpu.run(args, replace(DEVICE, event=Tick)).rows
    assert len(rows) == 3 * len(OPS) and all(row.timings["ours"] == Timing(1.0, 1.0, 1.0, 2) for row in rows)
    assert [row.share for row in rows] == [row.bytes / 2 / 100 for row in rows] and rows[0].bytes == 2 * 6 * 16 * 4
    assert all(row.late == ["copy", "ours", "eager"] for row in rows)


def test_wrong_op_is_not_timed(small, tmp_path, monkeypatch, capsys):
    cases = [replace(SMALL_CASES[1], ours=lambda x, bias: 1.1 * mk.bias_gelu(x, bias)), SMALL_CASES[2]]
    monkeypatch.setattr(gpu, "CASES", cases)
    assert small("--dtypes", "fp32", "--json", str(tmp_path / "r.json")) == 1
    shown = capsys.readouterr().out
    assert "bias-GeLU 33x40 fp32 forward/backward/both" in shown and "is wrong, so it was not timed" in shown
    results = gpu_report.Results.from_json(json.loads((tmp_path / "r.json").read_text()))
    assert all(bool(row.timings) == (row.op == "layer_norm") == (not row.failure) for row in results.rows)
    with pytest.raises(ValueError, match="9 rows are wrong"):
        gpu_report.write_readme(tmp_path / "README.md", results)
    monkeypatch.setattr(harness, "ROOT", tmp_path)  # where there is no README to write
    assert small("--dtypes", "fp32", "--readme") == 1


def test_op_that_cannot_be_launched_is_wrong(small, monkeypatch, capsys):
    def broken(x, bias):
        raise RuntimeError("bias_gelu: CUDA error\nand a stack")

    monkeypatch.setattr(gpu, "CASES", [replace(SMALL_CASES[1], ours=broken)])
    assert small("--dtypes", "fp32") == 1
    assert "is wrong, so it was not timed: RuntimeError: bias_gelu: CUDA error" in " ".join(capsys.readouterr().out.split())


def test_shapes_that_do_not_fit_are_skipped_by_name(small, tmp_path, monkeypatch, capsys):
    """Out of memory: our op at 64 columns, and eager's backward at the others."""
    def ours(x, weight, bias):
        if x.shape[-1] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return mk.layer_norm(x, weight, bias)

    def eager(x, weight, bias):
        if x.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return SMALL_CASES[2].eager(x, weight, bias)

    monkeypatch.setattr(gpu, "CASES", [replace(SMALL_CASES[2], ours=ours, eager=eager)])
    assert small("--dtypes", "bf16", "--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Skipped, out of memory: layer norm 6x64 bf16 forward/backward/both" in shown
    assert "eager is missing (out of memory): layer norm 32x48 bf16 backward/both, layer norm 6x16 bf16 backward/both" in shown
    rows = gpu_report.Results.from_json(json.loads((tmp_path / "r.json").read_text())).rows
    assert [(row.shape[-1], sorted(row.timings), row.skipped) for row in rows if row.mode == "both"] == \
        [(48, ["copy", "ours"], ""), (16, ["copy", "ours"], ""), (64, [], "out of memory")]
    with (tmp_path / "r.csv").open() as file:
        remarks = [(line["shape"], line["contestant"]) for line in csv.DictReader(file) if line["remark"] == "out of memory"]
    assert ("6x64", "ours") in remarks and ("6x16", "eager") in remarks and len(remarks) == 7


def test_op_that_does_not_fit_when_it_is_timed_is_skipped(small, monkeypatch, capsys):
    def ours(x, bias):
        if not x.requires_grad:  # as only the forward is run
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return mk.bias_gelu(x, bias)

    monkeypatch.setattr(gpu, "CASES", [replace(SMALL_CASES[1], ours=ours)])
    assert small("--dtypes", "bf16", "--shapes", "gpt2", "--modes", "both", "forward") == 0
    assert "Skipped, out of memory: bias-GeLU 33x40 bf16 forward" in capsys.readouterr().out


def test_peer_that_does_not_compile_is_left_out(small, tmp_path, monkeypatch):
    def compile(function, **options):
        def compiled(*inputs):
            raise ImportError("no Triton here")
        return compiled if function is SMALL_CASES[0].eager else function

    monkeypatch.setattr(torch, "compile", compile)
    assert small("--ops", "scaled_masked_softmax", "--dtypes", "fp32", "--shapes", "gpt2", "--peers", "eager", "compile",
                 "--json", str(tmp_path / "r.json")) == 0
    for row in gpu_report.Results.from_json(json.loads((tmp_path / "r.json").read_text())).rows:
        assert row.missing == {"compile": "ImportError: no Triton here"}
        assert row.peers == ["eager", "compile, mask from indices"]


def test_what_time_is_short_for_is_named(small, capsys):
    assert small("--minutes", "0", "--ops", "layer_norm", "--dtypes", "bf16") == 0
    assert "Skipped, time was up: layer norm 32x48 bf16 forward/backward/both, layer norm 6x16" in " ".join(
        capsys.readouterr().out.split())


def test_interruption_keeps_what_is_there(small, tmp_path, monkeypatch):
    def eager(x, bias):
        if x.shape[-1] == 64:
            raise KeyboardInterrupt
        return SMALL_CASES[1].eager(x, bias)

    monkeypatch.setattr(gpu, "CASES", [replace(SMALL_CASES[1], eager=eager)])
    assert small("--dtypes", "bf16", "fp32", "--json", str(tmp_path / "r.json")) == 0
    rows = gpu_report.Results.from_json(json.loads((tmp_path / "r.json").read_text())).rows
    assert [bool(row.timings) for row in rows[::3]] == [True, True, False, False, False, False]
    assert {row.skipped for row in rows[6:]} == {"interrupted"}


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.main(["--device", "cuda"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith("--device cuda: torch ")
    assert gpu.main(arguments("--implementation", "abacus"), DEVICE) == 1
    assert "abacus: unknown implementation" in capsys.readouterr().err


def test_modes_by_device(capsys):
    for given in (["--modes", "backward"], ["--readme"]):
        with pytest.raises(SystemExit):
            ops.parse(given)
        assert "is for --device cuda" in capsys.readouterr().err
    cpu, gpus = ops.parse([]), arguments()
    assert (cpu.implementation, cpu.dtypes, cpu.modes) == ("cpu", ["fp32", "bf16"], ["forward", "both"])
    assert (cpu.peers, cpu.rounds, cpu.seconds) == (("eager", "compile"), 20, 3.0)
    assert (gpus.implementation, gpus.dtypes) == ("cuda", ["bf16", "fp32", "fp16"])
    assert gpus.modes == ["forward", "backward", "both"]


def row(columns: int, mode: str = "forward", **fields) -> gpu_report.Row:
    given = {"timings": timings(copy=1, ours=1.25, eager=2.5), "limit": 0.9, **fields}
    return gpu_report.Row("scaled_masked_softmax", "softmax", "columns", [8, columns], "bf16", mode, 4e6, **given)


def test_figures_of_a_row():
    slow = row(4096)
    assert slow.share == 0.8 and slow.speedup("eager") == 2 and slow.gigabytes_per_second("ours") == pytest.approx(3.2)
    assert gpu_report.verdict(slow) == "80% ✗" and gpu_report.verdict(replace(slow, limit=0.8)) == "80% ✓"
    assert gpu_report.verdict(replace(slow, limit=None)) == "80%"


def test_columns_side_by_side():
    rows = [row(256, limit=None), row(4096, timings=timings(copy=1, ours=1, eager=2, compile=4)),
            row(8192, timings={}, failure="bad"), row(16384, timings={}, skipped="out of memory")]
    header, lines = gpu_report.columns_table(rows, with_published=True)
    assert header[3:] == ["256", "4096", "8192", "16384"]
    assert [line[2:] for line in lines] == [["ours", "3", "4", "wrong", "-"], ["of copy", "80%", "100% ✓", "-", "-"],
                                            ["eager", "2", "2", "-", "-"], ["compile", "-", "1", "-", "-"],
                                            ["quack, published", "1900", "2889", "2938", "2974"]]
    assert len(gpu_report.columns_table(rows, with_published=False)[1]) == 4


def test_target_of_an_h100():
    entropy = replace(row(131072, "both"), op="cross_entropy", title="cross-entropy", group="gpt2", shape=[8192, 131072])
    remarks, wrong = gpu_report.notes(gpu_report.Results(ENVIRONMENT | {"device": "NVIDIA H100 80GB HBM3"}, []), [entropy])
    assert remarks == ["cross-entropy 8192x131072 bf16 both: 1.25 ms, at most 2.6 expected ✓"] and not wrong
    assert gpu_report.notes(gpu_report.Results(ENVIRONMENT, []), [entropy]) == ([], [])


def test_late_contestants_are_named():
    rows = [row(256, mode, late=["ours"]) for mode in ("forward", "both")]
    remarks, _ = gpu_report.notes(gpu_report.Results(ENVIRONMENT, []), rows)
    assert remarks == ["The GPU may have waited for the host (ours): softmax 8x256 bf16 forward/both"]


def test_readme_section_is_replaced(small, tmp_path, monkeypatch):
    assert small("--dtypes", "fp32", "bf16", "--json", str(tmp_path / "r.json")) == 0
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nCPU\n{report.END}\n{gpu_report.BEGIN}\nnone yet\n{gpu_report.END}\nafter\n")
    for _ in range(2):
        assert ops.main(["--readme", str(tmp_path / "r.json")]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\nCPU\n") and text.endswith("after\n") and "none yet" not in text
        assert text.count("| layer norm |") == 2 + 2 and text.count(gpu_report.BEGIN) == 1  # by columns; at one shape
        assert "fp32" not in text and "Abacus 2000" in text
    assert small("--dtypes", "fp16", "--readme") == 0 and "fp16 forward" in readme.read_text()
    readme.write_text("nothing here\n")
    with pytest.raises(ValueError, match="expected the lines"):
        ops.main(["--readme", str(tmp_path / "r.json")])


def test_readme_says_so_until_there_are_results():
    text = (harness.ROOT / "README.md").read_text()
    section = text.partition(gpu_report.BEGIN)[2].partition(gpu_report.END)[0]
    measured = (harness.ROOT / "benchmarks" / "results" / "cuda.json").exists()
    assert ("Measured on" if measured else "not measured yet") in section


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    assert ops.main(["--device", "cuda", "--peers", "eager", "--columns", "256", "4096", "--shapes", "columns", "--rounds", "3",
                     "--seconds", "0", "--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]) == 0
    results = gpu_report.Results.from_json(json.loads((tmp_path / "r.json").read_text()))
    assert len(results.rows) == 2 * len(OPS) * 9 and all(list(row.timings) == ["copy", "ours", "eager"] for row in results.rows)
    assert results.environment["device"] == torch.cuda.get_device_name()
    assert all(0.01 < row.share < 2 for row in results.rows)
