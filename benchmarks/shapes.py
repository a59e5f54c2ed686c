"""The rows of a run: which ops at which shapes and dtypes, beside whom, and what is expected of them.

Four sets: one shape for each op ("main"), the sizes of GPT-2 from 124M to 8.3B parameters ("gpt2"), matrices of 256 to 262144
columns as quack measures them ("columns"), and cross-entropy over vocabularies of 4096 to 262144 ("vocabulary").
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .cases import CASES, DTYPES, Case, without_mask
from .rows import Row

SETS = ("main", "gpt2", "columns", "vocabulary")
COLUMNS = tuple(2**n for n in range(8, 19))
VOCABULARY = tuple(2**n for n in range(12, 19))
# Parameters: hidden size, heads, vocabulary. Radford et al. (2019) for the first three, Shoeybi et al. (2019) for 8.3B.
GPT2 = {"124M": (768, 12, 50304), "355M": (1024, 16, 50304), "1.5B": (1600, 25, 50304), "8.3B": (3072, 32, 51200)}
LENGTH = 1024
ON_CHIP = 2**17  # bytes of a row: a longer one does not stay on a multiprocessor, and softmax and layer norm read it once more


@dataclass(frozen=True)
class Sizes:
    """What a kind of device gets: so large that the caches don't matter, so small that a run takes minutes."""

    batch: int  # sequences of a model
    rows: int  # of a matrix, at most
    elements: int  # of a tensor by columns, at most
    tokens: int  # of a cross-entropy over a vocabulary
    columns: Sequence[int] = COLUMNS
    vocabulary: Sequence[int] = VOCABULARY


CPU = Sizes(batch=1, rows=2**14, elements=2**22, tokens=128, columns=COLUMNS[::2], vocabulary=VOCABULARY[::2])
CUDA = Sizes(batch=8, rows=2**15, elements=2**30, tokens=8192)
QUICK_CUDA = replace(CUDA, columns=(1024, 4096, 65536), vocabulary=(131072,))

# The share of a copy's rate that is expected. On a CPU at the main shapes with reused memory; 16 bits have half the bytes for the
# same arithmetic. On a GPU from 4096 columns on.
CPU_SHARES = {("fp32", "forward"): 0.67, ("fp32", "both"): 0.56, ("bf16", "forward"): 0.45, ("bf16", "both"): 0.40}
CUDA_SHARES = {"forward": 0.90, "backward": 0.85}
# How many times faster than the better of eager and compile a main row of a CPU should be; 1 elsewhere.
LEADS = {("scaled_masked_softmax", dtype, mode): 3.0 for dtype in ("fp32", "bf16") for mode in ("forward", "both")} | {
    ("bias_gelu", "fp32", "forward"): 2.0, ("bias_gelu", "fp32", "both"): 2.0,
    ("bias_gelu", "bf16", "forward"): 3.0, ("bias_gelu", "bf16", "both"): 3.0,
    ("cross_entropy", "fp32", "both"): 1.3, ("cross_entropy", "bf16", "both"): 2.0}


@dataclass(frozen=True)
class Entry:
    """A case at its shape in one dtype, and the peers that it is measured beside."""

    group: str  # one of SETS
    case: Case
    dtype: str
    peers: tuple[str, ...]
    kind: str  # "cpu" or "cuda"
    allocator: str = ""  # of a CPU: "reusing" or "default"

    @property
    def name(self) -> str:
        return f"{self.case.title} {'x'.join(map(str, self.case.shape))} {self.dtype}"

    def nbytes(self, mode: str) -> float:
        """What has to be moved. On a GPU a row that is too long for the chip is read once more, or x and dy of it backward."""
        dtype = DTYPES[self.dtype]
        again = {"forward": 1, "backward": 2, "both": 3}[mode] if self._rereads else 0
        return self.case.nbytes(dtype, mode) + again * math.prod(self.case.shape) * dtype.itemsize

    @property
    def _rereads(self) -> bool:
        return self.kind == "cuda" and self.case.op in ("scaled_masked_softmax", "layer_norm") and \
            self.case.shape[-1] * DTYPES[self.dtype].itemsize > ON_CHIP

    def share(self, mode: str) -> float | None:
        """Of the copy's rate, where a share is expected."""
        if self.kind == "cpu":
            return CPU_SHARES.get((self.dtype, mode)) if self.group == "main" and self.allocator == "reusing" else None
        outside = self.group != "columns" or self.case.shape[-1] < 4096 or self._rereads
        return None if outside else CUDA_SHARES.get(mode)

    def lead(self, mode: str) -> float | None:
        """Over the better of eager and compile, where one is expected."""
        here = self.kind == "cpu" and self.share(mode) is not None
        return LEADS.get((self.case.op, self.dtype, mode), 1.0) if here else None

    def row(self, mode: str, **fields) -> Row:
        return Row(self.case.op, self.case.title, self.group, list(self.case.shape), self.dtype, mode, self.nbytes(mode),
                   self.allocator, self.share(mode), self.lead(mode), **fields)


def of_model(case: Case, name: str, batch: int) -> tuple[int, ...]:
    """The shape of an op in that GPT-2 at its full length; cross-entropy of a CPU's single sequence takes half of it."""
    hidden, heads, vocabulary = GPT2[name]
    tokens = batch * LENGTH
    return {"scaled_masked_softmax": (batch, heads, LENGTH, LENGTH), "bias_gelu": (tokens, 4 * hidden),
            "layer_norm": (tokens, hidden), "cross_entropy": (tokens if batch > 1 else LENGTH // 2, vocabulary)}[case.op]


def sizes(kind: str, quick: bool) -> Sizes:
    return CPU if kind == "cpu" else QUICK_CUDA if quick else CUDA


def entries(args: argparse.Namespace) -> Iterator[Entry]:
    """Dtype after dtype, the main shapes first, so that a run that ends early has the rows that matter most."""
    cases, size = [case for case in CASES if case.op in args.ops], sizes(args.device, args.quick)
    for dtype in args.dtypes:
        for group in args.shapes:
            for case in shaped(group, cases, size, args):
                yield Entry(group, case, dtype, _peers(group, case, dtype, args), args.device, args.allocator)


def shaped(group: str, cases: list[Case], size: Sizes, args: argparse.Namespace) -> Iterator[Case]:
    def main(case: Case) -> tuple[int, ...]:
        return case.shape if args.device == "cpu" else of_model(case, "355M", size.batch)

    if group == "columns":
        for columns in args.columns:
            shape = min(size.rows, max(1, size.elements // columns)), columns
            yield from (replace(without_mask(case), shape=shape) for case in cases)
    elif group == "vocabulary":
        yield from (replace(case, shape=(size.tokens, n)) for n in args.vocabulary for case in cases if case.op == "cross_entropy")
    else:
        for case in cases:
            models = [of_model(case, name, size.batch) for name in GPT2]
            shapes = [main(case)] if group == "main" else [s for s in dict.fromkeys(models) if s != main(case)]
            yield from (replace(case, shape=shape) for shape in shapes)


def _peers(group: str, case: Case, dtype: str, args: argparse.Namespace) -> tuple[str, ...]:
    """Those asked for. By default all but torch.compile, which takes seconds for each shape, where it has no room."""
    room = group == "main" and dtype in ({"cpu": ("fp32",), "cuda": ("bf16",)}[args.device] if args.quick else ("fp32", "bf16"))
    if args.device == "cuda" and not args.quick and dtype == "bf16":
        room = group != "columns" or case.shape[-1] in COLUMNS[::2]
    return tuple(name for name in args.peers if name != "compile" or room or args.peers_given)
