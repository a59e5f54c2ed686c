"""scaled_masked_softmax against its specification in float64."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch
from cases import DTYPES, LAYOUTS, ROWS_COLS, SETTINGS, acc_eps, assert_within, dtypes, eps, leaf, randn, rows_cols, seeds, wide
from hypothesis import given

import megatron_kernels as mk
from megatron_kernels import reference


def check(x, mask=None, scale=0.3, causal=False, dy=None):
    """Forward and gradient of one call, against the specification."""
    dy = randn(*x.shape, seed=7, dtype=x.dtype) if dy is None else dy
    x, z = leaf(x), wide(x)
    y = mk.scaled_masked_softmax(x, mask, scale, causal)
    p = reference.scaled_masked_softmax(z, mask, scale, causal)
    p.backward(dy.double())
    y.backward(dy)
    q = p.detach()
    tiny = torch.finfo(x.dtype).tiny + torch.finfo(torch.float32).tiny  # results below the normal numbers may be 0
    distance = 1 - q.clamp(min=1e-300).log() + (z.detach() * scale).abs()  # how far the exponent's argument carries rounding
    bound = q * (eps(x.dtype) + acc_eps(x.dtype) * (4 * distance + min(q.shape[-1], 512) / 8)) + tiny
    assert_within(y, q, bound, "y", x.dtype)
    masked = reference.scaled_masked_softmax(torch.zeros_like(q), mask, scale, causal) == 0
    assert (y[masked] == 0).all(), "y: not exactly 0 at a masked position"

    spread = dy.double().abs() + (q * dy.double().abs()).sum(-1, keepdim=True)
    carried = q * (bound * dy.double().abs()).sum(-1, keepdim=True)
    bound = abs(scale) * ((q * 6 * eps(x.dtype) + bound) * spread + carried) + tiny
    assert_within(x.grad, z.grad, bound + tiny * spread, "dx", x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(implementation, poisoned, dtype, causal):
    for rows, cols in [*ROWS_COLS, (2, 9001)]:
        check(randn(rows, cols, seed=rows * cols, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_masks_broadcast(implementation, poisoned, dtype, causal):
    b, h, sq, sk = 3, 2, 5, 35
    x = randn(b, h, sq, sk, seed=3, dtype=dtype)
    for expand in itertools.product([False, True], repeat=4):
        shape = [1 if one else n for one, n in zip(expand, (b, h, sq, sk), strict=True)]
        mask = cases.rand(*shape, seed=5) < 0.4
        check(x, mask, causal=causal)
        if shape[0] == 1:
            check(x, mask[0], causal=causal)
        if shape[:3] == [1, 1, 1]:
            check(x, mask[0, 0, 0], causal=causal)
    full = cases.rand(b, h, sq, sk, seed=6) < 0.4
    check(x, full.transpose(0, 3).contiguous().transpose(0, 3), causal=causal)
    check(x, (cases.rand(b, 1, 1, sk, seed=7) < 0.4).expand(b, h, sq, sk), causal=causal)
    check(x, torch.tensor(False), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_mask_of_many_dimensions(implementation, poisoned, causal):
    """Every second dimension broadcasts, so that no two share a stride."""
    x = randn(2, 3, 2, 2, 3, 11, seed=8, dtype=torch.float32)
    for shape in [(2, 1, 2, 1, 3, 11), (3, 1, 2, 1, 11), (3, 1, 2, 1, 1)]:
        mask = cases.rand(*shape, seed=9) < 0.4
        check(x, mask, causal=causal)


def test_long_masked_row(implementation, poisoned):
    for cols in (9001, 16385):
        check(randn(2, cols, seed=1, dtype=torch.bfloat16), cases.rand(2, cols, seed=2) < 0.5)


@pytest.fixture
def in_chunks(monkeypatch):
    """Triton's kernels treat short rows as rows too long for a tile, so that many chunks take little time in the interpreter."""
    kernels = pytest.importorskip("megatron_kernels.triton.scaled_masked_softmax")
    monkeypatch.setattr(kernels, "MOST_COLUMNS", 8)
    monkeypatch.setattr(kernels, "CHUNK", 16)
    kernels.plan.cache_clear()
    yield
    kernels.plan.cache_clear()


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_rows_in_chunks(implementation, poisoned, in_chunks):
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(2, 3, 41, seed=1, dtype=dtype)
        for causal in (False, True):
            check(x, cases.rand(2, 1, 41, seed=2) < 0.4, scale=-0.3, causal=causal)
            check(x, cases.rand(3, 1, seed=3) < 0.4, causal=causal)
        check(x, torch.arange(41) < 36, scale=0.0)
        check(randn(21, 19, seed=4, dtype=dtype), causal=True)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_rows_in_chunks_with_values_that_have_no_softmax(implementation, poisoned, in_chunks):
    third = torch.arange(41) == 2
    for value in (math.nan, math.inf):
        row = torch.zeros(1, 41)
        row[0, 20] = value
        y = mk.scaled_masked_softmax(row, third)
        assert torch.equal(y.isnan(), ~third[None]) and y[0, 2] == 0
        assert_within(mk.scaled_masked_softmax(row, torch.arange(41) == 20)[0, :20], torch.full((20,), 1 / 40), 1e-7, "y")
    y = mk.scaled_masked_softmax(torch.full((1, 41), -math.inf), third)
    assert torch.equal(y.isnan(), ~third[None]) and y[0, 2] == 0
    for low in (-math.inf, torch.finfo(torch.float32).min):
        row = torch.full((1, 41), low)
        row[0, 40] = torch.finfo(torch.float32).max
        assert torch.equal(mk.scaled_masked_softmax(row, scale=2.0), (row > 0).float())
    future = torch.ones(21, 21).triu(1).bool()
    y = mk.scaled_masked_softmax(torch.zeros(21, 21).masked_fill(future, math.nan), causal=True)
    dx = cases.raw("scaled_masked_softmax").scaled_masked_softmax_backward(
        torch.zeros(21, 21).masked_fill(future, math.nan), y, 1.0, True)
    assert torch.equal(dx, torch.zeros(21, 21))


def test_fully_masked_rows_are_zero(implementation, poisoned):
    for mask in (torch.ones(4, 9, dtype=torch.bool), torch.ones(4, 1, dtype=torch.bool), torch.tensor(True)):
        x = leaf(torch.full((4, 9), -math.inf))
        y = mk.scaled_masked_softmax(x, mask)
        y.backward(torch.ones_like(y))
        assert torch.equal(y, torch.zeros(4, 9))
        assert torch.equal(x.grad, torch.zeros(4, 9))


@pytest.mark.parametrize("sq,sk", [(1, 6), (6, 1), (5, 3), (3, 5), (4, 4)])
def test_causal_is_bottom_right(implementation, poisoned, sq, sk):
    y = mk.scaled_masked_softmax(torch.zeros(2, sq, sk), causal=True)
    for q, k in itertools.product(range(sq), range(sk)):
        live = q + sk - sq + 1
        assert (y[:, q, k] == (0 if k >= live else 1 / live)).all()


def test_masked_values_do_not_count(implementation):
    x = torch.tensor([[1.0, math.nan, 2.0, math.inf]])
    mask = torch.tensor([[False, True, False, True]])
    assert_within(mk.scaled_masked_softmax(x, mask), torch.tensor([[math.exp(-1), 0, 1, 0]]) / (1 + math.exp(-1)), 1e-7, "y")


def test_right_of_the_diagonal_is_not_read(implementation):
    x = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), math.nan)
    y = mk.scaled_masked_softmax(x, causal=True)
    assert torch.equal(y, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3]))
    dx = cases.raw("scaled_masked_softmax").scaled_masked_softmax_backward(x, y, 1.0, True)
    assert torch.equal(dx, torch.zeros(3, 3))


def test_values_that_have_no_softmax_give_nan(implementation):
    row = torch.tensor([[-math.inf, -math.inf, 0.0]])
    mask = torch.tensor([[False, False, True]])
    expected = torch.tensor([[math.nan, math.nan, 0.0]])
    assert torch.equal(mk.scaled_masked_softmax(row, mask).nan_to_num(7), expected.nan_to_num(7))
    assert mk.scaled_masked_softmax(torch.tensor([[0.0, math.nan, 1.0]])).isnan().all()


@pytest.mark.parametrize("scale", [0.3, -0.3, 4.0])
def test_largest_finite_values(implementation, scale):
    """Additive masks put the dtype's minimum into scores; a row of nothing else is uniform."""
    low = torch.finfo(torch.float32).min
    for row in ([low] * 5, [-low, -low, low], [low, 0.0, 1.0], [low, -low] * 20):
        x = torch.tensor([row])
        exact = torch.softmax(x.double() * scale, -1)
        assert_within(mk.scaled_masked_softmax(x, scale=scale), exact, 1e-6, "y")


@pytest.mark.parametrize("last", [80.0, 3e3, 3e38])
def test_maximum_far_from_the_first_columns(implementation, last):
    for cols in (20, 50, 9000):
        x = randn(2, cols, seed=0, dtype=torch.float32, outliers=False)
        x[:, -1] = last
        check(x, scale=1.0)
        check(x, torch.arange(cols) < 40 if cols > 40 else None, scale=1.0)


def test_scale_is_not_rounded(implementation):
    x = torch.tensor([[0.0, 96.0]], dtype=torch.bfloat16)
    scale = 1 / 96 ** 0.5  # rounding this to bfloat16 would move the exponent's argument by 0.02 and the first value by 2%
    exact = reference.scaled_masked_softmax(x.double(), scale=scale)
    assert_within(mk.scaled_masked_softmax(x, scale=scale), exact, exact * eps(torch.bfloat16), "y")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, poisoned, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = randn(4, 6, 37, seed=1, dtype=dtype), randn(4, 6, 37, seed=2, dtype=dtype)
        check(LAYOUTS[layout](x), causal=True)
        check(x, dy=LAYOUTS[layout](dy))


@given(shape=rows_cols, dtype=dtypes, seed=seeds)
@SETTINGS
def test_random_shapes(implementation, poisoned, shape, dtype, seed):
    x = randn(2, *shape, seed=seed, dtype=cases.supported(dtype))
    mask = cases.rand(2, 1, shape[1], seed=seed) < 0.3 if seed % 2 else None
    check(x, mask, scale=(seed % 7 - 2) / 4, causal=seed % 3 == 0)


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"scaled_masked_softmax: mask must be bool.*float32"):
        mk.scaled_masked_softmax(x, torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"scaled_masked_softmax: mask must broadcast to x's shape \[2, 3\], got \[2, 4\]"):
        mk.scaled_masked_softmax(x, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"mask must broadcast.*got \[1, 2, 3\]"):
        mk.scaled_masked_softmax(x, torch.zeros(1, 2, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"scaled_masked_softmax: x must be float32.*int64"):
        mk.scaled_masked_softmax(x.long())
    with pytest.raises(RuntimeError, match="causal=True needs x of at least two dimensions"):
        mk.scaled_masked_softmax(x[0], causal=True)
    with pytest.raises(RuntimeError, match="last dimension of at least 1"):
        mk.scaled_masked_softmax(x[:, :0])
    with pytest.raises(RuntimeError, match=r"dy must have the shape of y \[2, 3\], got \[3, 2\]"):
        torch.ops.megatron_kernels.scaled_masked_softmax_backward(x.T, x, 1.0, False)
