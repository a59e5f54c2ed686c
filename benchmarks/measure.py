"""How rows are measured: every entry is checked against float64, and then timed in one sitting or several, spread over the run.

A sitting makes inputs anew and lets the contestants take turns: a copy of as many bytes as the op has to move, ours, and the peers.
What happens between sittings, on this machine and in the layout of its memory, shows in the difference of their medians.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import megatron_kernels as mk

from . import harness, peers, report
from .cases import DTYPES, Made, Truth, prepare, with_gradients
from .device import Device
from .harness import Contestant, Timing
from .rows import BESIDE, BUSY, Results, Row
from .shapes import Entry

PIECE = {"cpu": 2**20, "cuda": 2**24}  # elements that the check has in float64 at a time
SETTLED = 0.03  # of its median: a sitting goes on for up to PATIENCE times its seconds while an interval is wider
PATIENCE = 2.0
AGAIN = 2  # times that a sitting is repeated while others take more than BUSY of the processors; the quietest counts


@dataclass
class Findings:
    """What the sittings of one row found so far."""

    samples: dict[str, list[list[float]]] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    late: dict[str, None] = field(default_factory=dict)
    others: float | None = None
    failure: str = ""
    skipped: str = ""


class Job:
    """An entry in the course of a run."""

    def __init__(self, entry: Entry, args: argparse.Namespace, device: Device):
        self.entry, self.args, self.device = entry, args, device
        self.found = {mode: Findings() for mode in args.modes}
        self.inexact: dict[str, str] = {}
        self.checked = False
        self.compiled: dict[str, Callable[..., Tensor]] = {}

    def rows(self) -> list[Row]:
        def timings(found: Findings) -> dict[str, Timing]:
            order = [*(name for name in BESIDE if name in found.samples), *(name for name in found.samples if name not in BESIDE)]
            return {name: Timing.of(*found.samples[name]).times(found.factors.get(name, 1.0)) for name in order}

        return [self.entry.row(mode, timings={} if f.failure else timings(f), peak=f.peak, failure=f.failure,
                               skipped="" if f.samples else f.skipped, missing=f.missing, inexact=self.inexact, late=list(f.late),
                               others=f.others) for mode, f in self.found.items()]

    def skip(self, why: str) -> None:
        for found in self.found.values():
            found.skipped = found.skipped or why

    def sit(self, announce: Callable[[str], None]) -> None:
        """Check, if nobody has, and time every mode once more. What ours can't do is in the rows afterwards."""
        modes = [mode for mode, found in self.found.items() if not (found.failure or found.skipped)]
        try:
            if not self.checked:
                announce(f"{self.entry.name}: checking")
            inputs, gradient = prepare(self.entry.case, self.entry.case.shape, DTYPES[self.entry.dtype], self.device.name)
            made = self._make(inputs)
            if not self.checked and (wrong := self._check(made, inputs, gradient)):
                for found in self.found.values():
                    found.failure = wrong
                return
            while modes:
                announce(f"{self.entry.name}: timing {modes[0]}")
                self._time(modes[0], made, inputs, gradient)
                del modes[0]
        except torch.OutOfMemoryError as error:
            for mode in modes:
                self.found[mode].skipped = peers.reason(error)
        except RuntimeError as error:
            for mode in modes:
                self.found[mode].failure = peers.reason(error)

    def _make(self, inputs: tuple[Tensor, ...]) -> dict[str, Made]:
        """Ours and the peers that can be made. Compiled functions live as long as the job."""
        case, made = self.entry.case, {"ours": Made(self.entry.case.ours, inputs)}
        torch_ways = {"eager": {"eager": case.eager},
                      "compile": {"compile": case.eager, **({} if self.args.quick else case.variants)}}
        for name in self.entry.peers:
            for label, function in torch_ways.get(name, {name: None}).items():
                if all(label in found.missing for found in self.found.values()):
                    continue
                if name == "compile" and label not in self.compiled:
                    self.compiled[label] = torch.compile(function, fullgraph=True, dynamic=False)
                try:
                    made[label] = Made(self.compiled.get(label, function), inputs) if name in torch_ways else \
                        peers.make(name, case, inputs)
                except Exception as error:
                    self._miss(label, error)
        return made

    def _miss(self, name: str, error: Exception) -> None:
        for found in self.found.values():
            found.missing[name] = peers.reason(error)

    def _check(self, made: dict[str, Made], inputs: tuple[Tensor, ...], gradient: Tensor) -> str:
        """How ours is wrong. A peer that is inexact is named, one that fails is also taken out of `made`."""
        rows = max(1, PIECE[self.entry.kind] // math.prod(inputs[0].shape[-2 if inputs[0].dim() == 4 else -1:]))
        truth = Truth(self.entry.case, inputs, gradient, rows)
        if wrong := truth.mismatch(self.entry.case.ours):
            return wrong
        for name in [name for name in made if name != "ours"]:
            try:
                if off := truth.peer_mismatch(made[name]):
                    self.inexact[name] = off
            except Exception as error:
                self._miss(name, error)
                del made[name]
            self.device.release()
        self.checked = True
        return ""

    def _time(self, mode: str, made: dict[str, Made], inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
        """A peer that fails, for want of memory or otherwise, is named and left out; what stops ours or the copy is raised."""
        found, first = self.found[mode], not self.found[mode].samples
        with torch.set_grad_enabled(mode != "forward"):
            running: list[Contestant] = []
            for name, those in made.items():
                if name in found.missing:
                    continue
                try:
                    contestant = contestant_of(name, those, gradient, mode)
                    contestant.run()  # compiles
                    self.device.synchronize()
                    if first:
                        found.peak[name] = self.device.peak(contestant)
                    running.append(contestant)
                except Exception as error:
                    if name == "ours":
                        raise
                    found.missing[name] = peers.reason(error)
                if name in found.missing:  # by now nothing holds what the failed step had
                    self.device.release()
            copy, found.factors["copy"] = self.device.copy(inputs[0], self.entry.nbytes(mode))
            running.append(copy)
            if self.entry.kind == "cpu" and self.entry.group == "main" and not self.args.quick:
                running.append(self._in_cache(mode))
                found.factors["in cache"] = math.prod(self.entry.case.shape) / math.prod(self.entry.case.piece)
            clock, share, samples = self.device.clock(), math.inf, {}
            for _ in range(1 + AGAIN):
                others = self.device.others()
                taken = harness.sample(running, seconds=self.args.seconds, min_rounds=self.args.rounds, warmup=1, clock=clock,
                                       settled=SETTLED, patience=PATIENCE)
                theirs = others()
                if theirs is None or theirs < share:
                    share, samples = theirs, taken
                if share is None or share <= BUSY:
                    break
        found.others = share if found.others is None or share is None else max(found.others, share)
        found.late |= dict.fromkeys(contestant.name for contestant in running if contestant.step in clock.late)
        for name, milliseconds in samples.items():
            found.samples.setdefault(name, []).append(milliseconds)

    def _in_cache(self, mode: str) -> Contestant:
        """Ours on so few of the rows that they stay in the caches."""
        case = self.entry.case
        piece, gradient = prepare(case, case.piece, DTYPES[self.entry.dtype], self.device.name)
        return contestant_of("in cache", Made(case.ours, piece), gradient, mode, warm=True)


def contestant_of(name: str, made: Made, gradient: Tensor, mode: str, warm: bool = False) -> Contestant:
    """The gradient comes in the layout and dtype of the function's own output, so that no conversion is timed."""
    function, inputs = made.function, made.inputs
    if mode == "forward":
        without = with_gradients(inputs, False)
        return Contestant(name, lambda: function(*without), warm)
    wanted = [x for x in inputs if x.requires_grad]
    output = function(*inputs)
    incoming = gradient.to(output.dtype).reshape(output.shape)
    if mode == "backward":
        return Contestant(name, lambda output: torch.autograd.grad(output, wanted, incoming), warm, lambda: function(*inputs))
    return Contestant(name, lambda: torch.autograd.grad(function(*inputs), wanted, incoming), warm)


def run(entries: list[Entry], args: argparse.Namespace, device: Device,
        so_far: Callable[[Results], None] = lambda _: None) -> Results:
    """Every row, where the time was too short for it by name alone. `so_far` gets the results after each entry."""
    settings = {name: getattr(args, name) for name in ("quick", "implementation", "seconds", "rounds", "sittings")}
    status = peers.status(args.peers, args.device)

    def able(entry: Entry) -> Entry:
        return replace(entry, peers=tuple(name for name in entry.peers
                                          if peers.has(name, entry.case) and not status[name]["why_not"]))

    jobs = [Job(able(entry), args, device) for entry in entries]

    def results(environment: dict[str, object]) -> Results:
        return Results(environment, [row for job in jobs for row in job.rows()], settings, status)

    environment = device.environment()
    end, ended = time.monotonic() + 60 * args.minutes, ""
    with (report.progress_bar(len(jobs) * (1 + args.sittings * len(args.modes))) as announce, mk.use(args.implementation),
          harness.no_collection()):
        for number in range(args.sittings):
            for job in jobs:
                ended = ended or ("time was up" if time.monotonic() > end else "")
                try:
                    if not ended:
                        job.sit(announce)
                except KeyboardInterrupt:
                    ended = "interrupted"
                if ended:
                    job.skip(ended)
                elif number == 0 or job is jobs[-1]:
                    so_far(results(environment))
                gc.collect(1)  # what this entry made: everything, as at the start, would take longer than the entry
                device.release()
    return results(environment)
