"""cross_entropy against its specification in float64."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, ROWS_COLS, SETTINGS, acc_eps, assert_within, dtypes, eps, leaf, randn, rows_cols, seeds, wide
from hypothesis import given

import megatron_kernels as mk
from megatron_kernels import reference


def targets(shape, classes, seed, ignore_index=-100):
    t = (cases.rand(*shape, seed=seed) * classes).long()
    return t.masked_fill(cases.rand(*shape, seed=seed + 1) < 0.2, ignore_index)


def check(x, target, dloss=None, **options):
    dloss = randn(*target.shape, seed=5, dtype=acc(x.dtype)) if dloss is None else dloss
    inplace = options.pop("inplace_backward", False)
    x, z = leaf(x), wide(x)
    logits = x * 1 if inplace else x
    loss = mk.cross_entropy(logits, target, reduction="none", inplace_backward=inplace, **options)
    loss64 = reference.cross_entropy(z, target, reduction="none", **options)
    loss.backward(dloss)
    loss64.backward(dloss.double())

    k = options.get("vocab_size") or x.shape[-1]
    alpha, weight = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    classes, arithmetic = z.detach()[..., :k], 8 * acc_eps(x.dtype)
    lse = classes.logsumexp(-1)
    reach = classes.abs().amax(-1) + lse.abs() if x.numel() else lse
    bound = arithmetic * (1 + 3 * reach + weight * lse.square())
    assert_within(loss, loss64, bound, "loss", acc(x.dtype))

    p = torch.softmax(classes, -1)
    d = dloss.double().abs().unsqueeze(-1)
    slack = arithmetic * d * (p * (1 + reach.unsqueeze(-1)) * (1 + 2 * weight * lse.abs().unsqueeze(-1)) + alpha / k + 0)
    true_class = F.one_hot(target.clamp(0, k - 1), k) * arithmetic * d
    flushed = torch.finfo(torch.float32).smallest_normal * d * (1 + 2 * weight * lse.abs().unsqueeze(-1))
    tiny = torch.finfo(x.dtype).smallest_normal + flushed
    slack = F.pad(slack + true_class, (0, x.shape[-1] - k))
    assert_within(x.grad, z.grad, z.grad.abs() * eps(x.dtype) + slack + tiny, "dlogits", x.dtype)
    assert (x.grad[..., k:] == 0).all(), "dlogits: not exactly 0 in padding"
    assert (x.grad[target == options.get("ignore_index", -100)] == 0).all(), "dlogits: not exactly 0 in an ignored row"


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "all"])
def test_shapes(implementation, poisoned, dtype, options):
    for rows, cols in ROWS_COLS:
        x, target = randn(rows, cols, seed=rows + cols, dtype=dtype), targets((rows,), cols, seed=cols)
        check(x, target, **options)
        check(x, target, inplace_backward=True, **options)
        if cols > 8:
            check(x, target.remainder(cols - 5), vocab_size=cols - 5, **options)


def test_long_rows_begin_anywhere(implementation, poisoned):
    """Rows of several blocks, at several distances from a 16-byte boundary."""
    for dtype, rows in ((torch.float32, 3), (torch.bfloat16, 4)):
        x, target = randn(rows, 20011, seed=1, dtype=dtype), torch.tensor([20000, 7, -100, 17000])[:rows]
        check(x, target, label_smoothing=0.1)
        check(x, target.clamp(max=16999), vocab_size=17001, inplace_backward=True)


def test_against_torch(implementation):
    x, target = randn(40, 300, seed=0, dtype=torch.float32), targets((40,), 300, seed=1)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):
            ours = mk.cross_entropy(x, target, label_smoothing=smoothing, reduction=reduction)
            torch.testing.assert_close(ours, F.cross_entropy(x, target, label_smoothing=smoothing, reduction=reduction))


def test_padding_may_hold_anything(implementation, poisoned):
    x = randn(6, 40, seed=0, dtype=torch.float32)
    x[:, 33:] = math.nan
    x.requires_grad_()
    loss = mk.cross_entropy(x, targets((6,), 33, seed=2), vocab_size=33, label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite()
    assert (x.grad[:, 33:] == 0).all()
    assert x.grad.isfinite().all()


def test_ignored_rows_may_hold_anything(implementation, poisoned):
    x = randn(3, 40, seed=0, dtype=torch.float32)
    x[1] = math.nan
    x.requires_grad_()
    loss = mk.cross_entropy(x, torch.tensor([3, -100, 5]))
    loss.backward()
    assert loss.isfinite()
    assert (x.grad[1] == 0).all()
    assert x.grad.isfinite().all()


def test_all_ignored_gives_zero(implementation, poisoned):
    x = leaf(randn(3, 5, seed=0, dtype=torch.float32))
    loss = mk.cross_entropy(x, torch.full((3,), 7), ignore_index=7)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros(3, 5))


def test_row_of_minus_infinity_but_one(implementation):
    x = torch.full((1, 5000), -math.inf)
    x[0, 4000] = 2.0
    assert mk.cross_entropy(x, torch.tensor([4000])) == 0
    x[0, 3] = math.nan
    assert mk.cross_entropy(x, torch.tensor([4000])).isnan()


def test_true_class_gradient_is_formed_in_float(implementation):
    """p - 1 where p rounds to 1 in bfloat16."""
    x = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    mk.cross_entropy(x, torch.tensor([0])).backward()
    exact = torch.softmax(torch.tensor([[8.0, 0, 0]], dtype=torch.float64), -1) - torch.tensor([[1.0, 0, 0]])
    assert_within(x.grad, exact, exact.abs() * eps(torch.bfloat16), "dlogits")


def test_shards_combine_to_the_whole(implementation, poisoned):
    """Statistics of uneven column shards give the loss; the backward of a shard is that shard of the gradient."""
    ops, options = cases.raw("cross_entropy"), (-100, 0.2)
    x, target = randn(9, 57, seed=1, dtype=cases.supported(torch.float64)), targets((9,), 50, seed=2)
    tolerance = 1e-13 if x.dtype == torch.float64 else 1e-4
    loss, lse = ops.cross_entropy_forward(x, target, 50, *options, 0.01)
    dlogits = ops.cross_entropy_backward(torch.ones_like(loss), x, target, lse, 0, 50, *options, 0.01)
    starts = [0, 13, 30, 52, 57]
    parts, grads = [], []
    for start, end in itertools.pairwise(starts):
        shard = x[:, start:end]
        parts.append(ops.cross_entropy_partial(shard, target, start, 50, *options))
        grads.append(ops.cross_entropy_backward(torch.ones_like(loss), shard, target, lse, start, 50, *options, 0.01))
    top, exps, term = torch.stack(parts).unbind(-1)
    whole = top.amax(0) + (exps * (top - top.amax(0)).exp().nan_to_num(0.0)).sum(0).log()
    live = target != -100
    torch.testing.assert_close(whole[live], lse[live], rtol=0, atol=tolerance)
    combined = (whole - term.sum(0) + 0.01 * whole.square())[live]
    torch.testing.assert_close(combined, loss[live], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.cat(grads, 1), dlogits, rtol=0, atol=tolerance / 100)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, poisoned, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x, target = randn(5, 6, 37, seed=1, dtype=dtype), targets((5, 6), 37, seed=2)
        check(LAYOUTS[layout](x), LAYOUTS[layout](target))
        check(x, target, dloss=LAYOUTS[layout](randn(5, 6, seed=3, dtype=torch.float32)))
    check(x, target, dloss=torch.ones(()).expand(5, 6))


@given(shape=rows_cols, dtype=dtypes, seed=seeds)
@SETTINGS
def test_random_shapes(implementation, poisoned, shape, dtype, seed):
    (rows, cols), dtype = shape, cases.supported(dtype)
    k = max(1, cols - seed % 4)
    check(randn(rows, cols, seed=seed, dtype=dtype), targets((rows,), k, seed=seed, ignore_index=-1), vocab_size=k, ignore_index=-1,
          label_smoothing=(seed % 3) / 10, z_loss=(seed % 2) / 100, inplace_backward=seed % 5 == 0)


def test_inplace_backward_reuses_the_logits():
    x = leaf(randn(4, 9, seed=0, dtype=torch.float32))
    seen = []
    logits = x * 2
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    mk.cross_entropy(logits, torch.tensor([0, 1, 2, 3]), inplace_backward=True).backward()
    assert seen == [logits.data_ptr()]


def test_inplace_backward_cannot_be_silently_wrong():
    x = leaf(randn(4, 9, seed=0, dtype=torch.float32))
    target = torch.tensor([0, 1, 2, 3])
    logits = x * 2
    loss = mk.cross_entropy(logits, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = x * 2
    other = logits.square().sum()
    mk.cross_entropy(logits, target, inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_errors():
    x, target = torch.zeros(2, 5), torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match=r"cross_entropy: target 5 at row 1 is neither ignore_index \(-100\) nor in \[0, 5\)"):
        mk.cross_entropy(x, torch.tensor([1, 5]))
    with pytest.raises(RuntimeError, match=r"cross_entropy: target -1 at row 0 is neither"):
        mk.cross_entropy(x, torch.tensor([-1, 7]))
    with pytest.raises(RuntimeError, match=r"target 4 at row 0 is neither ignore_index \(-100\) nor in \[0, 4\)"):
        mk.cross_entropy(x, torch.tensor([4, 0]), vocab_size=4)
    with pytest.raises(RuntimeError, match=r"target 5 is neither"), mk.use("reference"):
        mk.cross_entropy(x, torch.tensor([1, 5]))
    with pytest.raises(RuntimeError, match="cross_entropy: target must be int64, got float32"):
        mk.cross_entropy(x, target.float())
    with pytest.raises(RuntimeError, match=r"target must have the shape of logits \[2, 5\] without the last dimension, got \[3\]"):
        mk.cross_entropy(x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(RuntimeError, match="vocab_size must be at most the 5 columns of logits, got 6"):
        mk.cross_entropy(x, target, vocab_size=6)
    with pytest.raises(RuntimeError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        mk.cross_entropy(x, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"):
        mk.cross_entropy(x, target, reduction="avg")
    with pytest.raises(ValueError, match="got a leaf"):
        mk.cross_entropy(leaf(x), target, inplace_backward=True)
    with pytest.raises(ValueError, match="needs contiguous logits"):
        mk.cross_entropy((leaf(x) * 1).t().contiguous().t(), target, inplace_backward=True)


def test_int32_targets(implementation):
    x = randn(3, 5, seed=0, dtype=torch.float32)
    target = torch.tensor([1, -100, 4])
    assert torch.equal(mk.cross_entropy(x, target.int()), mk.cross_entropy(x, target))


@pytest.mark.parametrize("name", ["simt", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_target_that_is_no_class_gives_nan_on_a_gpu(name):
    """An error would have to wait for the kernel. The other rows are not touched by it."""
    if not mk.implementations()[name].available:
        pytest.skip(mk.implementations()[name].detail)
    x, target = randn(4, 50, seed=0, dtype=torch.float32), torch.tensor([3, 50, -1, 7])
    x = x.to("cuda" if name == "cuda" or (name == "triton" and torch.cuda.is_available()) else "cpu")
    ours, exact = leaf(x), wide(x)
    with mk.use(name):
        loss = mk.cross_entropy(ours, target.to(x.device), reduction="none")
    loss.sum().backward()
    good = torch.tensor([True, False, False, True])
    wanted = reference.cross_entropy(exact[good], target[good].to(x.device), reduction="none")
    wanted.sum().backward()
    assert loss[~good].isnan().all() and ours.grad[~good].isnan().all()
    assert_within(loss[good], wanted, 1e-4, "loss")
    assert_within(ours.grad[good], exact.grad[good], 1e-6, "dlogits")
