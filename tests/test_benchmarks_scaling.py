"""benchmarks.scaling: what a run is, what is made of its measurements, and what is refused. Without other ranks.

`made` is the record of a run whose measurements are invented; test_benchmarks_scaling_ranks.py has runs that took place.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import replace

import pytest

from benchmarks import (
    files,
    flops,
    harness,
    scaling,
    scaling_efficiency,
    scaling_report,
    scaling_run,
    scaling_sweep,
    trainer,
)
from benchmarks.scaling_efficiency import compare
from benchmarks.trainer import PRESETS, Settings

WHERE = {"kind": "cpu", "device": "a processor", "threads": 1, "processors": 2, "ranks_per_node": 1, "nodes": 1, "backend": "gloo",
         "torch": "2", "megatron_kernels": "0", "commit": "abc", "date": "2026-11-30"}
EXPOSED = {"step": 200.0, "communication": 60.0, "exposed": 50.0}


def made(world: int = 1, ms: float = 100.0, where: dict | None = None, peak_tflops: float | None = None, preset: str = "tiny",
         times: list[list[float]] | None = None, counted: int | None = None, **changes) -> dict:
    """The record of `world` ranks that took `ms` a step and counted what they should."""
    settings = replace(PRESETS[preset], **changes)
    own = world // settings.replicas(world)
    count = flops.model_flops(settings.config, settings.batch, settings.sequence) // own if counted is None else counted
    ranks = [{"milliseconds": times[rank] if times else [ms] * 5, "flops": count, "memory": 2**20 * (rank + 1), "host": "here",
              "used": [1.0, 4.0], "elapsed": 10.0, "losses": [6.0, 5.0], "exposed": EXPOSED if world > 1 else None}
             for rank in range(world)]
    return scaling_run.record(settings, ranks, WHERE | {"ranks_per_node": world} | (where or {}), {"iterations": 5, "warmup": 1},
                              peak_tflops)


def arguments(*words: str) -> argparse.Namespace:
    return scaling.parse(list(words))


def test_presets_are_the_papers():
    """Megatron-LM, arXiv 1909.08053, table 1: layers, hidden, heads, devices, and their billions of parameters."""
    paper = {"1.2B": (40, 1536, 16, 1), "2.5B": (54, 1920, 20, 2), "4.2B": (64, 2304, 24, 4), "8.3B": (72, 3072, 32, 8)}
    for name, shape in paper.items():
        s = PRESETS[name]
        assert (s.layers, s.hidden, s.heads, s.tensor_parallel) == shape
        assert (s.sequence, s.vocab, s.batch, s.config.padded_vocab_size) == (1024, 51200, 8, 51200)
    assert scaling_sweep.FAMILIES["paper"] == {shape[3]: name for name, shape in paper.items()}
    assert made(world=64, preset="1.2B")["mesh"] == {"pp": 1, "dp": 64, "tp": 1}
    assert made(preset="1.2B")["parameters"] == pytest.approx(1.2e9, rel=0.02)


@pytest.mark.parametrize(("changes", "world", "message"), [
    ({"tensor_parallel": 2, "pipeline_parallel": 2}, 6, "must be a multiple of 4, got 6"),
    ({"tensor_parallel": 2}, 1, "must be a multiple of 2, got 1"),
    ({"tensor_parallel": 3, "hidden": 96}, 3, "tensor_parallel 3 does not divide heads 4"),
    ({"pipeline_parallel": 3}, 3, "pipeline_parallel 3 does not divide layers 4")])
def test_ranks_that_no_run_can_have(changes, world, message):
    with pytest.raises(ValueError, match=message):
        scaling_run.check(replace(Settings(), **changes), world)
    scaling_run.check(replace(Settings(), tensor_parallel=2), 4)


def test_a_record_is_what_its_ranks_measured():
    run = made(world=4, tensor_parallel=2, times=[[10.0, 20.0, 30.0], [11.0, 19.0, 50.0], [9.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    assert run["iterations_ms"] == [11.0, 20.0, 50.0]  # the slowest rank's
    assert run["median_ms"] == 20.0 and run["p10_ms"] == pytest.approx(12.8) and run["p90_ms"] == pytest.approx(44.0)
    assert run["mesh"] == {"pp": 1, "dp": 2, "tp": 2} and run["global_batch"] == 8
    assert run["tokens_per_second"] == pytest.approx(8 * 64 / 0.020)
    assert run["tokens_per_second_per_device"] == pytest.approx(8 * 64 / 0.020 / 4)
    model = 72 * 4 * 64 * 4 * 64**2 + 12 * 4 * 64**2 * 4 * 64 + 6 * 4 * 64 * 64 * 512
    assert run["flops"]["model"] == model and run["flops"]["counted"] == model
    assert run["flops"]["exact"] and not run["flops"]["wrong"]
    assert run["model_tflops_per_device"] == pytest.approx(2 * model / 4 / 0.020 / 1e12)
    assert run["exposed"]["exposed_ms"] == 50.0 and run["exposed"]["share"] == 0.25
    assert run["memory"]["peak_bytes"] == [2**20 * n for n in (1, 2, 3, 4)]
    assert run["others"] == pytest.approx(0.0)  # four ranks had all the four seconds
    assert run["notes"] == ["more ranks than processors: 2"]
    assert made()["exposed"] is None


def test_other_processes_and_infinite_losses_are_noted():
    ranks = [{"milliseconds": [1.0], "flops": 0, "memory": None, "host": "here", "used": [1.0, 9.0], "elapsed": 4.0,
              "losses": [float("nan")], "exposed": None}]
    run = scaling_run.record(replace(Settings(), dtype="fp16"), ranks, WHERE, {"iterations": 1, "warmup": 0})
    assert any("other processes took" in note for note in run["notes"])
    assert "the loss is not finite: fp16 has no loss scaling here" in run["notes"]
    assert run["flops"]["wrong"] and any(note.startswith("WRONG: expected") for note in run["notes"])
    assert "-" in next(line for line in scaling_report.rows([run], run) if line[0].startswith("peak memory"))


def test_mfu_needs_a_peak():
    run, given = made(), made(peak_tflops=2.0)
    assert run["mfu"] is None and "no peak is known of a processor in fp32; --peak-tflops" in run["mfu_why"]
    assert given["mfu"] == pytest.approx(given["model_tflops_per_device"] / 2.0) and given["peak"]["source"] == "--peak-tflops"
    gpu = {"kind": "cuda", "device": "NVIDIA H200", "cuda": "13.0", "nccl": "2.29"}
    known = made(where=gpu, dtype="bf16")
    assert known["mfu"] == pytest.approx(known["model_tflops_per_device"] / 989.4) and "datasheet" in known["peak"]["source"]
    assert "unsupported" not in scaling_report.described(known) and "NCCL 2.29" in scaling_report.described(known)


@pytest.mark.parametrize(("changes", "on_cpu", "difference", "why"), [
    ({}, True, 0, ""), ({"tensor_parallel": 2, "sequence_parallel": True}, True, 0, ""), ({"sequence": 256}, False, 0, ""),
    ({"sequence": 256}, True, -3 * 4 * 4 * 4 * 64 * 128 * 128, "leaves out products that the causal mask hides"),
    ({"recompute": True}, False, None, "layers run again"), ({"attention": "sdpa"}, False, None, "forms the scores again"),
    ({"pipeline_parallel": 2, "microbatches": 4, "schedule": "ZBVZeroBubble"}, True, None, "ZBVZeroBubble runs"),
    ({"pipeline_parallel": 2, "microbatches": 4, "schedule": "ZBVZeroBubble"}, False, 0, "")])
def test_where_the_count_is_the_closed_form(changes, on_cpu, difference, why):
    settings = replace(Settings(), **changes)
    expected, said = scaling_run.expected_flops(settings, on_cpu)
    assert (why in said) and bool(why) == bool(said)
    whole = flops.model_flops(settings.config, settings.batch, settings.sequence)
    assert expected == (None if difference is None else whole + difference)


def test_efficiency_of_a_run_against_itself_is_one():
    for run in (made(), made(world=4, tensor_parallel=2, ms=33.3), made(preset="8.3B", world=8, ms=77.7)):
        assert compare(run, run) == (1.0, "", 1.0, "")


def test_weak_efficiency():
    """Rates per device: 4 times the FLOPs on 4 devices in twice the time is one half."""
    one, four = made(ms=100.0), made(world=4, ms=200.0)
    assert compare(four, one).weak == pytest.approx(0.5) and compare(four, one).weak_why == ""
    assert compare(four, one).strong is None and "global batch is 16 here and 4 in the baseline" in compare(four, one).strong_why
    grown, base = made(preset="small-2", world=2, ms=100.0), made(preset="small-1", ms=100.0)
    work = {name: flops.model_flops(PRESETS[name].config, 4, 128) for name in ("small-1", "small-2")}
    assert compare(grown, base).weak == pytest.approx(work["small-2"] / 2 / work["small-1"])
    assert "another model: layers is 6 here and 4" in compare(grown, base).strong_why


def test_strong_efficiency():
    """(T1 / Tn) / n: four devices in half the time is one half."""
    one = made(ms=100.0, batch=8)
    for four in (made(world=4, ms=50.0, batch=2), made(world=4, ms=50.0, batch=8, tensor_parallel=4),
                 made(world=4, ms=50.0, batch=4, tensor_parallel=2)):
        found = compare(four, one)
        assert found.strong == pytest.approx(0.5) and found.strong_why == ""
        assert found.weak is None and "a device has 0.25 times the baseline's FLOPs" in found.weak_why
    assert compare(one, made(world=4, ms=50.0, batch=2)).strong == pytest.approx(2.0)  # against four devices


@pytest.mark.parametrize(("changes", "message"), [
    ({"where": {"device": "another"}}, "device is another here and a processor in the baseline"),
    ({"where": {"kind": "cuda"}}, "kind is cuda here and cpu"), ({"where": {"threads": 2}}, "a rank has 2 threads here and 1"),
    ({"dtype": "bf16"}, "dtype is bf16 here and fp32"), ({"recompute": True, "counted": 1}, "recompute is True here and False"),
    ({"attention": "sdpa", "counted": 1}, "attention is sdpa here"), ({"dropout": 0.1}, "dropout is 0.1 here and 0.0")])
def test_other_devices_are_no_baseline(changes, message):
    found = compare(made(**changes), made())
    assert found.weak is None and found.strong is None
    assert message in found.weak_why and message in found.strong_why


@pytest.mark.parametrize(("changes", "weak", "strong"), [
    ({"sequence": 128, "batch": 2}, "sequence is 128 here and 64", "another model: sequence is 128"),
    ({"vocab": 600}, "", "another model: vocab is 600 here and 512"), ({"heads": 8}, "", "another model: heads is 8"),
    ({"batch": 8}, "a device has 2.00 times", "the global batch is 8 here and 4")])
def test_other_work_is_no_baseline(changes, weak, strong):
    found = compare(made(**changes), made())
    assert (weak in found.weak_why) and (strong in found.strong_why) and bool(weak) == (found.weak is None)


def test_the_table_and_its_notes():
    one, two = made(), made(world=4, ms=200.0, recompute=False)
    header, *lines = scaling_report.rows([one, two], one)
    assert header == ["", "1 device", "4 devices"]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["weak efficiency"] == ["100.0%", "50.0%"] and cells["strong efficiency"] == ["100.0%", "-"]
    assert cells["ranks share it by"] == ["one device", "dp 4 ddp"] and cells["MFU"] == ["-", "-"]
    assert cells["exposed communication"] == ["none", "50.0 ms, 25%"] and cells["peak memory of a device"] == ["1 MiB", "4 MiB"]
    assert cells["a replica's step, 72 form"] == ["0.403 GFLOP"] * 2 and cells["   96 form"] == ["0.520 GFLOP"] * 2
    assert cells["   counted"] == ["the same"] * 2
    assert ["   counted", "0.805 GFLOP, 2.000 x"] in scaling_report.rows([made(recompute=True, counted=805306368)], one)
    notes = scaling_report.notes([one, two], one, "the first")
    assert notes[0] == "Efficiency is against the first."
    assert "More ranks than processors: 2 (4 devices)." in notes
    assert any(note.startswith("No strong efficiency: the global batch is 16") and "(4 devices)" in note for note in notes)
    text = scaling_report.markdown([one, two], one, "the first")
    assert text.startswith("|  | 1 device | 4 devices |\n| --- | ---: | ---: |\n| preset | tiny | tiny |")
    assert "at abc; 2026-11-30" in text
    wrong = made(counted=5)
    assert wrong["flops"]["wrong"] and ["   counted", "WRONG: 0.000 GFLOP"] in scaling_report.rows([wrong], wrong)


@pytest.mark.parametrize(("count", "text"), [(12.34e15, "12.34 PFLOP"), (1.5e12, "1.50 TFLOP"), (4.03e8, "0.403 GFLOP")])
def test_operations_have_units(count, text):
    assert scaling_report.operations(count) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (12345.6, "12,346"), (99.95, "99.95"), (1.234, "1.23"), (0.1234, "0.123"),
                                             (0.00456, "0.0046")])
def test_numbers_are_short(value, text):
    assert scaling_report.significant(value) == text


def test_the_chart_shows_efficiency_and_throughput(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    real = scaling_report.charts.grid

    def grid(path, panels, **more):
        drawn.extend(panels)
        real(path, panels, **more)

    monkeypatch.setattr(scaling_report.charts, "grid", grid)
    runs = [made(world=4, ms=200.0), made(ms=100.0), made(world=2, ms=125.0)]
    scaling_report.draw(tmp_path / "chart.svg", runs, runs[1])
    efficiency, throughput = drawn
    assert [line.label for line in efficiency.series] == ["weak efficiency"]  # strong is the baseline's own alone
    assert efficiency.series[0].points == [(1, 100.0), (2, pytest.approx(80.0)), (4, pytest.approx(50.0))]
    assert efficiency.level == (100.0, "ideal")
    measured, ideal = throughput.series
    assert measured.points == [(1, pytest.approx(2560)), (2, pytest.approx(4096)), (4, pytest.approx(5120))]
    assert ideal.points == [(n, pytest.approx(2560 * n)) for n in (1, 2, 4)] and ideal.dashed
    assert "Scaling efficiency" in (tmp_path / "chart.svg").read_text()


def test_the_line_of_a_growing_model_counts_flops(monkeypatch):
    drawn = []
    monkeypatch.setattr(scaling_report.charts, "grid", lambda path, panels, **more: drawn.extend(panels))
    runs = [made(preset="small-1"), made(preset="small-2", world=2)]
    scaling_report.chart("unused.svg", runs, runs[0])
    per_token = [run["flops"]["model"] / (4 * 128) for run in runs]
    rate = runs[0]["flops"]["model"] / 0.1
    assert drawn[1].series[1].points == [(1, pytest.approx(rate / per_token[0])), (2, pytest.approx(2 * rate / per_token[1]))]


def test_a_run_without_efficiency_has_the_throughput_alone(monkeypatch):
    drawn = []
    monkeypatch.setattr(scaling_report.charts, "grid", lambda path, panels, **more: drawn.extend(panels))
    scaling_report.chart("unused.svg", [made(dtype="bf16")], made())
    assert [panel.title for panel in drawn] == ["Throughput"]


def test_without_matplotlib_there_is_no_chart(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scaling_report.charts, "why_not", lambda: "charts need matplotlib")
    scaling_report.draw(tmp_path / "chart.svg", [made()], made())
    assert capsys.readouterr().out == "no chart: charts need matplotlib\n" and not list(tmp_path.iterdir())


def test_a_run_is_kept_whole_or_not_at_all(tmp_path):
    path = tmp_path / "runs" / "one.json"
    files.write_json(path, made())
    assert scaling_run.load(path) == made() and [file.name for file in path.parent.iterdir()] == ["one.json"]
    with pytest.raises(TypeError):
        files.write_json(path, {"kind": object()})
    assert scaling_run.load(path) == made()


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot read: No such file"), ("{", "no JSON"), ("[]", "got 'list'"), ('{"kind": "plan"}', "got 'plan'"),
    (json.dumps({"kind": scaling_run.KIND}), "run.json: settings: missing"),
    (json.dumps({"kind": scaling_run.KIND, "settings": {**Settings().as_json(), "batch": 0}}), "run.json: settings: batch")])
def test_what_is_no_run(tmp_path, text, message):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        scaling_run.load(path)


def test_runs_are_shown_together(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, run in (("a", made()), ("b", made(world=2, ms=125.0))):
        files.write_json(tmp_path / f"{name}.json", run)
    kept = [str(tmp_path / f"{name}.json") for name in "ab"]
    assert scaling.main(["--show", *kept, "--chart", str(tmp_path / "c.svg"), "--paper"]) == 0
    out = capsys.readouterr().out
    assert "80.0%" in out and f"Efficiency is against {kept[0]}" in out and (tmp_path / "c.svg").exists()
    assert "77%" in out and "74%" in out and "arXiv 1909.08053" in out
    assert scaling.main(["--show", *kept, "--baseline", kept[1]]) == 0
    assert "125.0%" in capsys.readouterr().out


def test_the_paper_is_quoted_as_it_reports():
    assert [(row.devices, row.efficiency, row.tflops) for row in scaling_efficiency.PAPER] == [
        (1, 1.0, 39.0), (8, 0.77, None), (512, 0.74, None)]


@pytest.mark.parametrize(("words", "message"), [
    (["--preset", "tiny", "--heads", "5"], "hidden_size 64 is not a multiple of num_attention_heads 5"),
    (["--tensor-parallel", "2"], "must be a multiple of 2, got 1"), (["--device", "cuda"], "--device cuda: torch"),
    (["--baseline", "missing.json"], "missing.json: cannot read"), (["--sweep", "2,x"], "--sweep must be different numbers"),
    (["--sweep", "1,1"], "--sweep must be different numbers"),
    (["--json", "/proc/none/run.json"], "/proc/none/run.json: cannot write"),
    (["--sweep", "1,3", "--family", "small"], "3 ranks: --family small has presets for 1, 2, 4, 8"),
    (["--sweep", "1,3", "--strong"], "3 ranks: --strong: 3 replicas do not divide the batch 4"),
    (["--sweep", "1,8", "--along", "tp"], "8 ranks: settings: tensor_parallel 8 does not divide heads 4"),
    (["--sweep", "1,2", "--weak", "--along", "tp"], "--family has models that grow"),
    (["--sweep", "1,2", "--family", "small", "--strong"], "without --strong"),
    (["--sweep", "1,2", "--device", "cuda"], "--sweep 1,2: --device cuda: torch")])
def test_what_is_refused(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "cuda" in words:
        monkeypatch.setattr(scaling_run.cuda, "why_not", lambda: "torch finds no GPU")
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: pytest.fail("nothing is to be started"))
    assert scaling.main(words if "--device" in words else [*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("benchmarks.scaling: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_says_which_and_ends(monkeypatch, capsys, tmp_path):
    """It ends at once, whatever the others wait for: torchrun then ends them."""
    def ended(status: int) -> None:
        raise SystemExit(status)

    def broken(*args, **more):
        raise RuntimeError("planted")

    monkeypatch.setattr(scaling.os, "_exit", ended)
    monkeypatch.setattr(scaling, "run", broken)
    monkeypatch.setattr(scaling.harness, "restart_reusing", lambda *args: None)
    monkeypatch.setattr(scaling_run, "start", lambda *args: None)
    monkeypatch.setattr(scaling.torch, "set_num_threads", lambda n: None)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4"), ("LOCAL_RANK", "3"), *scaling.QUIET.items()):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        scaling.main(["--preset", "tiny", "--device", "cpu", "--json", str(tmp_path / "run.json")])
    assert end.value.code == 1 and not list(tmp_path.iterdir())
    assert "benchmarks.scaling: rank 3 of 4 failed: RuntimeError: planted\n" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--iterations", "0"], "--iterations must be at least 1, got 0"), (["--warmup", "-1"], "--warmup must be at least 0"),
    (["--peak-tflops", "0"], "--peak-tflops must be at least"), (["--weak"], "are for --sweep"),
    (["--preset", "huge"], "invalid choice: 'huge'"), (["--strong", "--weak"], "not allowed with")])
def test_what_the_parser_refuses(words, message, capsys):
    with pytest.raises(SystemExit):
        scaling.parse(words)
    assert message in capsys.readouterr().err


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(scaling_run.cuda, "why_not", lambda: "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert scaling_run.why_not("cuda", 4) == "4 ranks on a machine with 2 GPUs: a GPU serves one rank"
    assert scaling_run.why_not("cuda", 2) == "" and scaling_run.why_not("cpu", 64) == ""


@pytest.mark.parametrize(("words", "settings"), [
    (["--preset", "tiny"], [{}, {}]), (["--preset", "tiny", "--strong"], [{"batch": 4}, {"batch": 2}]),
    (["--preset", "tiny", "--strong", "--along", "tp"], [{"tensor_parallel": 1}, {"tensor_parallel": 2}]),
    (["--preset", "tiny", "--along", "pp", "--microbatches", "2"],
     [{"microbatches": 2}, {"microbatches": 2, "pipeline_parallel": 2}])])
def test_the_settings_of_a_sweep(words, settings):
    args = arguments("--sweep", "1,2", *words)
    assert [scaling_sweep.settings_for(args, n) for n in (1, 2)] == [replace(PRESETS["tiny"], **one) for one in settings]


def test_a_sweep_of_a_family_takes_a_preset_for_each_size():
    args = arguments("--sweep", "1,2,4,8", "--family", "paper", "--dtype", "fp16")
    assert [scaling_sweep.settings_for(args, n) for n in (1, 2, 4, 8)] == [
        replace(PRESETS[name], dtype="fp16") for name in ("1.2B", "2.5B", "4.2B", "8.3B")]


@pytest.fixture
def started(monkeypatch):
    """The commands that a sweep starts; runs with 4 ranks fail, the others keep an invented record."""
    commands = []

    def run(command, **more):
        commands.append((command, more))
        n = int(command[command.index("--nproc-per-node") + 1])
        if n == 4:
            log = "noise\nbenchmarks.scaling: rank 3 of 4 failed: it broke\nmore noise\n"
            return subprocess.CompletedProcess(command, 1, "", log)
        settings = trainer.from_args(scaling.parse(command[command.index("benchmarks.scaling") + 1:]))
        changes = {name: value for name, value in settings.as_json().items() if name != "preset"}
        files.write_json(scaling.Path(command[command.index("--json") + 1]), made(world=n, ms=100.0 * n, **changes))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(scaling_sweep.subprocess, "run", run)
    return commands


def test_a_sweep_runs_tabulates_and_draws(started, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling_run, "processors", lambda: 8)
    assert scaling.main(["--sweep", "1,2", "--preset", "tiny", "--device", "cpu", "--out", str(tmp_path), "--iterations", "3"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "2.json", "scaling.svg", "table.md"]
    out = capsys.readouterr().out
    assert "50.0%" in out and "Efficiency is against the run with 1 device." in out
    assert "| weak efficiency | 100.0% | 50.0% |" in (tmp_path / "table.md").read_text()
    for command, more in started:
        assert command[command.index("--threads") + 1] == "4"  # of both runs: a device must stay the same
        assert command[command.index("--iterations") + 1] == "3" and "--standalone" in command
        assert harness.is_reusing_allocator(more["env"]) and more["env"]["OMP_NUM_THREADS"] == "4"


def test_a_sweep_ends_with_the_run_that_fails(started, tmp_path, capsys):
    words = ["--sweep", "2,4,8", "--preset", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert scaling.main(words) == 1
    found = capsys.readouterr()
    assert "the run with 4 ranks failed:\nbenchmarks.scaling: rank 3 of 4 failed: it broke\n" in found.err
    assert len(started) == 2 and "2 devices" in found.out
    (tmp_path / "4.json").write_text("left by an earlier sweep")
    assert scaling.main(words) == 1 and not (tmp_path / "4.json").exists()
