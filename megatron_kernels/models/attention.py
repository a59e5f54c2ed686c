"""Self-attention on [batch, seq, hidden], with our fused softmax or torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..parallel.group import ALONE, Group
from ..parallel.layers import ColumnParallelLinear, RowParallelLinear
from . import blocks
from .config import ModelConfig

if TYPE_CHECKING:
    from .generation import KVCache


class SelfAttention(nn.Module):
    """Rows of linear_qkv are laid out [heads, 3, head_dim], as in Megatron-LM since checkpoint version 2; a rank of a
    tensor-parallel group has its share of the heads. A GPT-2's is causal, a BERT's is not."""

    def __init__(self, config: ModelConfig, layer: int, group: Group = ALONE, device=None, dtype=None):
        super().__init__()
        h = config.hidden_size
        self.layer = layer  # its slot in a KV cache
        self.head_dim = h // config.num_attention_heads
        self.kind, self.causal = config.attention, config.causal
        self.dropout = config.attention_dropout
        self.linear_qkv = ColumnParallelLinear(h, 3 * h, group=group, device=device, dtype=dtype)
        self.linear_proj = RowParallelLinear(h, h, group=group, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None,
                return_probs: bool = False, sequence: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [b, s, h] -> [b, s, h], and the attention probabilities [b, heads, s, keys] before dropout when asked for.

        mask is what `attention_mask_for` made for this kind of attention. With a cache, x holds the tokens after those in it.
        sequence=True takes and gives this rank's share of the sequence.
        """
        qkv = self.linear_qkv(x, sequence)
        b, s, width = qkv.shape
        qkv = qkv.view(b, s, width // (3 * self.head_dim), 3, self.head_dim)
        dropout = self.dropout if self.training else 0.0
        if self.kind == "softmax" and self.causal and cache is None and not return_probs and blocks.applies(qkv):
            return self.linear_proj(blocks.causal_attention(qkv, mask, self.head_dim ** -0.5, dropout), sequence), None
        q, k, v = qkv.transpose(1, 2).unbind(3)  # [b, heads, s, head_dim] each
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        probs = None
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=self.causal and mask is None and s > 1)
        else:
            scores = q @ k.transpose(-1, -2)
            probs = ops.scaled_masked_softmax(scores, mask, self.head_dim ** -0.5, self.causal)
            y = F.dropout(probs, dropout) @ v if dropout else probs @ v
        y = self.linear_proj(y.transpose(1, 2).flatten(2), sequence)
        return y, probs if return_probs else None


def attention_mask_for(kind: str, keep: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """The mask that attention of this kind takes, from keep [b, keys] (nonzero = a real token) or None.

    "softmax": True = masked out, [b, 1, 1, keys]; causality is the softmax's own affair. "sdpa": True = attend,
    [b or 1, 1, queries, keys] with causality in it, aligned at the bottom right (sdpa's is_causal aligns at the top left), and
    None where is_causal says the same. There a query that may see no key sees its own, so that its output is finite.
    """
    if kind == "softmax":
        return None if keep is None else (keep == 0)[:, None, None, :]
    if keep is None and (queries == keys or queries == 1):
        return None
    own = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    allowed = (key <= own)[None, None]
    return allowed if keep is None else (allowed & (keep != 0)[:, None, None, :]) | (key == own)


def padding_mask_for(kind: str, keep: Tensor | None) -> Tensor | None:
    """The mask of attention that is not causal, [b, 1, 1, keys], from keep [b, keys] (nonzero = a real token) or None.

    "softmax": True = masked out; where a row is all padding the softmax gives zeros. "sdpa": True = attend; there a row that is
    all padding sees all of it, so that its output is finite too.
    """
    if keep is None:
        return None
    if kind == "softmax":
        return (keep == 0)[:, None, None, :]
    real = keep != 0
    return (real | ~real.any(1, keepdim=True))[:, None, None, :]
