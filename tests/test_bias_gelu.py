"""bias_gelu against its specification in float64."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import DTYPES, LAYOUTS, ROWS_COLS, SETTINGS, acc_eps, assert_within, dtypes, eps, leaf, randn, rows_cols, seeds, wide
from hypothesis import given

import megatron_kernels as mk
from megatron_kernels import reference


def check(x, bias, approximate, dy=None):
    dy = randn(*x.shape, seed=7, dtype=x.dtype) if dy is None else dy
    x, bias, x64, bias64 = leaf(x), leaf(bias), wide(x), wide(bias)
    y = mk.bias_gelu(x, bias, approximate)
    y64 = reference.bias_gelu(x64, bias64, approximate)
    y64.backward(dy.double())
    y.backward(dy)
    rounding, arithmetic = eps(x.dtype), 4 * acc_eps(x.dtype)
    size = x64.detach().abs() + bias64.detach().abs()
    tiny = torch.finfo(x.dtype).smallest_normal
    assert_within(y, y64, y64.detach().abs() * rounding + arithmetic * size + tiny, "y", x.dtype)
    slack = arithmetic * dy.double().abs() * (1 + size)
    assert_within(x.grad, x64.grad, x64.grad.abs() * rounding + slack + tiny, "dx", x.dtype)
    sums = slack.reshape(-1, x.shape[-1]).sum(0) + arithmetic * x64.grad.abs().reshape(-1, x.shape[-1]).sum(0)
    assert_within(bias.grad, bias64.grad, bias64.grad.abs() * eps(bias.dtype) + sums + tiny, "dbias", bias.dtype)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(implementation, poisoned, dtype, approximate):
    for rows, cols in ROWS_COLS:
        x, bias = randn(rows, cols, seed=rows + cols, dtype=dtype), randn(cols, seed=cols, dtype=dtype)
        check(x, bias, approximate)
        if dtype in (torch.float16, torch.bfloat16):
            check(x, bias.float(), approximate)


def test_many_rows(implementation, poisoned):
    """Enough rows that the bias gradient is added up in many blocks."""
    check(randn(3001, 70, seed=1, dtype=torch.float32), randn(70, seed=2, dtype=torch.float32), "tanh")


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_left_tail_keeps_its_relative_accuracy(implementation, approximate):
    x = torch.linspace(-5, 0, 10001)[:-1]
    y = mk.bias_gelu(x, torch.zeros_like(x), approximate)
    if approximate == "tanh":
        u = math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
        exact = x.double() * torch.sigmoid(2 * u)
    else:
        exact = x.double() * 0.5 * torch.special.erfc(-x.double() / math.sqrt(2))
    assert ((y - exact) / exact).abs().max() < 40 * eps(torch.float32)  # |x|^2 of rounding in the exponent's argument


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_extreme_values(implementation, approximate):
    x = torch.tensor([1e38, -1e38, 3e4, -3e4, 0.0, math.inf, math.nan])
    x.requires_grad_()
    y = mk.bias_gelu(x, torch.zeros(7), approximate)
    y.sum().backward()
    assert_within(y[:5], torch.tensor([1e38, 0, 3e4, 0, 0]), 1e-30, "y")
    assert y[5] == math.inf
    assert y[6].isnan()
    assert torch.equal(x.grad[:5].round(), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]))
    assert x.grad[6].isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, poisoned, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x, bias, dy = (randn(*shape, seed=len(shape), dtype=dtype) for shape in ((5, 6, 37), (37,), (5, 6, 37)))
        check(LAYOUTS[layout](x), LAYOUTS[layout](bias), "tanh")
        check(x, bias, "none", dy=LAYOUTS[layout](dy))
    check(x, bias[:1].expand(37), "tanh")


@given(shape=rows_cols, dtype=dtypes, seed=seeds)
@SETTINGS
def test_random_shapes(implementation, poisoned, shape, dtype, seed):
    dtype = cases.supported(dtype)
    check(randn(2, *shape, seed=seed, dtype=dtype), randn(shape[1], seed=seed + 1, dtype=dtype), ("tanh", "none")[seed % 2])


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="bias_gelu: approximate must be 'tanh' or 'none', got 'fast'"):
        mk.bias_gelu(x, x[0], "fast")
    with pytest.raises(RuntimeError, match=r"bias_gelu: bias must have shape \[3\], got \[2\]"):
        mk.bias_gelu(x, torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"bias_gelu: bias must be float32 \(x's dtype\) or float32, got bfloat16"):
        mk.bias_gelu(x, torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="bias_gelu: x must be float32.*int64"):
        mk.bias_gelu(x.long(), x[0])
    with pytest.raises(RuntimeError, match="dy must have the dtype of x float32, got float64"):
        torch.ops.megatron_kernels.bias_gelu_backward(x.double(), x, x[0], True)
