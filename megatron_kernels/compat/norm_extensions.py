"""The functions of fused_layer_norm_cuda, fused_mix_prec_layer_norm_cuda and fast_layer_norm.

Positional orders and results are those of apex's csrc/layer_norm_cuda.cpp and apex/contrib/csrc/layer_norm/ln_api.cpp. Layer norm
runs on our op. RMS norm, and the backward that only has the output (memory_efficient), are plain PyTorch: they are not fused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend, reference
from .arguments import UpstreamError


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """A dtype that holds the values of all tensors; 16-bit beside another 16-bit type is float32."""
    dtypes = [t.dtype for t in tensors if t is not None]
    wide = dtypes[0]
    for dtype in dtypes[1:]:
        wide = torch.promote_types(wide, dtype)
    return wide


def as_rows(who: str, x: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> Tensor:
    """x as [rows, product of normalized_shape]."""
    shape = tuple(normalized_shape)
    if not shape:
        raise UpstreamError(f"{who}: normalized_shape must name at least one dimension, got {shape}")
    if tuple(x.shape[-len(shape):]) != shape:
        raise UpstreamError(f"{who}: input must end in the dimensions of normalized_shape {shape}, got shape {tuple(x.shape)}")
    for parameter in parameters:
        if parameter is not None and tuple(parameter.shape) != shape:
            raise UpstreamError(f"{who}: weight and bias must have the shape {shape} of normalized_shape, got "
                                f"{tuple(parameter.shape)}")
    return x.reshape(math.prod(x.shape[:-len(shape)]), math.prod(shape))


def flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1)


def beside(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """The parameter as a row of a dtype that our op takes beside x: x's or float32."""
    if parameter is None:
        return None
    return flat(parameter if parameter.dtype in (x.dtype, torch.float32) else parameter.float())


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1 / standard deviation of rows."""
    name = backend.choose("layer_norm", x)
    if name != backend.REFERENCE:
        return backend.namespace(name).layer_norm_forward(x, weight, bias, eps)
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    return reference.layer_norm(x, weight, bias, eps), z.mean(-1), torch.rsqrt(z.var(-1, unbiased=False) + eps)


def _normalized(rows: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
                from_output: bool) -> Tensor:
    """(x - mean) * rstd from the input, or from the output by undoing weight and bias.

    A weight smaller than eps counts as eps of its sign there, as in apex (clamp_by_magnitude in layer_norm_cuda_kernel.cu): what
    was multiplied by 0 can't be had back.
    """
    x = rows.to(rstd.dtype)
    if not from_output:
        return (x if mean is None else x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    if bias is not None:
        x = x - bias.to(x.dtype)
    if weight is None:
        return x
    w = weight.to(x.dtype)
    return x / torch.where(w >= 0, w.clamp(min=eps), w.clamp(max=-eps))


def _backward(dout: Tensor, xhat: Tensor, rstd: Tensor, weight: Tensor | None, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias of a norm, in plain PyTorch, of xhat = (x - mean) * rstd; RMS norm is the same, not centred."""
    dy = dout.to(xhat.dtype)
    g = dy if weight is None else dy * weight.to(xhat.dtype)
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if centred:
        dx = dx - g.mean(-1, keepdim=True)
    return dx * rstd.unsqueeze(-1), (dy * xhat).sum(0), dy.sum(0)


def layer_norm_gradients(who: str, dout: Tensor, mean: Tensor | None, rstd: Tensor, x_or_y: Tensor, shape: Sequence[int],
                         weight: Tensor | None, bias: Tensor | None, eps: float, memory_efficient: bool) -> list[Tensor]:
    with torch.no_grad():
        rows, dy = as_rows(who, x_or_y, shape, weight, bias), as_rows(who, dout, shape)
        w, b = flat(weight), flat(bias)
        name = backend.choose("layer_norm", rows)
        if memory_efficient or name == backend.REFERENCE:
            if mean is None and not memory_efficient:
                raise UpstreamError(f"{who}: mean is None, which needs memory_efficient=True")
            xhat = _normalized(rows, mean, rstd, w, b, eps, memory_efficient)
            dx, dweight, dbias = _backward(dy, xhat, rstd, w, True)
        else:
            if mean is None:
                raise UpstreamError(f"{who}: mean is None, which needs memory_efficient=True")
            if dy.dtype != rows.dtype:
                wide = wide_dtype(rows, dy)
                rows, dy = rows.to(wide), dy.to(wide)
            w = beside(rows, w)
            dx, dweight, dbias = backend.namespace(name).layer_norm_backward(dy, rows, w, w, mean, rstd)
        grads = [dx.reshape(x_or_y.shape).to(x_or_y.dtype)]
        if weight is not None:
            grads += [dweight.reshape(weight.shape).to(weight.dtype), dbias.reshape(weight.shape).to(weight.dtype)]
        return grads


def layer_norm_rows(who: str, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float,
                    dtype: torch.dtype) -> list[Tensor]:
    with torch.no_grad():
        rows = as_rows(who, x, shape, weight, bias)
        if dtype != x.dtype:
            rows = rows.to(wide_dtype(x, weight))
        y, mean, rstd = _layer_norm(rows, beside(rows, weight), beside(rows, bias), eps)
        return [y.reshape(x.shape).to(dtype), mean, rstd]


def forward(input: Tensor, normalized_shape: Sequence[int], eps: float) -> list[Tensor]:
    """[output, mean, invvar], the statistics flat, one per row, in float32 (float64 for float64)."""
    return layer_norm_rows("fused_layer_norm_cuda.forward", input, normalized_shape, None, None, eps, input.dtype)


def forward_affine(input: Tensor, normalized_shape: Sequence[int], gamma: Tensor, beta: Tensor, eps: float) -> list[Tensor]:
    """[output in input's dtype, mean, invvar]."""
    return layer_norm_rows("fused_layer_norm_cuda.forward_affine", input, normalized_shape, gamma, beta, eps, input.dtype)


def forward_affine_mixed_dtypes(input: Tensor, normalized_shape: Sequence[int], gamma: Tensor, beta: Tensor,
                                eps: float) -> list[Tensor]:
    """[output in gamma's dtype, mean, invvar]."""
    return layer_norm_rows("fused_layer_norm_cuda.forward_affine_mixed_dtypes", input, normalized_shape, gamma, beta, eps,
                           gamma.dtype)


def backward(dout: Tensor, mean: Tensor | None, invvar: Tensor, input_or_output: Tensor, normalized_shape: Sequence[int],
             eps: float, memory_efficient: bool = False) -> Tensor:
    """The gradient of the input, in the dtype of input_or_output: the output, and mean None, where memory_efficient."""
    return layer_norm_gradients("fused_layer_norm_cuda.backward", dout, mean, invvar, input_or_output, normalized_shape, None,
                                None, eps, memory_efficient)[0]


def backward_affine(dout: Tensor, mean: Tensor | None, invvar: Tensor, input_or_output: Tensor, normalized_shape: Sequence[int],
                    gamma: Tensor, beta: Tensor, eps: float, memory_efficient: bool = False) -> list[Tensor]:
    """[dinput, dgamma, dbeta]."""
    return layer_norm_gradients("fused_layer_norm_cuda.backward_affine", dout, mean, invvar, input_or_output, normalized_shape,
                                gamma, beta, eps, memory_efficient)


def rms_norm_rows(who: str, x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float, dtype: torch.dtype) -> list[Tensor]:
    with torch.no_grad():
        rows = as_rows(who, x, shape, weight)
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(rows.square().mean(-1) + eps)
        y = rows * rstd.unsqueeze(-1)
        if weight is not None:
            y = y * weight.reshape(-1).to(y.dtype)
        return [y.reshape(x.shape).to(dtype), rstd]


def rms_forward(input: Tensor, normalized_shape: Sequence[int], eps: float) -> list[Tensor]:
    """[output, invvar]: x / sqrt(mean(x^2) + eps)."""
    return rms_norm_rows("fused_layer_norm_cuda.rms_forward", input, normalized_shape, None, eps, input.dtype)


def rms_forward_affine(input: Tensor, normalized_shape: Sequence[int], gamma: Tensor, eps: float) -> list[Tensor]:
    """[output in input's dtype, invvar]."""
    return rms_norm_rows("fused_layer_norm_cuda.rms_forward_affine", input, normalized_shape, gamma, eps, input.dtype)


def rms_forward_affine_mixed_dtypes(input: Tensor, normalized_shape: Sequence[int], gamma: Tensor, eps: float) -> list[Tensor]:
    """[output in gamma's dtype, invvar]."""
    return rms_norm_rows("fused_layer_norm_cuda.rms_forward_affine_mixed_dtypes", input, normalized_shape, gamma, eps, gamma.dtype)


def rms_norm_gradients(who: str, dout: Tensor, rstd: Tensor, x_or_y: Tensor, shape: Sequence[int], weight: Tensor | None,
                       eps: float, memory_efficient: bool) -> list[Tensor]:
    with torch.no_grad():
        rows, dy = as_rows(who, x_or_y, shape, weight), as_rows(who, dout, shape)
        xhat = _normalized(rows, None, rstd, flat(weight), None, eps, memory_efficient)
        dx, dweight, _ = _backward(dy, xhat, rstd, flat(weight), False)
        grads = [dx.reshape(x_or_y.shape).to(x_or_y.dtype)]
        return grads if weight is None else [*grads, dweight.reshape(weight.shape).to(weight.dtype)]


def rms_backward(dout: Tensor, invvar: Tensor, input_or_output: Tensor, normalized_shape: Sequence[int], eps: float,
                 memory_efficient: bool = False) -> Tensor:
    """The gradient of the input."""
    return rms_norm_gradients("fused_layer_norm_cuda.rms_backward", dout, invvar, input_or_output, normalized_shape, None, eps,
                              memory_efficient)[0]


def rms_backward_affine(dout: Tensor, invvar: Tensor, input_or_output: Tensor, normalized_shape: Sequence[int], gamma: Tensor,
                        eps: float, memory_efficient: bool = False) -> list[Tensor]:
    """[dinput, dgamma]."""
    return rms_norm_gradients("fused_layer_norm_cuda.rms_backward_affine", dout, invvar, input_or_output, normalized_shape,
                              gamma, eps, memory_efficient)


def ln_fwd(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> list[Tensor]:
    """[z in gamma's dtype, mu, rsigma] of x [rows, hidden], hidden of any size."""
    return layer_norm_rows("fast_layer_norm.ln_fwd", x, gamma.shape, gamma, beta, epsilon, gamma.dtype)


def ln_bwd(dz: Tensor, x_or_z: Tensor, mu: Tensor | None, rsigma: Tensor, gamma: Tensor, beta: Tensor | None = None,
           memory_efficient: bool = False) -> list[Tensor]:
    """[dx, dgamma, dbeta, dgamma_part, dbeta_part]; the parts, [1, hidden] in float32, are what sums to the gradients.

    Weights smaller than 1e-5 count as that where memory_efficient: this function is not given the epsilon of the forward.
    """
    dx, dgamma, dbeta = layer_norm_gradients("fast_layer_norm.ln_bwd", dz, mu, rsigma, x_or_z, gamma.shape, gamma, beta, 1e-5,
                                             memory_efficient)
    return [dx, dgamma, dbeta, dgamma.float().unsqueeze(0), dbeta.float().unsqueeze(0)]
