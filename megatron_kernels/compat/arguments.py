"""What callers of Megatron-LM and apex pass where our ops are stricter: scales, masks, autocast."""

from __future__ import annotations

import torch
from torch import Tensor


class UpstreamError(AssertionError, RuntimeError, ValueError):
    """A refusal that Megatron-LM words as an assertion and apex as a RuntimeError: whoever catches either catches this."""


def as_scale(scale: float | Tensor | None) -> float:
    """A scale given as a number, a tensor of one element (upstream passes `torch.tensor([scale])[0]`) or None, which is 1."""
    return 1.0 if scale is None else float(scale)


def as_mask(who: str, mask: Tensor | None) -> Tensor | None:
    """A bool mask, True = masked out; bytes mask where they are 1, as upstream's kernels read them."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    if mask.dtype == torch.uint8:
        return mask == 1
    raise TypeError(f"{who}: mask must be bool or uint8 (1 = masked out), got {mask.dtype}")


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the tensors in its dtype: apex's layers cast before they call a kernel. float64 stays, as there."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype) for t in tensors)
