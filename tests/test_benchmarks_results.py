"""What becomes of the op benchmark's results: tables that fit, pages, charts, files, and what moved between two runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_benchmarks import one_thread
from test_benchmarks_gpu import ENVIRONMENT, small

from benchmarks import charts, compare, harness, ops, pages, plots, report, rows, shapes, tables
from benchmarks.harness import Timing
from benchmarks.rows import Results, Row

assert one_thread and small  # fixtures
CPU = {"kind": "cpu", "device": "Abacus", "threads": 2, "instruction_set": "AVX9", "torch": "2.14", "megatron_kernels": "0",
       "commit": "abc", "python": "3", "date": "2026-01-01", "clocks": "1-2 MHz"}


def timings(**milliseconds: float) -> dict[str, Timing]:
    return {name.replace("_", " "): Timing(ms, ms, ms, 20, 0.99 * ms, 1.01 * ms) for name, ms in milliseconds.items()}


def row(columns: int = 4096, mode: str = "forward", **fields) -> Row:
    given = {"op": "scaled_masked_softmax", "title": "softmax", "group": "columns", "shape": [8, columns], "dtype": "bf16",
             "bytes": 4e6, "allocator": "", "expected_share": 0.9, "expected_lead": None,
             "timings": timings(copy=1, ours=1.25, eager=2.5)}
    return Row(**given | {"mode": mode} | fields)


def main_row(op: str = "bias_gelu", title: str = "bias-GeLU", **fields) -> Row:
    given = {"op": op, "title": title, "group": "main", "shape": [2048, 4096], "dtype": "fp32", "allocator": "reusing",
             "timings": timings(copy=1, in_cache=1, ours=2, eager=7, compile=5), "expected_share": 0.4, "expected_lead": 2.0,
             "peak": {"ours": 2**25, "eager": 2**26}}
    return row(**given | fields)


def found(*rows: Row, **environment) -> Results:
    kind = environment.pop("kind", "cpu")
    return Results((CPU if kind == "cpu" else ENVIRONMENT) | environment, list(rows), {"sittings": 2},
                   {"eager": {"version": "2.14", "why_not": ""}, "quack": {"version": "", "why_not": "not applicable: CuTe"}})


def test_figures_of_a_row():
    slow = row()
    assert slow.share == 0.8 and slow.speedup("eager") == 2 and slow.gigabytes_per_second("ours") == pytest.approx(3.2)
    assert tables.of_copy(slow) == "80% ✗" and tables.of_copy(replace(slow, expected_share=0.8)) == "80% ✓"
    assert tables.of_copy(replace(slow, expected_share=None)) == "80%"
    fast = main_row()
    assert fast.lead_over(("eager", "compile")) == 2.5 and tables.faster(fast, fast.peers) == "2.50 ✓"
    assert tables.faster(replace(fast, expected_lead=3.0), fast.peers) == "2.50 ✗"
    beside = replace(fast, timings=fast.timings | timings(quack=1))
    assert beside.libraries == ["quack"] and tables.faster(beside, beside.peers) == "0.50 ✓"  # the lead is over PyTorch
    assert tables.faster(replace(fast, timings=timings(ours=1)), []) == "-"


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.0123"), (0.5, "0.500"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"),
                                             (12345.6, "12346"), (9.999, "10.00"), (1e-05, "0.0000")])
def test_numbers(value, text):
    assert tables.number(value) == text


def test_noise_is_named():
    def noisy(ms: float, width: float) -> Timing:
        return Timing(ms, ms, ms, 20, ms, ms * (1 + width))

    quiet = noisy(1.0, 0.01)
    wide = main_row(timings={"ours": noisy(2.0, 0.2), "eager": noisy(2.0, 0.4), "in cache": noisy(2.0, 0.9), "copy": quiet})
    short = main_row(timings={"ours": noisy(0.9, 0.2), "copy": quiet})
    assert list(wide.noisy) == ["ours", "eager"] and not short.noisy
    text, = tables.noise([wide, short])
    assert text.endswith(": bias-GeLU 2048x4096 fp32 forward (eager 40%)")
    assert tables.shapes_lines([wide, short])[0][2] == "~2.00"
    far = main_row(timings={"ours": replace(noisy(0.5, 0), outliers=3), "copy": noisy(0.5, 0)})
    assert tables.noise([far]) == ["Outliers, beyond p80 by 2 x (p80 - p20): 3 of 40 samples, at most 3 of 20 "
                                   "(bias-GeLU 2048x4096 fp32 forward, ours)"]
    assert tables.busy(found(replace(far, others=0.3))).startswith("Other processes took up to 30%") and not tables.busy(found(far))


def test_columns_side_by_side():
    rows = [row(256, expected_share=None), row(4096, timings=timings(copy=1, ours=1, eager=2, compile=4), inexact={"eager": "x"}),
            row(8192, timings={}, failure="bad"), row(16384, timings={}, skipped="out of memory")]
    header, lines = tables.sweep_table(rows, "GB/s", with_published=True)
    assert header[2:] == ["GB/s", "256", "4096", "8192", "16384"]
    assert [line[2:] for line in lines] == [["ours", "3.20", "4.00", "wrong", "-"], ["of copy", "80%", "100% ✓", "-", "-"],
                                            ["eager", "1.60", "2.00*", "wrong", "-"], ["compile", "-", "1.00", "wrong", "-"],
                                            ["quack, published", "1900", "2889", "2938", "2974"]]
    assert len(tables.sweep_table(rows, "GB/s")[1]) == 4 and tables.sweep_table(rows, "ms")[1][0][3] == "1.25"


def test_target_of_an_h100():
    entropy = row(131072, "both", op="cross_entropy", title="cross-entropy", group="vocabulary", shape=[8192, 131072])
    said = tables.remarks(found(kind="cuda", device="NVIDIA H100 80GB HBM3"), [entropy])
    assert said == ["cross-entropy 8192x131072 bf16 both: 1.25 ms, at most 2.6 expected ✓"]
    assert tables.remarks(found(kind="cuda"), [entropy]) == []


def test_late_contestants_are_named():
    rows = [row(256, mode, late=["ours"]) for mode in ("forward", "both")]
    assert tables.remarks(found(), rows) == ["The GPU may have waited for the host (ours): softmax 8x256 bf16 forward/both"]


def widest() -> Results:
    """Figures as long as they get, eight libraries, eleven columns."""
    libraries = ["liger", "liger-vocab-parallel", "quack", "te", "apex", "flash-attn", "megatron-fused", "megatron-unfused"]
    slow = {name: Timing(1234.5, 1111.1, 2222.2, 20, 1000, 3000) for name in ("copy", "ours", "eager", "compile", *libraries)}
    rows = [replace(main_row(title="causal softmax", allocator=""), shape=[8, 32, 1024, 1024], dtype=dtype, mode=mode, timings=slow,
                    inexact={"te": "off"}, peak={"ours": 2**34, "eager": 2**35}) for dtype in ("bf16", "fp32")
            for mode in ("forward", "backward", "both")]
    rows += [row(2**n, mode, timings=timings(copy=1, ours=1.0, eager=2, **{"liger-vocab-parallel": 1.5})) for n in range(8, 19)
             for mode in ("forward", "backward")]
    return found(*rows, kind="cuda", device="NVIDIA H100 80GB HBM3")


def test_noise_is_marked_and_the_widest_is_named():
    def noisy(columns: int, width: float, name: str = "ours") -> Row:
        good = timings(copy=2, ours=2.5, eager=5)
        return row(columns, timings=good | {name: replace(good[name], low=2.0, high=2.0 + width)})

    calm, loud = noisy(1024, 0.01), noisy(4096, 1.0, "eager")
    header, (ours, _, eager) = tables.sweep_table([calm, loud], "ms")
    assert header[3:] == ["1024", "4096"] and ours[3:] == ["2.50", "2.50"] and eager[3:] == ["5.00", "~5.00"]
    said, = tables.noise([calm, loud])
    assert "1 of 2 rows: softmax 8x4096 bf16 forward (eager 20%)" in said and "8x1024" not in said
    many = [noisy(n, 0.2 + n / 100) for n in range(1, 16)]
    said, = tables.noise(many)
    assert "15 of 15 rows: softmax 8x15 " in said and said.endswith("; and 3 shapes more")
    assert "8x4 " in said and "8x3 " not in said


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_tables_fit_into_100_columns(monkeypatch, capsys, kind):
    monkeypatch.setattr(report, "console", lambda stderr=False: Console(stderr=stderr, width=100))
    report.show(widest() if kind == "cuda" else found(*(replace(r, allocator="reusing") for r in widest().rows)))
    lines = capsys.readouterr().out.splitlines()
    assert "…" not in "".join(lines) and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert all(word in text for word in ("causal softmax", "8x32x1024x1024", "bf16 backward", "1111-2222", "16384/32768", "262144",
                                         "100% ✓", "liger-vocab-parallel", "not applicable: CuTe"))


def test_results_come_back_from_json(tmp_path):
    before = found(main_row(inexact={"eager": "off"}), row(timings={}, skipped="x"))
    rows.write_json(tmp_path / "new" / "r.json", before)
    assert Results.load(tmp_path / "new" / "r.json") == before and os.listdir(tmp_path / "new") == ["r.json"]
    stored = json.loads((tmp_path / "new" / "r.json").read_text())["rows"][0]
    assert stored["checked"] == ["in cache", "ours", "compile"] and stored["share_of_copy"]["ours"] == 0.5


@pytest.mark.parametrize(("text", "why"), [
    ("not json", "expected JSON as --json writes it"), ("[]", "expected results"), ('{"environment": {}}', "'rows' is missing"),
    ('{"environment": {}, "rows": [{"op": "layer_norm"}]}', "'title' is missing"), (None, "No such file")])
def test_files_that_are_no_results(tmp_path, capsys, text, why):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    for arguments in (["--from", "r.json"], ["--compare", "r.json", "r.json"]):
        arguments = [word.replace("r.json", str(tmp_path / "r.json")) for word in arguments]
        assert ops.main(arguments) == 1
        shown = capsys.readouterr().err
        assert why in shown and shown.count("\n") == 1 and str(tmp_path / "r.json") in shown


def pages_at(root: Path) -> tuple[Path, Path]:
    readme, doc = root / "README.md", root / "docs" / "benchmarks.md"
    doc.parent.mkdir(exist_ok=True)
    for page in (readme, doc):
        parts = [f"{pages.BEGIN[kind]}\nnothing of {kind}\n{pages.END[kind]}\n" for kind in ("cpu", "cuda")]
        page.write_text(f"before\n{''.join(parts)}after\n")
    return readme, doc


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_pages(tmp_path, kind):
    readme, doc = pages_at(tmp_path)
    ops_ = [("bias_gelu", "bias-GeLU"), ("layer_norm", "layer norm"), ("cross_entropy", "cross-entropy")]
    rows = [main_row(*op, dtype=dtype, mode=mode, allocator="reusing" if kind == "cpu" else "") for dtype in ("fp32", "bf16")
            for op in ops_ for mode in ("forward", "backward", "both")]
    rows += [main_row(allocator="default", dtype="fp32")] if kind == "cpu" else [row()]
    these = found(*rows, kind=kind)
    for _ in range(2):
        pages.write_pages(tmp_path, these, [tmp_path / "docs" / "plots" / f"{name}.svg" for name in "abc"])
        texts = readme.read_text(), doc.read_text()
        other = {"cpu": "cuda", "cuda": "cpu"}[kind]
        assert all(text.startswith("before\n") and text.endswith("after\n") and f"nothing of {kind}" not in text
                   and f"nothing of {other}" in text and text.count(pages.BEGIN[kind]) == 1 for text in texts)
    short, long = texts
    lines = [line for line in short.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + (3 * 2 * 2 if kind == "cpu" else 3 * 3) and len({line.count("|") for line in lines}) == 1
    assert "(docs/plots/a.svg)" in short and "c.svg" not in short and "(plots/a.svg)" in long and "(plots/c.svg)" in long
    assert "Measured on Abacus" in short and ("page faults" in long) == (kind == "cpu")
    assert long.count("backward") > short.count("backward") if kind == "cpu" else "4096" in long


@pytest.mark.parametrize(("change", "why"), [
    (lambda r: replace(r, others=0.3), "took 30% of the processors"),
    (lambda r: replace(r, failure="bad", timings={}), "1 rows are wrong"),
    (lambda r: replace(r, group="columns"), "lack the main shapes")])
def test_results_that_are_not_for_pages(tmp_path, change, why):
    readme, doc = pages_at(tmp_path)
    before = readme.read_text(), doc.read_text()
    with pytest.raises(ValueError, match=why):
        pages.write_pages(tmp_path, found(change(main_row())), [])
    doc.write_text("nothing here\n")
    with pytest.raises(ValueError, match="expected the lines"):
        pages.write_pages(tmp_path, found(main_row()), [])
    assert readme.read_text() == before[0]  # neither, or both


def test_pages_say_so_until_there_are_results():
    for page in (harness.ROOT / "README.md", harness.ROOT / "docs" / "benchmarks.md"):
        section = page.read_text().partition(pages.BEGIN["cuda"])[2].partition(pages.END["cuda"])[0]
        measured = (harness.ROOT / "benchmarks" / "results" / "cuda.json").exists()
        assert ("Measured on" if measured else "not measured yet") in section


def test_stored_results_are_shown_written_and_drawn(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    readme, doc = pages_at(tmp_path)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert small("--dtypes", "bf16", "--ops", "layer_norm", "cross_entropy", "--modes", "forward", "both", "--json",
                 str(tmp_path / "r.json")) == 0
    capsys.readouterr()
    assert ops.main(["--from", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"), "--plot", str(tmp_path / "docs" / "p"),
                     "--readme"]) == 0
    assert "layer norm" in capsys.readouterr().out and (tmp_path / "r.csv").exists()
    drawn = sorted(path.name for path in (tmp_path / "docs" / "p").iterdir())
    assert drawn == ["cuda-columns-bf16-forward.svg", "cuda-gpt2-bf16.svg", "cuda-vocabulary-bf16.svg"]
    assert "docs/p/cuda-columns-bf16-forward.svg" in readme.read_text() and all(f"(p/{name})" in doc.read_text() for name in drawn)
    texts = "".join(ET.parse(tmp_path / "docs" / "p" / "cuda-columns-bf16-forward.svg").getroot().itertext())
    assert all(word in texts for word in ("ours", "eager", plots.ROOF, "cross-entropy", "layer norm", "GB/s", "Abacus 2000"))


def test_panels():
    rows = [row(256), row(4096, timings=timings(copy=2, ours=2.5))]
    panel = plots.panel(rows, "softmax", "columns", "GB/s")
    ours, eager, roof = panel.series
    assert [series.label for series in panel.series] == ["ours", "eager", plots.ROOF] and roof.dashed and not ours.dashed
    assert [x for x, _ in ours.points] == [256, 4096] and [x for x, _ in eager.points] == [256]
    assert [y for _, y in ours.points] == pytest.approx([3.2, 1.6])
    assert ours.low == pytest.approx([3.2 / 1.01, 1.6 / 1.01]) and ours.high == pytest.approx([3.2 / 0.99, 1.6 / 0.99])
    assert [y for _, y in roof.points] == pytest.approx([4.0, 2.0]) and panel.log_x and not panel.log_y


def test_charts_without_matplotlib(tmp_path, monkeypatch, capsys):
    rows.write_json(tmp_path / "r.json", found(main_row()))
    monkeypatch.setattr(charts, "why_not", lambda: "charts need matplotlib")
    assert ops.main(["--from", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p")]) == 1
    assert capsys.readouterr().err == "benchmarks.ops: --plot: charts need matplotlib\n" and not (tmp_path / "p").exists()


def shifted(timing: Timing, factor: float, width: float = 0.02) -> Timing:
    median = factor * timing.median
    return replace(timing.times(factor), low=median * (1 - width / 2), high=median * (1 + width / 2))


@pytest.mark.parametrize(("factor", "width", "threshold", "moved"), [
    (1.2, 0.02, 0.05, True), (0.8, 0.02, 0.05, True), (1.2, 0.6, 0.05, False), (1.04, 0.02, 0.05, False), (1.04, 0.02, 0.03, True),
    (1.0, 0.0, 0.0, False)])
def test_what_moved(factor, width, threshold, moved):
    before = timings(ours=2)["ours"]
    change = compare.Change(main_row(), "ours", before, shifted(before, factor, width))
    assert change.moved(threshold) == moved and change.ratio == pytest.approx(factor)


def test_compare_shows_what_moved(tmp_path, capsys):
    a = found(main_row(), main_row("layer_norm", "layer norm"), row(256))
    slower = {name: shifted(timing, 1.5 if name == "ours" else 1.0) for name, timing in main_row().timings.items()}
    noisy = {name: shifted(timing, 1.3, 0.9) for name, timing in main_row().timings.items()}
    b = replace(found(main_row(timings=slower), main_row("layer_norm", "layer norm", timings=noisy), row(512), torch="2.15"),
                settings={"sittings": 1})
    for name, run in (("A.json", a), ("B.json", b)):
        rows.write_json(tmp_path / name, run)
    assert ops.main(["--compare", str(tmp_path / "A.json"), str(tmp_path / "B.json")]) == 0
    shown = capsys.readouterr().out
    moved, = [line for line in shown.splitlines() if "1.50" in line]
    assert moved.split()[:6] == ["bias-GeLU", "2048x4096", "fp32", "forward", "ours", "2.00"]
    assert "1 of 10 figures moved; 5 differ by more than 5% within their noise; 4 differ by less." in shown
    assert "Only in A: softmax 8x256 bf16 forward" in shown and "Only in B: softmax 8x512 bf16 forward" in shown
    assert "torch: 2.14 in A, 2.15 in B" in shown and "sittings: 2 in A, 1 in B" in shown
    assert ops.main(["--compare", str(tmp_path / "A.json"), str(tmp_path / "B.json"), "--threshold", "60"]) == 0
    assert "0 of 10 figures moved" in capsys.readouterr().out


@pytest.mark.parametrize(("other", "why"), [({"device": "Slide rule"}, "device 'Abacus' and 'Slide rule'"),
                                            ({"threads": 4}, "threads 2 and 4")])
def test_compare_refuses_other_machines(tmp_path, capsys, other, why):
    rows.write_json(tmp_path / "A.json", found(main_row()))
    rows.write_json(tmp_path / "B.json", found(main_row(), **other))
    assert ops.main(["--compare", str(tmp_path / "A.json"), str(tmp_path / "B.json")]) == 1
    assert why in capsys.readouterr().err
    rows.write_json(tmp_path / "B.json", found(row()))
    assert ops.main(["--compare", str(tmp_path / "A.json"), str(tmp_path / "B.json")]) == 1
    assert "no row in common" in capsys.readouterr().err


def test_default_allocator_runs_in_a_process_of_its_own(small, tmp_path, monkeypatch):
    """With glibc's own thresholds, the main shapes, and none of the files that the parent writes."""
    seen = []

    def child(command, env, cwd, stdout):
        seen.append((command, env))
        args = ops.parse(command[3:])
        rows.write_json(args.json, found(main_row(allocator="default")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", child)
    for name, value in harness.REUSING_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    arguments = ["--device", "cpu", "--quick", "--allocator", "both", "--ops", "bias_gelu", "--threads", "1",
                 f"--csv={tmp_path / 'r.csv'}"]
    assert small(*arguments, "--json", str(tmp_path / "r.json")) == 0
    (command, env), = [one for one in seen if "--json" in one[0]]
    child_args = ops.parse(command[3:])
    assert (child_args.allocator, child_args.shapes, child_args.sittings, child_args.ops) == ("default", ["main"], 1, ["bias_gelu"])
    assert child_args.csv is None and child_args.json != str(tmp_path / "r.json") and child_args.quick
    assert not set(harness.REUSING_ALLOCATOR) & set(env)
    stored = Results.load(tmp_path / "r.json").rows
    assert [row.allocator for row in stored] == ["reusing"] * 6 + ["default"] and (tmp_path / "r.csv").exists()


@pytest.mark.parametrize("given", [["--columns", "0"], ["--threads", "x"], ["--modes", "sideways"], ["--shapes", "round"]])
def test_options_that_are_wrong(given, capsys):
    with pytest.raises(SystemExit):
        ops.parse(given)
    assert given[0] in capsys.readouterr().err


def test_help_names_every_set(capsys):
    with pytest.raises(SystemExit):
        ops.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    expected = *shapes.SETS, "megatron-unfused", "threshold", "A.json"
    assert [name for name in expected if not re.search(rf"\b{name}\b", shown)] == []


@pytest.mark.slow
def test_command(tmp_path):
    """One op on the CPU for real, both allocators."""
    command = [sys.executable, "-m", "benchmarks.ops", "--device", "cpu", "--quick", "--ops", "layer_norm", "--dtypes", "fp32",
               "--peers", "eager", "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = Results.load(tmp_path / "r.json").rows
    assert [(row.allocator, row.mode) for row in rows] == [(allocator, mode) for allocator in ("reusing", "default")
                                                           for mode in ("forward", "backward", "both")]
    assert all(row.peak["ours"] >= 2**24 for row in rows) and torch.__version__ in done.stdout
