"""The ops on a GPU, by columns and at GPT-2's shapes, beside a copy of as many bytes: `python -m benchmarks.ops --device cuda`.

A row is an op at a shape and dtype: forward, backward alone, or both. Its contestants take turns, each behind a flush of the L2
cache: a copy that reads and writes together as many bytes as the op has to move, ours, PyTorch eager, and torch.compile where it
is not left out for the seconds it takes to compile each shape. Cross-entropy gives a loss per token here, so that its time is not
that of the small kernels behind it which take a mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_kernels as mk

from . import cuda, gpu_report, harness, report
from .cases import CASES, DTYPES, Case, mismatch, normal, results, with_gradients
from .gpu_report import Results, Row
from .harness import Contestant

COLUMNS = tuple(2**n for n in range(8, 19))
COMPILED_COLUMNS = COLUMNS[::2]
QUICK_COLUMNS = (1024, 4096, 65536)
ROWS, ELEMENTS = 2**15, 2**30  # of a tensor, at most: 2 GiB in 16 bits, 4 in fp32
ON_CHIP = 2**17  # bytes of a row: a longer one does not stay on a multiprocessor, and softmax and layer norm read it once more
PIECE = 2**24  # elements that the check has in float64 at a time
COPY = 2**30  # bytes that the copy reads, at most; beyond, it is taken to scale

# Of the copy's rate, at tensors large enough for it: rows of 4096 columns or more.
LIMITS = {"forward": 0.90, "backward": 0.85}

# 8192 tokens of GPT-2 345M and of the 8.3B model on one GPU; for cross-entropy also a vocabulary of 131072. --quick takes every
# other one.
GPT2 = {"scaled_masked_softmax": ((8, 16, 1024, 1024), (8, 32, 1024, 1024)), "bias_gelu": ((8192, 4096), (8192, 12288)),
        "layer_norm": ((8192, 1024), (8192, 3072)), "cross_entropy": ((8192, 50304), (8192, 51200), (8192, 131072))}


def per_token(case: Case) -> Case:
    if case.op != "cross_entropy":
        return case
    return replace(case, ours=lambda logits, target: mk.cross_entropy(logits, target, reduction="none"),
                   reference=lambda logits, target: mk.reference.cross_entropy(logits, target, reduction="none"),
                   eager=lambda logits, target: F.cross_entropy(logits, target, reduction="none"))


def over_columns(case: Case) -> Case:
    """A matrix has no diagonal: softmax without a mask."""
    if case.op != "scaled_masked_softmax":
        return per_token(case)
    return replace(case, title="softmax", inputs=lambda shape, dtype, device: (normal(*shape, dtype=dtype, device=device),),
                   ours=lambda x: mk.scaled_masked_softmax(x), reference=lambda x: mk.reference.scaled_masked_softmax(x),
                   eager=lambda x: torch.softmax(x, -1), variants={}, forward=2, both=5)


@dataclass(frozen=True)
class Entry:
    """A case at its shape in one dtype, and the peers that it is measured beside."""

    group: str  # "gpt2" or "columns"
    case: Case
    dtype: str
    peers: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.case.title} {'x'.join(map(str, self.case.shape))} {self.dtype}"

    def nbytes(self, mode: str) -> float:
        """What has to be moved, where a row that is too long for the chip is read once more, or x and dy of it backward."""
        dtype, columns = DTYPES[self.dtype], self.case.shape[-1]
        again = {"forward": 1, "backward": 2, "both": 3}[mode] if self.rereads and columns * dtype.itemsize > ON_CHIP else 0
        return self.case.nbytes(dtype, mode) + again * math.prod(self.case.shape) * dtype.itemsize

    @property
    def rereads(self) -> bool:
        return self.case.op in ("scaled_masked_softmax", "layer_norm")

    def limit(self, mode: str) -> float | None:
        """The share of the copy's rate that is expected, where one is."""
        columns = self.case.shape[-1]
        outside = columns < 4096 or (self.rereads and columns * DTYPES[self.dtype].itemsize > ON_CHIP)
        return None if self.group == "gpt2" or outside else LIMITS.get(mode)

    def row(self, mode: str, **fields) -> Row:
        return Row(self.case.op, self.case.title, self.group, list(self.case.shape), self.dtype, mode, self.nbytes(mode),
                   self.limit(mode), **fields)


def entries(args: argparse.Namespace) -> Iterator[Entry]:
    """Dtype after dtype, GPT-2's shapes first, so that a run that ends early has the rows that matter most."""
    cases = [case for case in CASES if case.op in args.ops]
    for dtype in args.dtypes:
        for case in cases if "gpt2" in args.shapes else ():
            known = GPT2.get(case.op, (case.shape,))
            peers = ("eager", "compile") if dtype != "fp16" else ("eager",)
            for shape in known[::2] if args.quick else dict.fromkeys((case.shape, *known)):
                yield Entry("gpt2", replace(per_token(case), shape=shape), dtype, peers if args.peers is None else args.peers)
        for columns in args.columns if "columns" in args.shapes else ():
            shape = min(ROWS, max(1, ELEMENTS // columns)), columns
            peers = ("eager", "compile") if dtype == "bf16" and columns in COMPILED_COLUMNS and not args.quick else ("eager",)
            for case in cases:
                yield Entry("columns", replace(over_columns(case), shape=shape), dtype, peers if args.peers is None else args.peers)


def incoming_gradient(case: Case, inputs: tuple[Tensor, ...]) -> Tensor:
    """Normal, of the shape and dtype that eager's output has, which is asked for one row."""
    with torch.no_grad():
        output = case.eager(*(x.detach()[:1] if i < case.rowwise else x.detach() for i, x in enumerate(inputs)))
    shape = inputs[0].shape[:1] + output.shape[1:]
    return normal(*shape, dtype=output.dtype, device=output.device.type)


def contestant(name: str, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor, mode: str) -> Contestant:
    """The gradient comes in the dtype of the function's own output, so that no conversion is timed."""
    if mode == "forward":
        without = tuple(x.detach() for x in inputs)
        return Contestant(name, lambda: function(*without))
    with_gradient = [x for x in inputs if x.requires_grad]
    incoming = gradient.to(function(*inputs).dtype)
    if mode == "backward":
        return Contestant(name, lambda output: torch.autograd.grad(output, with_gradient, incoming),
                          setup=lambda: function(*inputs))
    return Contestant(name, lambda: results(function, inputs, incoming))


def copying(nbytes: float, device: cuda.Device) -> tuple[Contestant, float]:
    """A copy that moves so many bytes, half of them read and half written, and what its time is to be multiplied by."""
    half = max(1, round(nbytes / 2))
    source = torch.ones(min(half, COPY), dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    return Contestant("copy", lambda: target.copy_(source)), half / source.numel()


def measure(entry: Entry, mode: str, functions: dict[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...], gradient: Tensor,
            args: argparse.Namespace, device: cuda.Device) -> Row:
    """A peer that fails, for want of memory or otherwise, is named and left out; what stops ours or the copy is raised."""
    copy, factor = copying(entry.nbytes(mode), device)
    running, missing = [copy], {}
    for name, function in functions.items():
        try:
            made = contestant(name, function, inputs, gradient, mode)
            made.run()  # compiles
            device.synchronize()
            running.append(made)
        except Exception as error:
            if name == "ours":
                raise
            missing[name] = reason(error)
        if name in missing:  # by now nothing holds what the failed step had
            device.release()
    clock = device.clock()
    timings = harness.interleave(running, seconds=args.seconds, min_rounds=args.rounds, clock=clock)
    return entry.row(mode, timings={**timings, "copy": timings["copy"].times(factor)}, missing=missing,
                     late=[made.name for made in running if made.step in clock.late])


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def measure_all(entry: Entry, args: argparse.Namespace, device: cuda.Device, announce: Callable[[str], None]) -> list[Row]:
    """The rows of an entry: checked, then timed in each mode. They say why where that is not possible."""
    case, rows = entry.case, []
    try:
        announce(f"{entry.name}: checking")
        torch.manual_seed(0)
        inputs = with_gradients(case.inputs(case.shape, DTYPES[entry.dtype], device.name), "both")
        gradient = incoming_gradient(case, inputs)
        wrong = mismatch(case, case.ours, inputs, gradient, rows=max(1, PIECE * case.shape[0] // math.prod(case.shape)))
        if wrong:
            return [entry.row(mode, failure=wrong) for mode in args.modes]
        functions = {"ours": case.ours, "eager": case.eager} if "eager" in entry.peers else {"ours": case.ours}
        if "compile" in entry.peers:
            functions |= {name: torch.compile(function, fullgraph=True, dynamic=False)
                          for name, function in {"compile": case.eager, **case.variants}.items()}
        for mode in args.modes:
            announce(f"{entry.name}: timing {mode}")
            rows.append(measure(entry, mode, functions, inputs, gradient, args, device))
    except torch.OutOfMemoryError as error:
        rows += [entry.row(mode, skipped=reason(error)) for mode in args.modes[len(rows):]]
    except RuntimeError as error:
        rows += [entry.row(mode, failure=reason(error)) for mode in args.modes[len(rows):]]
    return rows


def run(args: argparse.Namespace, device: cuda.Device, so_far: Callable[[Results], None] = lambda _: None) -> Results:
    """Every row, where the time was too short for it by name alone. `so_far` gets the results after each entry."""
    todo = list(entries(args))
    found = Results(device.environment(), [])
    end, ended = time.monotonic() + 60 * args.minutes, ""
    with (report.progress_bar(len(todo) * (1 + len(args.modes))) as announce, mk.use(args.implementation),
          harness.no_collection()):
        for entry in todo:
            ended = ended or ("time was up" if time.monotonic() > end else "")
            try:
                rows = [] if ended else measure_all(entry, args, device, announce)
            except KeyboardInterrupt:
                rows, ended = [], "interrupted"
            found.rows.extend(rows or [entry.row(mode, skipped=ended) for mode in args.modes])
            so_far(found)
            if "compile" in entry.peers:
                torch.compiler.reset()
            gc.collect(1)  # what this entry made: everything, as at the start, would take longer than the entry
            device.release()
    return found


def add_arguments(group) -> None:
    group.add_argument("--shapes", nargs="+", choices=["gpt2", "columns"], default=["gpt2", "columns"], help="default both")
    quick = " ".join(map(str, QUICK_COLUMNS))
    group.add_argument("--columns", nargs="+", type=int, metavar="N",
                       help=f"of matrices of {ROWS} rows, fewer where that were more than {ELEMENTS} elements; default the powers "
                            f"of two from {COLUMNS[0]} to {COLUMNS[-1]}, with --quick {quick}")
    group.add_argument("--minutes", type=float, help="what has not begun by then is skipped, by name; default 9, with --quick 1.5")


def defaults(quick: bool) -> dict[str, object]:
    return {"dtypes": ["bf16"] if quick else ["bf16", "fp32", "fp16"], "modes": ["forward", "backward", "both"],
            "columns": QUICK_COLUMNS if quick else COLUMNS, "seconds": 0.1 if quick else 0.2, "minutes": 1.5 if quick else 9.0}


def save(file: str, found: Results) -> None:
    """In one stroke: whenever a run is ended from outside, the file is whole."""
    partial = Path(f"{file}.partial")
    partial.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    os.replace(partial, file)


def main(args: argparse.Namespace, device: cuda.Device | None = None) -> int:
    """Measures on `device`, the current CUDA device if None, shows and writes the results. 1 where an op is wrong."""
    why = ("" if device else cuda.why_not()) or harness.why_unavailable(args.implementation)
    if why:
        print(f"--device cuda: {why}", file=sys.stderr)
        return 1
    for file in filter(None, (args.csv, args.json)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    found = run(args, device or cuda.device(), lambda so_far: save(args.json, so_far) if args.json else None)
    gpu_report.show(found)
    if args.csv:
        gpu_report.write_csv(Path(args.csv), found)
    if any(row.failure for row in found.rows):
        return 1
    if args.readme:
        gpu_report.write_readme(harness.ROOT / "README.md", found)
    return 0
