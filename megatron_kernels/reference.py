"""The specification: each op in plain PyTorch, on any device and in any floating dtype.

16-bit inputs are computed in float32 and rounded once at the end, float32 and float64 in their own precision. Every other
implementation is compared with these functions evaluated in float64; `megatron_kernels.use("reference")` runs them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def scaled_masked_softmax(x: Tensor, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False) -> Tensor:
    """softmax(scale * x) over the last dimension among unmasked positions; masked positions and fully masked rows are 0."""
    z = _wide(x) * scale
    if causal:
        sq, sk = x.shape[-2:]
        future = torch.ones(sq, sk, dtype=torch.bool, device=x.device).triu(sk - sq + 1)
        mask = future if mask is None else mask | future
    if mask is None:
        return torch.softmax(z, -1).to(x.dtype)
    return torch.softmax(z.masked_fill(mask, -math.inf), -1).masked_fill(mask, 0.0).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias); approximate is "tanh" or "none" (erf)."""
    return torch.nn.functional.gelu(_wide(x) + bias.to(_wide(x).dtype), approximate=approximate).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, var being the biased variance."""
    z = _wide(x)
    centred = z - z.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(z.dtype)
    if bias is not None:
        y = y + bias.to(z.dtype)
    return y.to(x.dtype)


def cross_entropy(logits: Tensor, target: Tensor, *, vocab_size: int | None = None, ignore_index: int = -100,
                  label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean") -> Tensor:
    """lse - (1-a) x_t - a/K sum(x) + z lse^2 over the first K = vocab_size columns, a being label_smoothing.

    Ignored rows give 0 loss and 0 gradient. The mean is over the rows that are not ignored, and 0 when there are none.
    """
    classes = logits.shape[-1] if vocab_size is None else vocab_size
    ignored = target == ignore_index
    bad = ~ignored & ((target < 0) | (target >= classes))
    if bad.any():
        raise RuntimeError(f"cross_entropy: target {target[bad][0].item()} is neither ignore_index ({ignore_index}) "
                           f"nor in [0, {classes})")
    x = _wide(logits)[..., :classes].masked_fill(ignored.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(x, -1)
    true_class = x.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * true_class + z_loss * lse.square()
    if label_smoothing:
        loss = loss - label_smoothing / classes * x.sum(-1)
    loss = loss.masked_fill(ignored, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum().clamp(min=1)
