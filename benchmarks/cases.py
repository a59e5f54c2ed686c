"""What is measured: each op with a shape, the same computation as a PyTorch user writes it, and the check that both are right.

CASES are the rows of a CPU; gpu.py makes those of a GPU from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_kernels as mk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
         ours=lambda logits, target: mk.cross_entropy(logits, target),
         reference=lambda logits, target: mk.reference.cross_entropy(logits, target),
         eager=lambda logits, target: F.cross_entropy(logits, target), forward=1, both=3, small_beside_large=True, rowwise=2),
)


def results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor | None) -> tuple[Tensor, ...]:
    """function(*inputs), followed by the gradients of its floating inputs when there is an incoming gradient."""
    if gradient is None:
        return (function(*inputs),)
    output = function(*inputs)
    return output, *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], gradient)


def with_gradients(inputs: tuple[Tensor, ...], mode: str) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_(mode == "both" and x.is_floating_point()) for x in inputs)


def incoming_gradient(case: Case, inputs: tuple[Tensor, ...], mode: str) -> Tensor | None:
    """Contiguous and of the output's dtype: normal for a tensor, one for a loss."""
    if mode == "forward":
        return None
    with torch.no_grad():
        output = case.eager(*inputs)
    return torch.randn_like(output) if output.dim() else torch.ones_like(output)


def mismatch(case: Case, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor | None,
             slack: float = 1.0, rows: int | None = None) -> str:
    """How function departs from the float64 reference on these inputs; empty when every element is within the tolerance.

    An element may be off by slack times 2 eps(its dtype) of its size (one rounding) plus 32 eps(float32) of the largest element
    of its tensor (the arithmetic, which happens in float32). Where a backward starts from rounded probabilities p, a gradient's
    size is p max|incoming gradient|, of which the true value is a small difference. Numbers below the dtype's smallest normal one
    round as that does.

    `rows`: how many of the first dimension's the reference computes at a time, where all of them in float64 need too much memory;
    the function must then give a result for each row, not one for all.
    """
    everything = inputs[0].shape[0]
    pieces = [slice(first, first + rows) for first in range(0, everything, rows)] if rows and rows < everything else [...]
    output, *gradients = results(function, inputs, gradient)
    numbers = [i for i, x in enumerate(inputs) if x.requires_grad]
    sums: dict[int, Tensor] = {}
    for piece in pieces:
        exact_inputs = tuple(_exact(x[piece] if i < case.rowwise else x, x.requires_grad) for i, x in enumerate(inputs))
        incoming = None if gradient is None else gradient[piece].double()
        exact, *exact_gradients = (x.detach() for x in results(case.reference, exact_inputs, incoming))
        begin = piece.start if isinstance(piece, slice) else 0
        if wrong := _beyond(case, "output", output[piece], exact, exact.abs(), slack, begin):
            return wrong
        for i, got, want in zip(numbers, gradients, exact_gradients, strict=True):
            if i >= case.rowwise:
                sums[i] = sums[i] + want if i in sums else want
                continue
            size = want.abs()
            if case.rounds_output:
                size = exact.clamp(min=torch.finfo(got.dtype).tiny) * incoming.abs().max()
            if wrong := _beyond(case, f"gradient of input {i}", got[piece], want, size, slack, begin):
                return wrong
    found = (_beyond(case, f"gradient of input {i}", got, sums[i], sums[i].abs(), slack)
             for i, got in zip(numbers, gradients, strict=True) if i in sums)
    return next(filter(None, found), "")


def _exact(x: Tensor, wants_gradient: bool) -> Tensor:
    return x.detach().double().requires_grad_(wants_gradient) if x.is_floating_point() else x


def _beyond(case: Case, name: str, got: Tensor, want: Tensor, size: Tensor, slack: float, begin: int = 0) -> str:
    """Names the worst element beyond the tolerance of `mismatch`, if there is one; `begin` is the number of the first row."""
    got, kind = got.detach(), torch.finfo(got.dtype)
    largest = size if case.small_beside_large else want.abs().max()
    allowed = slack * (2 * kind.eps * size.clamp(min=kind.tiny) + 32 * torch.finfo(torch.float32).eps * largest)
    excess = ((got.double() - want).abs() / allowed).nan_to_num(nan=float("inf")).masked_fill(got == want, 0.0)
    if excess.max() <= 1:
        return ""
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    place = [at[0] + begin, *at[1:]] if at else []
    return f"{name}{place} is {got[at].item():.6g}, the float64 reference {want[at].item():.6g}: " \
           f"{excess.max().item():.3g} times the tolerance"
