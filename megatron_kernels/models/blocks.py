"""Causal attention on the CPU by blocks of queries: no product is formed whose result the causal mask would throw away.

Queries i to j see keys 0 to j alone, and the softmax's causality is aligned at the bottom right, so each block is an ordinary
causal attention of a rectangle. With four blocks that is 5/8 of the products and of the probabilities' memory. The backward adds
each block's share to the gradients of keys and values in place, and makes the gradient of the fused projection in one copy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import backend

BLOCK = 128  # queries


def applies(qkv: Tensor) -> bool:
    """Whether qkv [b, s, heads, 3, head_dim] is long enough, and computed where this is the faster way."""
    return (qkv.is_cpu and qkv.shape[1] > BLOCK and not torch.compiler.is_compiling()
            and backend.choose("scaled_masked_softmax", qkv) != backend.REFERENCE)


def causal_attention(qkv: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """softmax(scale q k^T) v with causality: qkv [b, s, heads, 3, head_dim] -> [b, s, heads * head_dim].

    mask is bool [b or 1, 1, 1, s], True = masked out; dropout is the share of probabilities dropped, 0 for none.
    """
    return _CausalAttention.apply(qkv, mask, scale, dropout, backend.choose("scaled_masked_softmax", qkv))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, mask, scale, dropout, name):
        b, s, heads, _, d = qkv.shape
        q, k, v = rows = qkv.permute(3, 0, 2, 1, 4).reshape(3, b * heads, s, d)
        y, kept, dropped = torch.empty_like(q), [], []
        for i, j in _blocks(s):
            scores = torch.bmm(q[:, i:j], k[:, :j].mT).view(b, heads, j - i, j)
            probs = backend.namespace(name).scaled_masked_softmax_forward(
                scores, None if mask is None else mask[..., :j], scale, True)
            kept.append(probs)
            if dropout:
                dropped.append(F.dropout(torch.ones_like(probs), dropout))
                probs = probs * dropped[-1]
            torch.bmm(probs.view(b * heads, j - i, j), v[:, :j], out=y[:, i:j])
        ctx.save_for_backward(rows, *kept, *dropped)
        ctx.shape, ctx.scale, ctx.dropout, ctx.name = qkv.shape, scale, dropout, name
        return y.view(b, heads, s, d).transpose(1, 2).reshape(b, s, heads * d)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        b, s, heads, _, d = ctx.shape
        (q, k, v), *rest = ctx.saved_tensors
        dy = dy.reshape(b, s, heads, d).transpose(1, 2).reshape(b * heads, s, d)
        dq, dk, dv = drows = torch.empty(3, b * heads, s, d, dtype=dy.dtype)
        blocks = _blocks(s)
        for n in reversed(range(len(blocks))):  # the last block sees every key, so it writes and the others add
            i, j = blocks[n]
            probs, add = rest[n], int(n < len(blocks) - 1)
            dprobs = torch.bmm(dy[:, i:j], v[:, :j].mT).view(probs.shape)
            used = probs
            if ctx.dropout:
                used = probs * rest[len(blocks) + n]
                dprobs *= rest[len(blocks) + n]
            dv[:, :j].baddbmm_(used.view(b * heads, j - i, j).mT, dy[:, i:j], beta=add)
            dscores = backend.namespace(ctx.name).scaled_masked_softmax_backward(dprobs, probs, ctx.scale, True)
            dscores = dscores.view(b * heads, j - i, j)
            torch.bmm(dscores, k[:, :j], out=dq[:, i:j])
            dk[:, :j].baddbmm_(dscores.mT, q[:, i:j], beta=add)
        return drows.view(3, b, heads, s, d).permute(1, 3, 2, 0, 4).contiguous(), None, None, None, None


def _blocks(s: int) -> list[tuple[int, int]]:
    return [(i, min(i + BLOCK, s)) for i in range(0, s, BLOCK)]
