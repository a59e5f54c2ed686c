"""The benchmark measures what it says: fair turns, the same computation by every contestant, and nothing for a wrong op."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, harness
from benchmarks.cases import CASES, Made, Truth, mismatch, prepare, results, without_mask
from benchmarks.harness import Contestant, Timing, interleave, interval, quantile

SMALL = {"scaled_masked_softmax": (2, 3, 17, 17), "bias_gelu": (33, 40), "layer_norm": (32, 48), "cross_entropy": (12, 301)}
SMALL_CASES = [replace(case, shape=SMALL[case.op], piece=SMALL[case.op]) for case in CASES]
MATRICES = [replace(without_mask(case), shape=(12, 40)) for case in CASES]
by_op = pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.op)


@pytest.fixture(autouse=True)
def one_thread():
    """Several take longer over so little, where others want the processors too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_quantiles():
    samples = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert [quantile(samples, q) for q in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert Timing.of(samples) == Timing(3.0, quantile(samples, 0.2), quantile(samples, 0.8), 5, 1.0, 5.0, 0)
    for function in (lambda: quantile([], 0.5), lambda: interval([])):
        with pytest.raises(ValueError, match="no samples"):
            function()


@pytest.mark.parametrize(("n", "ranks"), [(1, (1, 1)), (5, (1, 5)), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (20, (6, 15)),
                                          (40, (14, 27)), (100, (40, 61))])
def test_interval_by_ranks(n, ranks):
    """The ranks of tables of the sign test, at 95%."""
    samples = list(range(1, n + 1))
    random.Random(0).shuffle(samples)
    assert interval(samples) == ranks


def test_interval_has_the_median_in_it_as_often_as_it_says():
    """2000 draws of a skewed distribution: the share that misses its median, ln 2, is what the binomial distribution says."""
    draw = random.Random(1)
    ends = [interval([draw.expovariate(1) for _ in range(15)]) for _ in range(2000)]
    missed = sum(not low <= math.log(2) <= high for low, high in ends) / 2000
    expected = 2 * sum(math.comb(15, k) for k in range(4)) / 2**15
    assert expected == pytest.approx(0.035, abs=0.001) and missed == pytest.approx(expected, abs=0.015)


def test_interval_spans_the_sittings_and_outliers_are_counted():
    quiet = [1.0] * 19 + [9.0]
    assert Timing.of(quiet) == Timing(1.0, 1.0, 1.0, 20, 1.0, 1.0, outliers=1)
    both = Timing.of(quiet, [1.5] * 5, [0.5] * 5)
    assert (both.median, both.low, both.high, both.samples, both.outliers) == (1.0, 0.5, 1.5, 30, 6)
    assert both.width == 1.0 and both.times(2).high == 3.0 and both.times(2).width == 1.0
    assert Timing.of([1.0, 1.1, 1.2, 1.3, 1.4]).outliers == 0


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
    timings = interleave([nothing], seconds=60, min_rounds=2, max_rounds=5, clock=lambda contestant: next(ticks))
    assert timings["a"] == Timing(2.0, 0.8, 3.2, 5, 0, 4)


@pytest.mark.parametrize(("times", "rounds"), [([1.0], 3), ([1.0, 2.0], 7), ([1.0, 1.01], 3)])
def test_noisy_contestant_gets_more_rounds(monkeypatch, times, rounds):
    """The clock shows a second more each time it is read; four seconds are asked for, at most twice as many are given."""
    now = itertools.count()
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = itertools.cycle(times)
    found = harness.sample([Contestant("a", lambda: None)], seconds=4, min_rounds=1, clock=lambda contestant: next(clock),
                           settled=0.03, patience=2.0)
    assert len(found["a"]) == rounds


def test_warm_contestant_runs_right_before_it_is_timed_and_the_others_behind_a_flush():
    calls: list[str] = []
    cold = Contestant("cold", lambda made: calls.append(f"cold {made}"), setup=lambda: calls.append("setup") or "made")
    warm = Contestant("warm", lambda: calls.append("warm"), warm=True)
    harness.cpu_clock(cold, lambda: calls.append("flush"))
    assert calls == ["setup", "flush", "cold made"]
    calls.clear()
    harness.cpu_clock(warm, lambda: calls.append("flush"))
    assert calls == ["warm", "warm"]


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
    softmax, gelu, norm, entropy = CASES
    assert softmax.nbytes(torch.float32, "forward") == elements * 4 * 1.5  # half is not read
    assert softmax.nbytes(torch.float32, "both") == elements * 4 * 3.5
    assert softmax.nbytes(torch.float32, "backward") == elements * 4 * 2
    assert gelu.nbytes(torch.bfloat16, "both") == 2048 * 4096 * 2 * 5
    assert norm.nbytes(torch.bfloat16, "forward") == 4096 * 1024 * 2 * 2
    assert entropy.nbytes(torch.float32, "forward") == 512 * 50304 * 4


@by_op
def test_every_contestant_computes_the_op(case):
    """In float32: in 16 bits eager rounds after every step, and sums some parameter gradients in 16 bits."""
    inputs, gradient = prepare(case, case.shape, torch.float32, "cpu")
    for function in (case.eager, *case.variants.values()):
        assert mismatch(case, function, inputs, gradient, slack=8) == ""
    assert len(results(case.eager, inputs, gradient)) == 1 + sum(x.is_floating_point() for x in inputs)


def test_incoming_gradient_is_the_same_each_time():
    one, other = (prepare(SMALL_CASES[1], (3, 5), torch.float32, "cpu") for _ in range(2))
    assert torch.equal(one[1], other[1]) and torch.equal(one[0][0], other[0][0])


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

    inputs, gradient = prepare(case, case.shape, dtype, "cpu")
    assert mismatch(case, case.reference, inputs, gradient, slack=4) == ""
    assert "times the tolerance" in mismatch(case, wrong, inputs, gradient)


def test_nan_is_a_mismatch():
    case = SMALL_CASES[1]
    inputs, gradient = prepare(case, case.shape, torch.float32, "cpu")
    assert "is nan" in mismatch(case, lambda x, bias: case.reference(x, bias) * float("nan"), inputs, gradient)


@pytest.mark.parametrize("case", [*SMALL_CASES, *MATRICES], ids=lambda case: case.title)
@pytest.mark.parametrize("rows", [None, 1, 5])
def test_check_in_pieces(case, rows):
    """The right op passes; one wrong element in the last row does not, nor does a wrong gradient of a parameter."""
    inputs, gradient = prepare(case, case.shape, torch.float32, "cpu")
    assert mismatch(case, case.reference, inputs, gradient, rows=rows) == ""
    assert mismatch(case, case.eager, inputs, gradient, slack=8, rows=rows) == ""

    def wrong_output(*inputs):
        factor = torch.ones_like(output := case.reference(*inputs))
        factor[-1] = 1.25
        return output * factor

    found = re.match(r"output\[(\d+)", mismatch(case, wrong_output, inputs, gradient, rows=rows))
    assert int(found[1]) in ((3, 4, 5) if len(case.shape) == 4 else (len(inputs[0]) - 1,))  # batches and heads count as one
    for number, x in enumerate(inputs):
        if x.is_floating_point():
            def wrong_gradient(*inputs, number=number):
                return case.reference(*(y + 0.001 * (y - y.detach()) if i == number else y for i, y in enumerate(inputs)))
            assert f"gradient of input {number}" in mismatch(case, wrong_gradient, inputs, gradient, rows=rows)


def test_half_precision_below_its_normal_numbers():
    """At 262144 columns probabilities in fp16 have a few bits, and the gradients that start from them no more."""
    case = replace(MATRICES[0], shape=(1, 262144))
    inputs, gradient = prepare(case, case.shape, torch.float16, "cpu")
    assert mismatch(case, case.reference, inputs, gradient) == ""

    class FromRounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(y := case.reference(x))
            return y

        @staticmethod
        def backward(ctx, dy):
            y, dy = ctx.saved_tensors[0].double(), dy.double()
            return (y * (dy - (y * dy).sum(-1, keepdim=True))).half()

    assert mismatch(case, FromRounded.apply, inputs, 100 * gradient) == ""
    assert "times the tolerance" in mismatch(case, lambda x: case.reference(x * 1.1), inputs, gradient)


@pytest.mark.parametrize("case", [*SMALL_CASES, *MATRICES], ids=lambda case: case.title)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_peer_may_round_but_not_be_wrong(case, dtype):
    """Eager passes in every dtype; what is off by a twentieth, in the output or in any gradient, does not."""
    inputs, gradient = prepare(case, case.shape, dtype, "cpu")
    truth = Truth(case, inputs, gradient, rows=3)
    assert truth.peer_mismatch(Made(case.eager, inputs)) == ""
    assert "output" in truth.peer_mismatch(Made(lambda *inputs: 1.05 * case.eager(*inputs), inputs))
    for number, x in enumerate(inputs):
        if x.is_floating_point():
            def off(*inputs, number=number):
                return case.eager(*(y + 0.05 * (y - y.detach()) if i == number else y for i, y in enumerate(inputs)))
            assert f"gradient of input {number}" in truth.peer_mismatch(Made(off, inputs))


def test_small_parts_of_a_peer_matter_where_they_do():
    """A cross-entropy that has a gradient at the true class alone, and a softmax that is zero where it is small."""
    case = replace(SMALL_CASES[3], shape=(4, 30000))
    inputs, gradient = prepare(case, case.shape, torch.bfloat16, "cpu")

    def only_the_class(logits, target):
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, target[:, None], True)
        return case.eager(torch.where(kept, logits, logits.detach()), target)

    assert "times the tolerance" in Truth(case, inputs, gradient).peer_mismatch(Made(only_the_class, inputs))
    inputs, gradient = prepare(MATRICES[0], (4, 30000), torch.bfloat16, "cpu")
    small = Made(lambda x: torch.softmax(x, -1).where(x > 0, 0.0), inputs)
    assert "times the tolerance" in Truth(replace(MATRICES[0], shape=(4, 30000)), inputs, gradient).peer_mismatch(small)


def test_peer_in_a_layout_of_its_own():
    case = SMALL_CASES[3]
    inputs, gradient = prepare(case, case.shape, torch.float32, "cpu")
    theirs = inputs[0].detach().unsqueeze(1).requires_grad_(), inputs[1].unsqueeze(1)
    shapes = []

    def loss(logits, target):
        shapes.append(tuple(logits.shape))
        return case.eager(logits.transpose(1, 2), target)

    assert Truth(case, inputs, gradient).peer_mismatch(Made(loss, theirs)) == "" and shapes == [(12, 1, 301)]


def test_environment_names_the_machine():
    e = harness.environment()
    assert e.device and e.threads == torch.get_num_threads() and e.torch == torch.__version__
    assert e.commit == "unknown" or len(e.commit.rstrip("+")) >= 7
    assert os.fspath(harness.ROOT / "benchmarks") == os.path.dirname(harness.__file__)
    assert harness.cache_bytes() >= 2**15 and (e.clocks == "unknown" or e.clocks.endswith("MHz"))


def test_cases_of_matrices_have_no_mask():
    assert [case.title for case in MATRICES] == ["softmax", "bias-GeLU", "layer norm", "cross-entropy"]
    assert MATRICES[0].nbytes(torch.float32, "backward") == 12 * 40 * 4 * 3
    assert len(MATRICES[0].inputs((2, 3), torch.half, "cpu")) == 1
    assert cases.without_mask(CASES[1]) is CASES[1]


def test_example_of_the_documentation_runs(capsys):
    page = (harness.ROOT / "docs" / "benchmarks.md").read_text()
    example, = (code for code in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "interleave" in code)
    exec(example, {})
    assert re.fullmatch(r"exp: .* ms, between .*\ntanh: .*\n", capsys.readouterr().out)
