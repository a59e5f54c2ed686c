"""layer_norm against its specification in float64."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import DTYPES, LAYOUTS, ROWS_COLS, SETTINGS, acc_eps, assert_within, dtypes, eps, leaf, randn, rows_cols, seeds, wide
from hypothesis import given

import megatron_kernels as mk
from megatron_kernels import reference


def check(x, weight, bias, epsilon=1e-5, dy=None):
    dy = randn(*x.shape, seed=7, dtype=x.dtype) if dy is None else dy
    n = x.shape[-1]
    ours = [leaf(x), None if weight is None else leaf(weight), None if bias is None else leaf(bias)]
    exact = [wide(x), wide(weight), wide(bias)]
    y, y64 = mk.layer_norm(*ours, epsilon), reference.layer_norm(*exact, epsilon)
    y.backward(dy)
    y64.backward(dy.double())

    x64, d = exact[0].detach(), dy.double()
    w = torch.ones(n, dtype=torch.float64) if weight is None else exact[1].detach()
    mean = x64.mean(-1, keepdim=True)
    rstd = ((x64 - mean).square().mean(-1, keepdim=True) + epsilon).rsqrt()
    xhat = (x64 - mean) * rstd
    rounding, arithmetic = eps(x.dtype), 8 * acc_eps(x.dtype)
    xhat_error = arithmetic * (xhat.abs() + rstd * x64.abs().mean(-1, keepdim=True) + rstd * x64.abs())
    size = (xhat * w).abs() + (0 if bias is None else exact[2].detach().abs())
    tiny = torch.finfo(x.dtype).smallest_normal
    assert_within(y, y64, y64.detach().abs() * rounding + arithmetic * size + xhat_error * w.abs() + tiny, "y", x.dtype)

    g = (d * w).abs()
    terms = g + g.mean(-1, keepdim=True) + xhat.abs() * (g * xhat.abs()).mean(-1, keepdim=True)
    slack = rstd * (arithmetic * terms + xhat_error * (g * xhat.abs()).mean(-1, keepdim=True)
                    + xhat.abs() * (g * xhat_error).mean(-1, keepdim=True))
    assert_within(ours[0].grad, exact[0].grad, exact[0].grad.abs() * rounding + slack + tiny, "dx", x.dtype)
    if weight is not None:
        bound = (arithmetic * (d * xhat).abs() + d.abs() * xhat_error).reshape(-1, n).sum(0)
        assert_within(ours[1].grad, exact[1].grad, exact[1].grad.abs() * eps(weight.dtype) + bound + tiny, "dweight", weight.dtype)
    if bias is not None:
        bound = arithmetic * d.abs().reshape(-1, n).sum(0)
        assert_within(ours[2].grad, exact[2].grad, exact[2].grad.abs() * eps(bias.dtype) + bound + tiny, "dbias", bias.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(implementation, poisoned, dtype):
    for rows, cols in ROWS_COLS:
        x, weight, bias = (randn(*shape, seed=len(shape) + cols, dtype=dtype) for shape in ((rows, cols), (cols,), (cols,)))
        check(x, weight, bias)
        if dtype in (torch.float16, torch.bfloat16):
            check(x, weight.float(), bias.float())


def test_parameters_may_be_absent(implementation, poisoned):
    x, weight, bias = (randn(*shape, seed=len(shape), dtype=torch.bfloat16) for shape in ((5, 33), (33,), (33,)))
    check(x, None, None)
    check(x, weight, None)
    check(x, None, bias.float())


def test_many_rows(implementation, poisoned):
    """Enough rows that the parameter gradients are added up in many blocks."""
    check(*(randn(*shape, seed=len(shape), dtype=torch.float32) for shape in ((3001, 70), (70,), (70,))))


def test_large_offset_does_not_cancel(implementation):
    """E[x^2] - mean^2 would lose every digit here."""
    x = 1e4 + randn(3, 1000, seed=0, dtype=torch.float32, outliers=False)
    assert_within(mk.layer_norm(x), reference.layer_norm(x.double()), 4e-3, "y")


def test_constant_row_gives_the_bias(implementation, poisoned):
    y = mk.layer_norm(torch.full((2, 50), 3.0), torch.ones(50), torch.arange(50.0))
    assert torch.equal(y, torch.arange(50.0).expand(2, 50))


def test_large_constant_row(implementation, poisoned):
    """(0 - mean) * rstd overflows, which must not reach the sums from beyond the row's end."""
    x = torch.full((2, 5), 1e36)
    y, mean, rstd = cases.raw("layer_norm").layer_norm_forward(x, None, None, 1e-5)
    dx, _, _ = cases.raw("layer_norm").layer_norm_backward(torch.ones_like(x), x, None, None, mean, rstd)
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(dx, torch.zeros_like(x))


def test_eps_is_used(implementation):
    x = randn(4, 40, seed=0, dtype=torch.float32)
    check(x, None, None, epsilon=0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, poisoned, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = (randn(*shape, seed=len(shape), dtype=dtype) for shape in ((5, 6, 37), (37,), (37,)))
        dy = randn(5, 6, 37, seed=9, dtype=dtype)
        check(LAYOUTS[layout](x), LAYOUTS[layout](weight), LAYOUTS[layout](bias))
        check(x, weight, bias, dy=LAYOUTS[layout](dy))
    check(x, weight[:1].expand(37), bias[:1].expand(37))


@given(shape=rows_cols, dtype=dtypes, seed=seeds)
@SETTINGS
def test_random_shapes(implementation, poisoned, shape, dtype, seed):
    cols, dtype = shape[1], cases.supported(dtype)
    check(randn(2, *shape, seed=seed, dtype=dtype), randn(cols, seed=seed + 1, dtype=dtype) if seed % 2 else None,
          randn(cols, seed=seed + 2, dtype=dtype) if seed % 3 else None)


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"layer_norm: weight must have shape \[3\], got \[4\]"):
        mk.layer_norm(x, torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"layer_norm: bias must have shape \[3\], got \[1, 3\]"):
        mk.layer_norm(x, None, torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="layer_norm: weight must be float32.*got float16"):
        mk.layer_norm(x, torch.zeros(3, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="layer_norm: x must have a last dimension of at least 1"):
        mk.layer_norm(torch.zeros(2, 0))
    with pytest.raises(RuntimeError, match="layer_norm: x must be float32.*bool"):
        mk.layer_norm(x.bool())
    with pytest.raises(RuntimeError, match=r"mean must have one value per row \(2\)"):
        torch.ops.megatron_kernels.layer_norm_backward(x, x, None, None, torch.zeros(3), torch.zeros(2))
