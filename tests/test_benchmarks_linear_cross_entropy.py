"""The benchmark of linear cross-entropy compares the same computation, and measures memory that is there."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import harness
from benchmarks import linear_cross_entropy as bench

SMALL = ["--tokens", "300", "--vocabulary", "500", "--hidden", "16", "--threads", "1", "--rounds", "2"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_prints_ratios_and_writes_json(threads, monkeypatch, tmp_path, capsys):
    for name, value in harness.REUSING_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "results.json"
    assert bench.main([*SMALL, "--dtype", "fp32", "bf16", "--no-memory", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    assert set(rows[0]["ratio"]) == {"mean", "sum", "none"} and all(ratio > 0 for ratio in rows[0]["ratio"].values())
    assert rows[0]["timings_ms"]["products"]["samples"] == 2
    shown = capsys.readouterr().out
    assert "linear cross-entropy mean" in shown and "300 tokens, 16 hidden, vocabulary 500" in shown


def test_a_wrong_result_is_not_timed(threads, monkeypatch, capsys):
    for name, value in harness.REUSING_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    right = bench.vocab_parallel_linear_cross_entropy
    monkeypatch.setattr(bench, "vocab_parallel_linear_cross_entropy", lambda *args, **options: 1.01 * right(*args, **options))
    assert bench.main([*SMALL, "--no-memory"]) == 1
    assert "fp32 is wrong, so it was not timed: loss for mean differs by 1.0e-02" in capsys.readouterr().out


@pytest.mark.parametrize(("how", "reduction"), [("linear", "mean"), ("linear", "none"), ("logits", "mean")])
def test_memory_is_a_tenth_of_the_logits(how, reduction):
    args = bench.parse(["--tokens", "3072", "--vocabulary", "16384", "--hidden", "64", "--threads", "1"])
    logits = 3072 * 16384 * 4 / 2**20
    held = bench.held_in_own_process(args, how, reduction, "fp32")
    assert 0.05 * logits < held < bench.HELD * logits if how == "linear" else held > 0.95 * logits
