"""The norm modules of apex and of Megatron-LM, under their names and signatures.

`memory_efficient=True` keeps the output for the backward instead of the input. That backward, and RMS norm, are plain PyTorch.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from . import norm_extensions as extensions
from .arguments import UpstreamError, cast_for_autocast


class _FromOutput(torch.autograd.Function):
    """A norm that saves its output and no input; RMS norm where there is no bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape, eps, rms, dtype):
        if rms:
            y, rstd = extensions.rms_norm_rows("FusedRMSNorm", x, shape, weight, eps, dtype)
        else:
            y, _, rstd = extensions.layer_norm_rows("FusedLayerNorm", x, shape, weight, bias, eps, dtype)
        ctx.save_for_backward(y, weight, bias, rstd)
        ctx.rest = shape, eps, rms, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, weight, bias, rstd = ctx.saved_tensors
        shape, eps, rms, dtype = ctx.rest
        if rms:
            grads = extensions.rms_norm_gradients("FusedRMSNorm", dy, rstd, y, shape, weight, eps, True)
        else:
            grads = extensions.layer_norm_gradients("FusedLayerNorm", dy, None, rstd, y, shape, weight, bias, eps, True)
        dweight = grads[1] if len(grads) > 1 else None
        return grads[0].to(dtype), dweight, grads[2] if len(grads) > 2 else None, None, None, None, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: Sequence[int], eps: float,
               memory_efficient: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Layer norm over the trailing dimensions normalized_shape, in `dtype`: x's where None."""
    dtype = x.dtype if dtype is None else dtype
    if memory_efficient and torch.is_grad_enabled():
        return _FromOutput.apply(x, weight, bias, tuple(normalized_shape), eps, False, dtype)
    rows = extensions.as_rows("FusedLayerNorm", x, normalized_shape, weight, bias)
    if dtype != x.dtype:
        rows = rows.to(extensions.wide_dtype(x, weight))
    return ops.layer_norm(rows, extensions.beside(rows, weight), extensions.beside(rows, bias), eps).reshape(x.shape).to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, normalized_shape: Sequence[int], eps: float,
             memory_efficient: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the trailing dimensions normalized_shape, in x's dtype. Plain PyTorch."""
    if memory_efficient and torch.is_grad_enabled():
        return _FromOutput.apply(x, weight, None, tuple(normalized_shape), eps, True, x.dtype)
    extensions.as_rows("FusedRMSNorm", x, normalized_shape, weight)
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    y = z * torch.rsqrt(z.square().mean(tuple(range(-len(normalized_shape), 0)), keepdim=True) + eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


class _Norm(nn.Module):
    """Parameters of shape normalized_shape, weight 1 and bias 0."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, normalized_shape: int | Sequence[int], eps: float, elementwise_affine: bool, memory_efficient: bool,
                 has_bias: bool):
        super().__init__()
        shape = (int(normalized_shape),) if isinstance(normalized_shape, numbers.Integral) else tuple(normalized_shape)  # type: ignore[call-overload, arg-type]
        self.normalized_shape = torch.Size(shape)
        self.eps, self.elementwise_affine, self.memory_efficient = eps, elementwise_affine, memory_efficient
        self.register_parameter("weight", nn.Parameter(torch.empty(shape)) if elementwise_affine else None)
        if has_bias:
            self.register_parameter("bias", nn.Parameter(torch.empty(shape)) if elementwise_affine else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.ones_(self.weight)  # type: ignore[arg-type]
            if getattr(self, "bias", None) is not None:
                nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{tuple(self.normalized_shape)}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class FusedLayerNorm(_Norm):
    """apex.normalization.FusedLayerNorm: layer norm over the dimensions normalized_shape, in the input's dtype.

    Under autocast input and parameters are cast to its dtype first, as in apex. forward raises UpstreamError (an AssertionError,
    RuntimeError and ValueError) where the input does not end in normalized_shape.
    """

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
                 memory_efficient: bool = False):
        super().__init__(normalized_shape, eps, elementwise_affine, memory_efficient, True)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            (input,) = cast_for_autocast(input)
        else:
            input, weight, bias = cast_for_autocast(input, weight, bias)
        return layer_norm(input, weight, bias, self.normalized_shape, self.eps, self.memory_efficient)


class MixedFusedLayerNorm(FusedLayerNorm):
    """Layer norm whose result has the parameters' dtype; the signatures of apex and of Megatron-LM in one.

    apex's `memory_efficient` is given by keyword, Megatron-LM's `no_persist_layer_norm` (which kernel: there is one here),
    `sequence_parallel` (an attribute set on the parameters) and `apply_layernorm_1p` (the weight is stored minus 1) by position.
    """

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5, no_persist_layer_norm: bool = True,
                 sequence_parallel: bool = False, apply_layernorm_1p: bool = False, *, memory_efficient: bool = False, **kwargs):
        if kwargs.keys() - {"elementwise_affine"}:
            raise TypeError(f"MixedFusedLayerNorm: unknown arguments {sorted(kwargs)}")
        if kwargs:
            if not kwargs["elementwise_affine"]:
                raise UpstreamError("MixedFusedLayerNorm: elementwise_affine must be True, got False")
            warnings.warn("MixedFusedLayerNorm always has weight and bias; elementwise_affine=True changes nothing", stacklevel=2)
        self.sequence_parallel, self.apply_layernorm_1p = sequence_parallel, apply_layernorm_1p
        super().__init__(normalized_shape, eps, True, memory_efficient)
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.apply_layernorm_1p:
            nn.init.zeros_(self.weight)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None
        weight = self.weight + 1 if self.apply_layernorm_1p else self.weight
        input, weight, bias = cast_for_autocast(input, weight, self.bias)
        return layer_norm(input, weight, bias, self.normalized_shape, self.eps, self.memory_efficient, weight.dtype)


class FastLayerNorm(nn.Module):
    """apex.contrib.layer_norm.FastLayerNorm: layer norm over the last dimension, of any size, in the parameters' dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, memory_efficient: bool = False):
        super().__init__()
        self.epsilon, self.memory_efficient = eps, memory_efficient
        self.weight, self.bias = nn.Parameter(torch.empty(hidden_size)), nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = cast_for_autocast(x, self.weight, self.bias)
        return layer_norm(x, weight, bias, weight.shape, self.epsilon, self.memory_efficient, weight.dtype)


class FusedRMSNorm(_Norm):
    """apex.normalization.FusedRMSNorm in plain PyTorch: the name, not the fusion. Computed in float32, in the input's dtype."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
                 memory_efficient: bool = False):
        super().__init__(normalized_shape, eps, elementwise_affine, memory_efficient, False)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if weight is None:
            (input,) = cast_for_autocast(input)
        else:
            input, weight = cast_for_autocast(input, weight)
        return rms_norm(input, weight, self.normalized_shape, self.eps, self.memory_efficient)
