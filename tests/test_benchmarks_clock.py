"""How a step on a GPU is timed, by events that are made up, and what is asked of the GPU itself."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cuda, device, harness
from benchmarks.cuda import EventClock
from benchmarks.harness import Contestant


class Stopwatch:
    """An event that has happened only once the host waits for a later one, as on a GPU that is behind."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end) -> float:
        return (end.at - self.at) * 1e3


class Script:
    """A GPU whose events happen, by the time the host has enqueued a step, only when fewer than `enough` flushes are in front."""

    def __init__(self, enough: int):
        self.enough, self.log = enough, []

    def clock(self, most: int = 64) -> EventClock:
        script = self

        class Buffer:
            def zero_(self):
                script.log.append("flush")

        class Event:
            def __init__(self):
                self.name = "end" if script.log and script.log[-1] == "made start" else "start"
                script.log.append(f"made {self.name}")

            def record(self):
                script.log.append(self.name)

            def query(self):
                assert self.name == "start"
                since = len(script.log) - 1 - script.log[::-1].index("made start")
                return script.log[since:].count("flush") < script.enough

            def synchronize(self):
                script.log.append("wait")

            def elapsed_time(self, end):
                assert (self.name, end.name) == ("start", "end")
                return 7.0

        return EventClock(Buffer(), Event, most)

    def samples(self) -> list[list[str]]:
        made = [what for what in self.log if not what.startswith("made")]
        ends = [i + 1 for i, what in enumerate(made) if what == "wait"]
        return [made[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def test_clock_flushes_outside_the_events():
    script = Script(enough=1)
    clock = script.clock()
    assert clock(Contestant("a", lambda: script.log.append("step"))) == 7.0
    assert clock(Contestant("b", lambda made: script.log.append(f"step {made}"),
                            setup=lambda: script.log.append("setup") or "forward's")) == 7.0
    assert script.samples() == [["flush", "start", "step", "end", "wait"],
                                ["setup", "flush", "start", "step forward's", "end", "wait"]]
    assert not clock.late


def test_sample_is_taken_again_when_the_host_was_late():
    script = Script(enough=3)
    clock = script.clock()

    def step() -> None:
        script.log.append("step")

    clock(Contestant("a", step))
    assert [sample.count("flush") for sample in script.samples()] == [1, 2, 4] and not clock.late
    clock(Contestant("a", step))  # and it remembers
    assert [sample.count("flush") for sample in script.samples()] == [1, 2, 4, 4]
    clock(Contestant("b", lambda: None))
    assert [sample.count("flush") for sample in script.samples()[4:]] == [1, 2, 4]


def test_step_that_waits_for_the_gpu_is_late():
    script = Script(enough=1000)
    clock = script.clock(most=4)

    def step() -> None: ...

    assert clock(Contestant("a", step)) == 7.0 and clock.late == {step}
    assert [sample.count("flush") for sample in script.samples()] == [1, 2, 4]


def test_setup_is_called_before_each_step():
    numbers = itertools.count()
    seen: list[int] = []
    backward = Contestant("backward", seen.append, setup=lambda: next(numbers))
    found = harness.interleave([backward], seconds=0, min_rounds=3, warmup=1, clock=EventClock(torch.empty(8), Stopwatch))
    assert seen == [0, 1, 2, 3] and found["backward"].samples == 3


@pytest.mark.parametrize(("answer", "found"), [
    ("echo 'GPU-1, 5, 1 MHz, 2 MHz, 3 MHz, 4 W'; echo 'GPU-2, 6, 1 MHz, 2 MHz, 3 MHz, 4 W'", "6"),
    ("echo 'MIG, 7, 1 MHz, 2 MHz, 3 MHz, 4 W'", "7"),
    ("echo 'GPU-1, 5'", None), ("echo 'GPU-2, 6, 1 MHz, 2 MHz, 3 MHz, 4 W'; exit 9", None), ("exec sleep 60", None)])
def test_nvidia_smi(answer, found, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(cuda, "SMI_SECONDS", 0.3)
    calls = []
    assert cuda.nvidia_smi("2", lambda: calls.append(time.sleep(0.01))).get("driver_version") == found
    assert len(calls) > 3 or "sleep" not in answer  # busy as long as it takes
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert cuda.nvidia_smi("2", lambda: None) == {}


def test_environment_names_the_card(monkeypatch):
    card = SimpleNamespace(name="Abacus 2000", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
                           L2_cache_size=50 * 2**20, uuid="ab-cd")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(64, **options))
    answers = [dict(zip(cuda.SMI_FIELDS, ["GPU-ab-cd", "5", "1 MHz", "2 MHz", "3 MHz", "4 W"], strict=True)), {}]

    def nvidia_smi(uuid, busy):
        busy()
        assert uuid == "ab-cd"
        return answers.pop(0)

    monkeypatch.setattr(cuda, "nvidia_smi", nvidia_smi)
    sizes: list[int] = []
    monkeypatch.setattr(torch, "empty", lambda size, device, **options: sizes.append(size) or empty(64, **options))
    found = cuda.device().environment()
    cuda.device().clock()
    assert sizes[-1] == 2**27 and set(found) == set(cuda.environment())
    assert (found["device"], found["compute_capability"], found["l2_mib"], found["driver"]) == ("Abacus 2000", "9.0", 50.0, "5")
    assert found["clocks"] == "SM 1 MHz of 2 MHz, memory 3 MHz, 4 W" and found["torch"] == torch.__version__
    card.L2_cache_size = 126 * 2**20
    cuda.device().clock()
    assert sizes[-1] == 252 * 2**20


def test_copy_moves_the_bytes_of_the_op(monkeypatch):
    monkeypatch.setattr(cuda, "COPY", 1000)
    contestant, factor = cuda.copying(torch.empty(3), 600.0)
    assert contestant.step().numel() == 300 and factor == 1
    contestant, factor = cuda.copying(torch.empty(3), 8000.0)
    assert contestant.step().numel() == 1000 and factor == 4


def test_clone_of_the_tensor_stands_for_the_bytes_of_the_op():
    x = torch.ones(8, 100, requires_grad=True)
    contestant, factor = device.clone_of(x, 4800.0)
    assert torch.equal(contestant.step(), x) and not contestant.step().requires_grad and factor == 4800 / (2 * 3200)


def test_peak_of_allocations():
    """Three tensors of a megabyte at once in between, one at the end; what is made in the setup does not count."""
    def step(x):
        y = x + 1
        z = y * 2
        return (y + z).sum()

    def backward(y):
        return torch.autograd.grad(y, x)

    x = torch.ones(2**18, requires_grad=True)
    held = device.peak_of_allocations(Contestant("a", step, setup=lambda: torch.ones(2**18)))
    assert 3 * 2**20 <= held < 3 * 2**20 + 2**16
    held = device.peak_of_allocations(Contestant("b", backward, setup=lambda: (3 * x).sum()))
    assert 2**20 <= held < 2**20 + 2**16


def test_cold_clock_reads_its_buffer_before_each_step():
    class Buffer:
        def sum(self):
            log.append("flush")

    log: list[str] = []
    clock = device.ColdClock(Buffer())
    assert clock(Contestant("a", lambda: log.append("step"))) > 0 and log == ["flush", "step"] and not clock.late
    assert isinstance(device.cpu().clock().buffer, torch.Tensor) and device.cpu().environment()["flushed_mib"] >= 1


@pytest.mark.gpu
def test_clock_on_a_gpu():
    """It tells how long the GPU works: twice the bytes take twice the time."""
    x = torch.ones(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(x)
    half, whole = (Contestant(str(n), lambda n=n: target[:n].copy_(x[:n])) for n in (2**28, 2**29))
    clock = cuda.device().clock()
    found = harness.interleave([half, whole], seconds=0, min_rounds=11, clock=clock)
    assert found[whole.name].median / found[half.name].median == pytest.approx(2, rel=0.2) and not clock.late
