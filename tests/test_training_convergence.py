"""The comparison with Hugging Face's GPT-2 in `benchmarks/convergence.py`, in a few steps of a tiny model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import convergence
from benchmarks.harness import Timing

pytest.importorskip("transformers")

SIZE = convergence.Size(layers=2, hidden=32, heads=2, seq=32, batch=4, vocab=300, files=9, steps=16)


@pytest.fixture(scope="module")
def data():
    samples, vocab = convergence.corpus(SIZE)
    return convergence.batches(samples, SIZE), vocab


def test_the_losses_are_the_same(data):
    batches, vocab = data
    assert [batch.shape for batch in batches] == [(4, 32)] * 16
    assert len({tuple(row) for batch in batches for row in batch.tolist()}) > 60
    losses, times = convergence.train(list(convergence.TITLES), SIZE, batches, vocab)
    assert set(losses) == set(times) == {"ours", "eager", "sdpa"} and len(times["ours"]) == 16
    assert max(convergence.differences(losses)) < 1e-5
    assert losses["ours"][-1] < losses["ours"][0] - 0.1  # something was learnt, so that there is something to compare


def test_a_difference_is_seen(data, monkeypatch):
    """Another epsilon in our layer norms, which no weight shows."""
    batches, vocab = data
    model_of = convergence.model_of

    def altered(name, *rest):
        model = model_of(name, *rest)
        if name == "ours":
            model.decoder.layers[0].input_layernorm.eps = 1e-2
        return model
    monkeypatch.setattr(convergence, "model_of", altered)
    losses, _ = convergence.train(["ours", "eager"], SIZE, batches, vocab)
    assert max(convergence.differences(losses)) > convergence.LIMIT


def test_the_initial_weights_are_the_same():
    ours, theirs = (convergence.model_of(name, SIZE, 300) for name in ("ours", "eager"))
    ids = torch.randint(300, (2, 32))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert theirs.config._attn_implementation == "eager"


def test_table_and_chart(tmp_path, capsys):
    timing = dataclasses.asdict(Timing.of([1.0, 2.0]))
    losses = {name: [3.0, 2.0 + (name == "ours") * 2e-3] for name in convergence.TITLES}
    found = {"environment": dataclasses.asdict(convergence.harness.environment()), "transformers": "5", "size": {"steps": 2},
             "largest_difference": 2e-3, "at_step": 2, "losses": losses, "timings_ms": dict.fromkeys(convergence.TITLES, timing),
             "memory_mib": {"ours": {"step": 50.0}, "eager": {"step": 100.0}, "sdpa": {"step": 75.0}}}
    convergence.show(found)
    out = capsys.readouterr().out
    assert "Losses of 2 steps differ by 2.0e-03 at most (step 2), NOT within 0.001" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "Hugging Face, eager attention 2.5000 1.5 1.2-1.8 1.00 100 2.00" in lines
    if not convergence.charts.why_not():
        convergence.draw(tmp_path / "c.svg", found)
        assert "what is allowed" in (tmp_path / "c.svg").read_text()


def test_the_results_that_are_shown():
    """What docs/training.md tells is in the file, and was within the limit."""
    found = json.loads(convergence.RESULT.read_text())
    assert found["size"] == dataclasses.asdict(convergence.Size()) and len(found["losses"]["ours"]) == 300
    assert max(convergence.differences(found["losses"])) == found["largest_difference"] <= convergence.LIMIT
