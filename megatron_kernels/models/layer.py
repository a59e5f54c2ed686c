"""The transformer layer of GPT-2 and of BERT, in both orderings of layer norm and residual, and a stack of them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .. import ops
from ..nn import LayerNorm
from ..parallel.group import ALONE, Group
from ..parallel.layers import ColumnParallelLinear, RowParallelLinear, column_linear
from ..parallel.random import SharedGenerator, dropout, replay
from .attention import SelfAttention
from .config import ModelConfig

if TYPE_CHECKING:
    from .generation import KVCache


class MLP(nn.Module):
    """linear_fc2(gelu(linear_fc1(x))); linear_fc1's bias is added inside the fused bias-GeLU."""

    def __init__(self, config: ModelConfig, group: Group = ALONE, device=None, dtype=None):
        super().__init__()
        h, f = config.hidden_size, config.ffn_hidden_size
        self.group = group
        self.linear_fc1 = ColumnParallelLinear(h, f, group=group, device=device, dtype=dtype)
        self.linear_fc2 = RowParallelLinear(f, h, group=group, device=device, dtype=dtype)
        self.approximate = config.gelu_approximate

    def forward(self, x: Tensor, sequence: bool = False) -> Tensor:
        bias = self.linear_fc1.bias
        assert bias is not None
        x = column_linear(x, self.linear_fc1.weight, None, self.group, sequence)
        return self.linear_fc2(ops.bias_gelu(x, bias, self.approximate), sequence)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout before each addition.

    Where the configuration says apply_residual_connection_post_layernorm, what is added to is norm(x) instead of x. That is the
    original BERT's norm(x + sublayer(x)) with each norm moved from the end of a sublayer to the start of the next: the first
    input_layernorm is BERT's norm of the embeddings, and the norm after the last layer that layer's own.
    """

    def __init__(self, config: ModelConfig, layer: int, group: Group = ALONE, shared: SharedGenerator | None = None, device=None,
                 dtype=None):
        super().__init__()
        norm = {"eps": config.layernorm_epsilon, "device": device, "dtype": dtype}
        self.input_layernorm = LayerNorm(config.hidden_size, **norm)
        self.self_attention = SelfAttention(config, layer, group, device, dtype)
        self.pre_mlp_layernorm = LayerNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, group, device, dtype)
        self.dropout, self.shared = config.hidden_dropout, shared
        self.post_norm = config.apply_residual_connection_post_layernorm

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, return_probs: bool = False,
                sequence: bool = False) -> tuple[Tensor, Tensor | None]:
        shared = None if sequence else self.shared
        normed = self.input_layernorm(x)
        y, probs = self.self_attention(normed, mask, cache, return_probs, sequence)
        x = (normed if self.post_norm else x) + dropout(y, self.dropout, self.training, shared)
        normed = self.pre_mlp_layernorm(x)
        y = dropout(self.mlp(normed, sequence), self.dropout, self.training, shared)
        return (normed if self.post_norm else x) + y, probs


class Stack(nn.Module):
    """The layers and the norm after them; of a pipeline, those of one stage, under their numbers in the whole."""

    def __init__(self, config: ModelConfig, group: Group = ALONE, shared: SharedGenerator | None = None,
                 layers: range | None = None, norm: bool = True, device=None, dtype=None):
        super().__init__()
        self.shared = shared
        self.layers = nn.ModuleList()
        for i in range(config.num_layers) if layers is None else layers:
            self.layers.add_module(str(i), Layer(config, i, group, shared, device, dtype))
        if norm:
            self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layernorm_epsilon, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, return_probs: bool = False,
                sequence: bool = False, *, again: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        """The layers, without the norm after them. again=True keeps only the input of each for the backward, which runs it once
        more; not with a cache."""
        probs = []
        for layer in self.layers:
            if again and cache is None and torch.is_grad_enabled():
                x, p = recompute(layer, x, mask, cache, return_probs, sequence, use_reentrant=False,
                                 context_fn=_nothing_more if self.shared is None else replay(self.shared))
            else:
                x, p = layer(x, mask, cache, return_probs, sequence)
            probs.append(p)
        return x, probs


def _nothing_more() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), contextlib.nullcontext()
