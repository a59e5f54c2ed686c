"""What is measured: each op with a shape, the same computation as a PyTorch user writes it, and the check that both are right.

CASES are the rows; shapes.py makes those of other shapes from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_kernels as mk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "backward", "both")
PART = 2**21  # elements in which a peer is compared
# Times the tolerance that a peer may be off, and the relative error of a whole tensor that it may have in eps of its dtype: peers
# round intermediate results to 16 bits, and sum in the order that suits them.
PEER_SLACK, PEER_NORM = 16.0, 4.0


@dataclass(frozen=True)
class Case:
    """One op at one shape: what is computed, by whom, and the bytes it moves.

    Every function takes the tensors that `inputs(shape, dtype)` makes, and returns one tensor. Gradients are asked for every
    floating input. forward and both count the reads and writes of the one large tensor.
    """

    op: str
    title: str
    shape: tuple[int, ...]
    piece: tuple[int, ...]  # the same rows, but so few that everything stays in cache
    inputs: Callable[[tuple[int, ...], torch.dtype, str], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    forward: float
    both: float
    variants: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)  # other ways to write it, for torch.compile
    rounds_output: bool = False  # the backward starts from the output as it was rounded
    small_beside_large: bool = False  # elements far below the largest of their tensor matter
    rowwise: int = 1  # so many inputs, from the first on, have a part for each row; the others are common to all rows

    def nbytes(self, dtype: torch.dtype, mode: str) -> float:
        times = {"forward": self.forward, "backward": self.both - self.forward, "both": self.both}
        return math.prod(self.shape) * dtype.itemsize * times[mode]


def normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, device=device).to(dtype)


def _eager_causal_softmax(x: Tensor, future: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(future, float("-inf")), -1)


def _traced_causal_softmax(x: Tensor, future: Tensor) -> Tensor:
    """For the compiler a comparison of indices is faster than a mask that it must read, as models hold one."""
    query, key = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    return torch.softmax(x.masked_fill(key > query[:, None], float("-inf")), -1)


def _softmax_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return normal(*shape, dtype=dtype, device=device), torch.ones(*shape[-2:], dtype=torch.bool, device=device).triu(1)


def _bias_gelu_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return normal(*shape, dtype=dtype, device=device), normal(shape[-1], dtype=dtype, device=device)


def _layer_norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    weight, bias = (normal(shape[-1], dtype=dtype, device=device) for _ in range(2))
    return normal(*shape, dtype=dtype, device=device), 1 + 0.1 * weight, bias


def _cross_entropy_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return normal(*shape, dtype=dtype, device=device), torch.randint(shape[-1], shape[:-1], device=device)


# Cross-entropy gives a loss for each token, so that the small kernels of a mean are not in its time.
CASES = (
    Case("scaled_masked_softmax", "causal softmax", (2, 16, 1024, 1024), (1, 1, 1024, 1024), _softmax_inputs,
         ours=lambda x, future: mk.scaled_masked_softmax(x, causal=True),
         reference=lambda x, future: mk.reference.scaled_masked_softmax(x, causal=True),
         eager=_eager_causal_softmax, variants={"compile, mask from indices": _traced_causal_softmax},
         forward=1.5, both=3.5, rounds_output=True),
    Case("bias_gelu", "bias-GeLU", (2048, 4096), (256, 4096), _bias_gelu_inputs,
         ours=lambda x, bias: mk.bias_gelu(x, bias),
         reference=lambda x, bias: mk.reference.bias_gelu(x, bias),
         eager=lambda x, bias: F.gelu(x + bias, approximate="tanh"), forward=2, both=5),
    Case("layer_norm", "layer norm", (4096, 1024), (1024, 1024), _layer_norm_inputs,
         ours=lambda x, weight, bias: mk.layer_norm(x, weight, bias),
         reference=lambda x, weight, bias: mk.reference.layer_norm(x, weight, bias),
         eager=lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias), forward=2, both=5),
    Case("cross_entropy", "cross-entropy", (512, 50304), (16, 50304), _cross_entropy_inputs,
         ours=lambda logits, target: mk.cross_entropy(logits, target, reduction="none"),
         reference=lambda logits, target: mk.reference.cross_entropy(logits, target, reduction="none"),
         eager=lambda logits, target: F.cross_entropy(logits, target, reduction="none"), forward=1, both=3,
         small_beside_large=True, rowwise=2),
)


def without_mask(case: Case) -> Case:
    """For matrices, which have no diagonal: softmax without a mask."""
    if case.op != "scaled_masked_softmax":
        return case
    return replace(case, title="softmax", inputs=lambda shape, dtype, device: (normal(*shape, dtype=dtype, device=device),),
                   ours=lambda x: mk.scaled_masked_softmax(x), reference=lambda x: mk.reference.scaled_masked_softmax(x),
                   eager=lambda x: torch.softmax(x, -1), variants={}, forward=2, both=5)


@dataclass(frozen=True)
class Made:
    """A function with tensors of its own layout: as many as the case has, each with the same elements in the same order.

    It may return its output in another shape too, of the same elements in the same order.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def prepare(case: Case, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs of that shape that ask for gradients, and then the incoming gradient."""
    torch.manual_seed(0)
    inputs = with_gradients(case.inputs(shape, dtype, device))
    return inputs, incoming_gradient(case, inputs)


def with_gradients(inputs: Iterable[Tensor], wanted: bool = True) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_(wanted and x.is_floating_point()) for x in inputs)


def incoming_gradient(case: Case, inputs: tuple[Tensor, ...]) -> Tensor:
    """Normal, of the shape and dtype that eager's output has, which is asked for one row."""
    with torch.no_grad():
        output = case.eager(*(x.detach()[:1] if i < case.rowwise else x.detach() for i, x in enumerate(inputs)))
    shape = inputs[0].shape[:1] + output.shape[1:]
    return normal(*shape, dtype=output.dtype, device=output.device.type)


def results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    """function(*inputs), followed by the gradients of its inputs that want one; the incoming one is laid out like the output."""
    output = function(*inputs)
    incoming = gradient.to(output.dtype).reshape(output.shape)
    return output, *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], incoming)


def mismatch(case: Case, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor,
             slack: float = 1.0, rows: int | None = None) -> str:
    """How function departs from the float64 reference on these inputs; empty when every element is within the tolerance.

    An element may be off by slack times 2 eps(its dtype) of its size (one rounding) plus 32 eps(float32) of the largest element
    of its tensor (the arithmetic, which happens in float32). Where a backward starts from rounded probabilities p, a gradient's
    size is p max|incoming gradient|, of which the true value is a small difference. Numbers below the dtype's smallest normal one
    round as that does.

    `rows`: how many of the first dimension's (of the first two of four) the reference computes at a time, where all of them in
    float64 need too much memory.
    """
    return Truth(case, inputs, gradient, rows).mismatch(function, slack)


class Truth:
    """What the float64 reference gives for these inputs: piece by piece for ours, the first rows and the sums for the peers.

    A peer is right when it is within PEER_SLACK times the tolerance, which then is taken of the largest element of a tensor
    unless small ones matter, and PEER_NORM eps(its dtype) plus 32 eps(float32) of the norm of each tensor.
    """

    def __init__(self, case: Case, inputs: tuple[Tensor, ...], gradient: Tensor, rows: int | None = None):
        self.case, self.inputs, self.gradient = case, inputs, self._flat(gradient)
        everything = len(self._flat(inputs[0]))
        self.pieces = [slice(first, first + rows) for first in range(0, everything, rows)] if rows and rows < everything else \
            [slice(0, everything)]
        self.numbers = [i for i, x in enumerate(inputs) if x.requires_grad]
        self.first: tuple[Tensor, dict[int, Tensor]] | None = None
        self.sums: dict[int, Tensor] = {}

    def _exact(self) -> Iterator[tuple[slice, Tensor, dict[int, Tensor]]]:
        """Each piece with its output and the gradients of its rows. After the last one the gradients common to all are there."""
        sums: dict[int, Tensor] = {}
        for piece in self.pieces:
            exact_inputs = tuple(_exact(self._flat(x)[piece] if i < self.case.rowwise else x, x.requires_grad)
                                 for i, x in enumerate(self.inputs))
            output, *gradients = (x.detach() for x in results(self.case.reference, exact_inputs, self.gradient[piece].double()))
            by_row: dict[int, Tensor] = {}
            for i, want in zip(self.numbers, gradients, strict=True):
                if i < self.case.rowwise:
                    by_row[i] = want
                else:
                    sums[i] = sums[i] + want if i in sums else want
            if self.first is None:
                self.first = self._head(output).clone(), {i: self._head(want).clone() for i, want in by_row.items()}
            yield piece, output, by_row
        self.sums = sums

    def mismatch(self, function: Callable[..., Tensor], slack: float = 1.0) -> str:
        """See the function of that name."""
        output, *gradients = results(function, self.inputs, self.gradient)
        output, got = self._flat(output), {i: self._flat(x) for i, x in zip(self.numbers, gradients, strict=True)}
        found = ""
        for piece, exact, by_row in self._exact():  # to the end: the peers need the sums
            found = found or self._piece_mismatch(piece, exact, by_row, output, got, slack, peer=False)
        return found or self._sums_mismatch(got, slack, peer=False)

    def peer_mismatch(self, made: Made) -> str:
        """How a peer departs, in the first rows and in the gradients that are common to all rows."""
        if self.first is None or not self.sums.keys() >= {i for i in self.numbers if i >= self.case.rowwise}:
            for _ in self._exact():
                pass
        assert self.first is not None
        output, *gradients = results(made.function, made.inputs, self.gradient)
        output = self._head(output.reshape(self.gradient.shape))
        got = {i: x.reshape(self.inputs[i].shape) for i, x in zip(self.numbers, gradients, strict=True)}
        got |= {i: self._head(x) for i, x in got.items() if i < self.case.rowwise}
        exact, by_row = self.first
        return self._piece_mismatch(slice(0, len(exact)), exact, by_row, output, got, PEER_SLACK, peer=True) or \
            self._sums_mismatch(got, PEER_SLACK, peer=True)

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        """[batch, heads, ...] with one dimension for both."""
        return x.flatten(0, 1) if x.dim() == 4 else x

    def _head(self, x: Tensor) -> Tensor:
        """The first rows of a tensor that has a number or a row for each."""
        rows = max(1, PART // self.inputs[0].shape[-1])
        return (x if x.dim() == 1 else x.reshape(-1, x.shape[-1]))[:rows]

    def _piece_mismatch(self, piece: slice, exact: Tensor, by_row: dict[int, Tensor], output: Tensor, got: dict[int, Tensor],
                        slack: float, peer: bool) -> str:
        if wrong := self._beyond("output", output[piece], exact, exact.abs(), slack, peer, piece.start):
            return wrong
        for i, want in by_row.items():
            mine = got[i][piece]
            size = want.abs()
            if self.case.rounds_output:
                size = exact.clamp(min=torch.finfo(mine.dtype).tiny) * self.gradient.abs().max().double()
            if wrong := self._beyond(f"gradient of input {i}", mine, want, size, slack, peer, piece.start):
                return wrong
        return ""

    def _sums_mismatch(self, got: dict[int, Tensor], slack: float, peer: bool) -> str:
        found = (self._beyond(f"gradient of input {i}", got[i], want, want.abs(), slack, peer) for i, want in self.sums.items())
        return next(filter(None, found), "")

    def _beyond(self, name: str, got: Tensor, want: Tensor, size: Tensor, slack: float, peer: bool, begin: int = 0) -> str:
        """Names the worst element beyond the tolerance of `mismatch`, if there is one; `begin` is the number of the first row."""
        got, kind, single = got.detach(), torch.finfo(got.dtype), torch.finfo(torch.float32)
        largest = size if self.case.small_beside_large else want.abs().max()
        if peer and not (self.case.small_beside_large or self.case.rounds_output):
            size = want.abs().max()
        allowed = slack * (2 * kind.eps * size.clamp(min=kind.tiny) + 32 * single.eps * largest)
        error = (got.double() - want).abs_()
        if not (error <= allowed).all():
            excess = (error / allowed).nan_to_num(nan=float("inf")).masked_fill(got == want, 0.0)
            if excess.max() > 1:
                at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
                place = [at[0] + begin, *at[1:]] if at else []
                return f"{name}{place} is {got[at].item():.6g}, the float64 reference {want[at].item():.6g}: " \
                       f"{excess.max().item():.3g} times the tolerance"
        if peer and (off := (error.norm() / want.norm()).item()) > PEER_NORM * kind.eps + 32 * single.eps:
            return f"{name} is off by {off:.2g} of its norm"
        return ""


def _exact(x: Tensor, wants_gradient: bool) -> Tensor:
    return x.detach().double().requires_grad_(wants_gradient) if x.is_floating_point() else x
