"""The softmax classes of Megatron-LM and apex, on `megatron_kernels.scaled_masked_softmax`."""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from .arguments import UpstreamError, as_mask, as_scale
from .softmax_extensions import get_batch_per_block


class AttnMaskType(enum.Enum):
    """Megatron-core's enumeration, for callers that have neither Megatron-LM nor apex."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5


class ScaledUpperTriangMaskedSoftmax:
    """apply(inputs [attn_batches, sq, sk], scale): softmax(scale * inputs), keys after the query masked."""

    @staticmethod
    def apply(inputs: Tensor, scale: float | Tensor) -> Tensor:
        return ops.scaled_masked_softmax(inputs, None, as_scale(scale), causal=True)


class ScaledMaskedSoftmax:
    """apply(inputs [b, np, sq, sk], mask, scale): softmax(scale * inputs) where mask, bool or uint8, is not set.

    Fully masked rows give zeros. mask None masks nothing.
    """

    @staticmethod
    def apply(inputs: Tensor, mask: Tensor | None, scale: float | Tensor) -> Tensor:
        return ops.scaled_masked_softmax(inputs, as_mask("ScaledMaskedSoftmax", mask), as_scale(scale))


class GenericScaledMaskedSoftmax(ScaledMaskedSoftmax):
    """As ScaledMaskedSoftmax: apex's kernel for lengths that its other one refuses. There is one kernel here."""


class ScaledSoftmax:
    """apply(inputs [..., sq, sk], scale): softmax(scale * inputs)."""

    @staticmethod
    def apply(inputs: Tensor, scale: float | Tensor) -> Tensor:
        return ops.scaled_masked_softmax(inputs, None, as_scale(scale))


class FusedScaleMaskSoftmax(nn.Module):
    """softmax(scale * input) among unmasked keys, over the last dimension of [b, np, sq, sk].

    Args:
        input_in_fp16, input_in_bf16: at most one; with softmax_in_fp32 the unfused path gives its result in that dtype.
        attn_mask_type: any enumeration with Megatron's names; `causal` masks k > q + (sk - sq), together with the mask.
        scaled_masked_softmax_fusion: use the op: for every dtype, length and batch. False: mask_func and torch.softmax.
        mask_func: mask_func(scores, mask) -> scores; called in the unfused path only.
        softmax_in_fp32: of the unfused path; the op computes in float32 always.
        scale: a number or None.
        window_size: (left, right) keys around the query's own that are visible; replaces causality, as in Megatron-core.

    A mask that is neither bool nor uint8, or a softmax_offset ([np], a logit that takes part in the denominator alone), takes the
    unfused path. Raises UpstreamError for both input flags, for a scale without softmax_in_fp32, for input not of 4 dimensions.
    """

    def __init__(self, input_in_fp16: bool, input_in_bf16: bool, attn_mask_type: enum.Enum, scaled_masked_softmax_fusion: bool,
                 mask_func: Callable[[Tensor, Tensor], Tensor], softmax_in_fp32: bool, scale: float | None,
                 window_size: tuple[int, int] | None = None):
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise UpstreamError("FusedScaleMaskSoftmax: both input_in_fp16 and input_in_bf16 are True, expected at most one")
        if scale is not None and not softmax_in_fp32:
            raise UpstreamError(f"FusedScaleMaskSoftmax: softmax_in_fp32 must be True where scale is given, got scale {scale}")
        self.input_in_fp16, self.input_in_bf16 = input_in_fp16, input_in_bf16
        self.input_in_float16 = input_in_fp16 or input_in_bf16
        self.attn_mask_type = attn_mask_type
        self.scaled_masked_softmax_fusion = scaled_masked_softmax_fusion
        self.mask_func = mask_func
        self.softmax_in_fp32 = softmax_in_fp32
        self.scale = scale
        self.window_size = window_size

    @property
    def causal(self) -> bool:
        return getattr(self.attn_mask_type, "name", self.attn_mask_type) == "causal"

    def forward(self, input: Tensor, mask: Tensor | None, softmax_offset: Tensor | None = None) -> Tensor:
        if input.dim() != 4:
            raise UpstreamError(f"FusedScaleMaskSoftmax: input must be [b, np, sq, sk], got shape {tuple(input.shape)}")
        if softmax_offset is None and self.is_kernel_available(mask, *input.shape):
            return self.forward_fused_softmax(input, mask)
        return self.forward_torch_softmax(input, mask, softmax_offset)

    def is_kernel_available(self, mask: Tensor | None, b: int, np: int, sq: int, sk: int) -> bool:
        """Whether the op answers: where fusion is wanted and the mask is one it can read. No shape is refused."""
        return bool(self.scaled_masked_softmax_fusion) and (mask is None or mask.dtype in (torch.bool, torch.uint8))

    def forward_fused_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        mask = as_mask("FusedScaleMaskSoftmax", mask)
        if self.window_size is not None:
            window = self._window(input)
            mask = window if mask is None else mask | window
        return ops.scaled_masked_softmax(input, mask, as_scale(self.scale), causal=self.causal and self.window_size is None)

    def forward_torch_softmax(self, input: Tensor, mask: Tensor | None, softmax_offset: Tensor | None = None) -> Tensor:
        narrow = self.input_in_float16 and self.softmax_in_fp32
        scores = input.float() if narrow else input
        if self.scale is not None:
            scores = scores * self.scale
        sq, sk = input.shape[-2:]
        own = None
        if self.window_size is not None:
            own = self._window(input)
        elif self.causal and sq > 1:  # one query is the last: it sees every key
            own = torch.ones(sq, sk, dtype=torch.bool, device=input.device).triu(sk - sq + 1)
        if own is not None and (mask is None or mask.dtype == torch.bool):
            mask, own = own if mask is None else mask | own, None
        for m in (mask, own):
            if m is not None:  # masks in place, as a rule: never the caller's tensor
                scores = self.mask_func(scores.clone() if scores is input else scores, m)
        if softmax_offset is None:
            probs = torch.softmax(scores, -1)
        else:
            sink = softmax_offset.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            probs = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
        return probs.to(torch.float16 if self.input_in_fp16 else torch.bfloat16) if narrow else probs

    def _window(self, input: Tensor) -> Tensor:
        """True where the key is out of the query's window, [sq, sk]; the last query is at the last key."""
        assert self.window_size is not None
        sq, sk = input.shape[-2:]
        distance = torch.arange(sk, device=input.device) - torch.arange(sk - sq, sk, device=input.device).unsqueeze(-1)
        return (distance < -self.window_size[0]) | (distance > self.window_size[1])

    @staticmethod
    def get_batch_per_block(sq: int, sk: int, b: int, np: int) -> int:
        return get_batch_per_block(sq, sk, b, np)
