"""The matrix products of the linear layers and of the output table: which library computes them, and in what pieces.

PyTorch sends float32 products on a CPU to MKL and 16-bit ones to oneDNN. oneDNN is the faster of the two for float32 as well: on an
AMD EPYC 9004 with two cores, at 1024 tokens, 217 against 186 billion operations a second forward and 214 against 197 for the
gradient of the input (the gradient of the weight: no difference). PyTorch has no public switch for that; the op that its compiler
uses is called here, and where it is missing everything goes the ordinary way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK = 4096  # rows of a table per product: a block of logits stays in cache
_FEW = 64  # below so many rows a call costs more than its product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., i] @ weight [o, i].T + bias [o] -> [..., o]."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [..., k] @ b [m, k].T + bias [m] -> [..., m], for use inside an autograd.Function."""
    if not _by_onednn(a, b):
        return F.linear(a, b, bias)
    return _product(a.reshape(-1, a.shape[-1]), b, bias).view(*a.shape[:-1], b.shape[0])


def project(hidden: Tensor, table: Tensor) -> Tensor:
    """Logits `hidden @ table.T`: hidden [n, h], table [V, h] -> [n, V].

    On a CPU the gradient of the table, and in 16 bits the logits, are computed block by block of the vocabulary. At 1024 x 1024 x
    50304 with two cores that took the gradient from 176 to 200 billion operations a second in float32, and the logits from 381 to
    400 in bfloat16.
    """
    return F.linear(hidden, table) if _ordinary(hidden) else _Projection.apply(hidden, table)


def _ordinary(x: Tensor) -> bool:
    """Whether PyTorch's own product is to be used: off the CPU, under autocast (which picks a dtype), and in compiled graphs."""
    return not x.is_cpu or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (not _ordinary(x) and x.dtype == torch.float32 and weight.dtype == torch.float32
            and x.numel() >= _FEW * x.shape[-1])


def _has_onednn() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [n, k] @ b [m, k].T + bias [m]."""
    if _ONEDNN and a.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _product(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = dy.t() @ x if ctx.needs_input_grad[1] else None
        return dx, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None


def logits_of(hidden: Tensor, table: Tensor) -> Tensor:
    """hidden [n, h] @ table [V, h].T -> [n, V], for use inside an autograd.Function."""
    if _ordinary(hidden) or (_ONEDNN and hidden.dtype == torch.float32):
        return product(hidden, table)
    logits = hidden.new_empty(hidden.shape[0], table.shape[0])
    for i in range(0, table.shape[0], _BLOCK):
        torch.mm(hidden, table[i:i + _BLOCK].t(), out=logits[:, i:i + _BLOCK])
    return logits


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total [n, m] += a [n, k] @ b [k, m], or = where it is the first.

    A total of another dtype (float32, of 16-bit factors) is added to block by block: the products are rounded, the sum is not.
    """
    if total.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
        return
    for i in range(0, total.shape[0], _BLOCK):
        block = a[i:i + _BLOCK] @ b
        if first:
            total[i:i + _BLOCK].copy_(block)
        else:
            total[i:i + _BLOCK].add_(block)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table):
        ctx.save_for_backward(hidden, table)
        return logits_of(hidden, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits):
        hidden, table = ctx.saved_tensors
        dlogits = dlogits.contiguous()
        dhidden = _product(dlogits, table.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dhidden, None
        dtable = torch.empty_like(table)
        for i in range(0, table.shape[0], _BLOCK):
            torch.mm(dlogits[:, i:i + _BLOCK].t(), hidden, out=dtable[i:i + _BLOCK])
        return dhidden, dtable
