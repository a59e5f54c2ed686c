"""The miniature of pre-norm against post-norm: its language, its definitions, and that it runs and writes what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import charts, post_norm
from benchmarks.post_norm import Language, Setting

SMALL = replace(Setting(), steps=3, hidden=16, heads=2)


def test_language():
    """Sentences keep to their topic, all words are drawn, and the two losses are those of a context ignored and known."""
    language = Language(64, 32)
    sentences = language.draw(500, 16, torch.Generator().manual_seed(0))
    topic_of = torch.empty(64, dtype=torch.long)
    for topic, words in enumerate(language.words):
        topic_of[words] = topic
    assert (topic_of[sentences] == topic_of[sentences[:, :1]]).all()
    assert sentences.unique().numel() == 64
    assert (language.entropy, language.bound) == (math.log(64), math.log(2))


def test_both_orderings_start_from_the_same_weights():
    pre, post = (post_norm.build(SMALL, 3, ordering, seed=5) for ordering in post_norm.ORDERINGS)
    assert all(torch.equal(a, b) for a, b in zip(pre.parameters(), post.parameters(), strict=True))
    assert [model.config.apply_residual_connection_post_layernorm for model in (pre, post)] == [False, True]
    wide = post_norm.build(Setting(), 8, "pre-norm", seed=1)
    for name in ("linear_proj", "linear_qkv"):  # unscaled
        assert getattr(wide.encoder.layers[3].self_attention, name).weight.std().item() == pytest.approx(0.08, rel=0.1)


def test_runs_repeat_and_see_the_same_batches():
    one, again = (post_norm.train(SMALL, 2, "post-norm", 3) for _ in range(2))
    assert one == again and len(one["losses"]) == len(one["norms"]) == 3
    assert one["losses"] != post_norm.train(SMALL, 2, "post-norm", 4)["losses"]


def test_the_learning_rate_warms_up(monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    post_norm.train(replace(SMALL, steps=4, warmup=2, lr=0.01), 2, "pre-norm", 0)
    assert rates == [0.005, 0.01, 0.01, 0.01]


@pytest.mark.parametrize(("losses", "norms", "failed", "spikes"), [
    ([4.2] * 100, [1.0] * 100, True, 0), ([4.2] * 90 + [0.8] * 10, [1.0] * 100, False, 0),
    ([4.2] * 90 + [3.9] * 10, [1.0] * 100, True, 0), ([2.0] * 30 + [math.nan], [1.0] * 31, True, 0),
    ([1.0] * 100, [1.0] * 50 + [10.5] + [1.0] * 49, False, 1), ([1.0] * 100, [99.0] + [1.0] * 99, False, 0)])
def test_definitions(losses, norms, failed, spikes):
    found = post_norm.judge({"losses": losses, "norms": norms}, Setting())
    assert (found["failed"], found["spikes"]) == (failed, spikes)


@pytest.mark.parametrize(("post", "pre", "shown"), [((0, 3), (0, 0), True), ((0, 1), (0, 0), False), ((0, 3), (0, 1), False),
                                                    ((1, 3), (0, 0), False), ((0, 0), (0, 0), False)])
def test_verdict(post, pre, shown):
    """post, pre: failures of three runs, at the least and at the greatest depth."""
    failures = {"post-norm": post, "pre-norm": pre}
    runs = [{"depth": depth, "ordering": ordering, "failed": i < failures[ordering][at], "seed": i}
            for ordering in failures for at, depth in enumerate((4, 24)) for i in range(3)]
    text = post_norm.verdict(runs)
    assert text.endswith(": as the paper found") == shown
    assert text.startswith(f"post-norm failed in {post[1]} of 3 runs at 24 layers and in {post[0]} at 4, pre-norm in {sum(pre)} of "
                           "6 at all depths: ")


def test_main(tmp_path, capsys, monkeypatch):
    """In this process: spawned ones would only import torch once more."""
    class Here:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, call, *arguments):
            from concurrent.futures import Future

            future = Future()
            future.set_result(call(*arguments))
            return future

    monkeypatch.setattr(post_norm, "ProcessPoolExecutor", Here)
    threads = torch.get_num_threads()
    drawn = [] if charts.why_not() else ["--chart", str(tmp_path / "c.svg")]
    assert post_norm.main(["--quick", "--json", str(tmp_path / "r.json"), *drawn]) == 0
    torch.set_num_threads(threads)
    content = json.loads((tmp_path / "r.json").read_text())
    assert len(content["runs"]) == 8 and all(len(run["losses"]) == 12 for run in content["runs"])
    shown = capsys.readouterr()
    assert content["verdict"] in " ".join(shown.out.split()) and "8/8" in shown.err
    assert "post-norm" in shown.out and max(map(len, shown.out.splitlines())) <= 100
    if drawn:
        text = (tmp_path / "c.svg").read_text()
        assert all(word in text for word in ("2 layers", "3 layers", "pre-norm", "post-norm", "context ignored"))


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path):
    runs = post_norm.run_all(SMALL, [2], [1, 2], 2)
    assert [(run["ordering"], run["seed"]) for run in runs] == [(ordering, seed) for ordering in post_norm.ORDERINGS
                                                                for seed in (1, 2)]
    assert runs[0]["losses"] == post_norm.train(SMALL, 2, "pre-norm", 1)["losses"]


@pytest.mark.parametrize(("arguments", "message"), [(["--depths", "0", "4"], "--depths must be at least 1, got [0, 4]"),
                                                    (["--seeds", "0"], "--seeds must be at least 1, got 0")])
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit):
        post_norm.main(arguments)
    assert message in capsys.readouterr().err


def test_no_chart_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(charts, "why_not", lambda: "charts need matplotlib")
    with pytest.raises(SystemExit):
        post_norm.main(["--chart", "x.svg"])
    assert "--chart: charts need matplotlib" in capsys.readouterr().err
