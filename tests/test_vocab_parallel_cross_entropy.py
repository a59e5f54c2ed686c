"""The vocab-parallel losses in one process: shards merged by hand, and a group of one. tests/parallel_losses.py has the ranks."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import leaf, randn
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_kernels as mk
from megatron_kernels import backend
from megatron_kernels.parallel import Group, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from megatron_kernels.parallel.cross_entropy import Shard, merge, raw

REDUCTIONS = ["mean", "sum", "none"]
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3}
by_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def problem(tokens=300, vocabulary=403, hidden=16, dtype=torch.float64):
    target = (cases.rand(tokens, seed=3) * vocabulary).long()
    target[::9] = -100
    return (*(leaf(randn(rows, hidden, seed=rows, dtype=dtype, outliers=False)) for rows in (tokens, vocabulary)), target)


def weigh(loss):
    """A scalar of which each token's loss has a gradient of its own; loss scaled by something else than 1."""
    return (loss * torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum()


def gradients(loss, *inputs, **options):
    return torch.autograd.grad(weigh(loss), inputs, **options)


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def merged(logits, target, starts, vocabulary, name, ignore_index=-100, label_smoothing=0.0, z_loss=0.0):
    """Loss and gradient [n, V] of shards that begin at `starts`."""
    options, parts, grads = (vocabulary, ignore_index, label_smoothing, z_loss), [], []
    shards = [(a, logits[:, a:b].contiguous()) for a, b in itertools.pairwise([*starts, logits.shape[1]])]
    for start, shard in shards:
        parts.append(raw(name).cross_entropy_partial(shard, target, start, *options[:3]))
    loss, lse = merge("f", torch.stack(parts), target, Shard(0, *options), Group(len(shards), 0))
    for start, shard in shards:
        grads.append(raw(name).cross_entropy_backward(torch.ones_like(loss), shard, target, lse, start, *options))
    return loss, torch.cat(grads, 1)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, ALL], ids=["plain", "smoothing", "all"])
def test_shards_merge_to_the_whole(implementation, poisoned, options):
    """Uneven shards, the last ones partly and wholly in padding, which holds NaN."""
    name = implementation.partition("-")[0]
    x, target = randn(9, 57, seed=1, dtype=cases.supported(torch.float64)), (cases.rand(9, seed=2) * 50).long()
    target[4] = -100
    whole = leaf(x[:, :50].double())
    x[:, 50:] = math.nan
    expected = mk.reference.cross_entropy(whole, target, reduction="none", **options)
    expected.sum().backward()
    loss, dlogits = merged(x, target, [0, 13, 30, 47, 53], 50, name, **options)
    tolerance = 1e-13 if x.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dlogits[:, :50].double(), whole.grad, rtol=0, atol=tolerance)
    assert (dlogits[:, 50:] == 0).all() and (dlogits[4] == 0).all() and loss[4] == 0


@pytest.mark.parametrize("name", ["cpu", backend.REFERENCE])
def test_smoothing_over_four_uneven_shards_is_torchs(name):
    x, target = randn(7, 50257, seed=1, dtype=torch.float64), (cases.rand(7, seed=2) * 50257).long()
    whole = leaf(x)
    expected = F.cross_entropy(whole, target, label_smoothing=0.1, reduction="none")
    expected.sum().backward()
    loss, dlogits = merged(x, target, [0, 12565, 25130, 37695], 50257, name, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(dlogits, whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cpu", backend.REFERENCE])
def test_merge_of_extremes(name):
    """Rows of -inf in one shard or but for one class, large logits, and NaN that must not get lost."""
    x = torch.zeros(5, 8, dtype=torch.float64)
    x[0, :4] = -math.inf
    x[1] = -math.inf
    x[1, 6] = 2.0
    x[2] += 1e30
    x[3, 5] = math.nan
    x[4] = -math.inf
    loss, _ = merged(x, torch.tensor([4, 6, 0, 0, 0]), [0, 4], 8, name)
    torch.testing.assert_close(loss[:3], torch.tensor([math.log(4), 0.0, math.log(8)], dtype=torch.float64))
    assert loss[3:].isnan().all()


def test_merge_names_the_rank_that_refused():
    parts = torch.zeros(2, 3, 3)
    parts[1, :, 1] = -1
    with pytest.raises(RuntimeError, match=r"f over group 'tp' \(ranks 4, 5\): rank 5 refused its columns"):
        merge("f", parts, torch.zeros(3, dtype=torch.long), Shard(0, 8, -100, 0.0, 0.0), Group(2, 0, "", "tp", (4, 5)))


@by_reduction
def test_group_of_one_is_cross_entropy(implementation, reduction):
    x, target = randn(6, 40, seed=0, dtype=torch.float32), (cases.rand(6, seed=1) * 33).long()
    ours, theirs = leaf(x), leaf(x)
    options = {"vocab_size": 33, "reduction": reduction, **ALL}
    loss, expected = vocab_parallel_cross_entropy(ours, target, **options), mk.cross_entropy(theirs, target, **options)
    assert torch.equal(loss, expected)
    assert torch.equal(gradients(loss, ours)[0], gradients(expected, theirs)[0])


@by_reduction
@pytest.mark.parametrize("options", [{}, {"vocab_size": 390, "ignore_index": 5, **ALL}], ids=["plain", "all"])
@pytest.mark.parametrize("name", ["cpu", backend.REFERENCE])
def test_linear_is_the_loss_of_the_logits(poisoned, name, reduction, options):
    hidden, weight, target = problem()
    if options:
        target = target.remainder(390)
    with mk.use(name):
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction, **options)
    expected = mk.cross_entropy(hidden @ weight.T, target, reduction=reduction, **options)
    assert loss.shape == expected.shape and error(loss, expected) < 1e-14
    for found, wanted in zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert error(found, wanted) < 1e-13


@by_reduction
def test_linear_on_every_implementation(implementation, poisoned, reduction):
    """Two chunks of tokens; hidden states of three dimensions."""
    hidden, weight, target = (x.detach() for x in problem(tokens=130, vocabulary=50, hidden=8, dtype=torch.float32))
    ours, exact = (leaf(hidden.view(2, 65, 8)), leaf(weight)), (leaf(hidden.double()), leaf(weight.double()))
    loss = vocab_parallel_linear_cross_entropy(*ours, target.view(2, 65), reduction=reduction, **ALL)
    expected = mk.reference.cross_entropy(exact[0] @ exact[1].T, target, reduction=reduction, **ALL)
    assert error(loss.flatten(), expected.flatten()) < 1e-5
    for found, wanted in zip(gradients(loss, *ours), gradients(expected, *exact), strict=True):
        assert error(found.reshape(wanted.shape), wanted) < 1e-5


@by_reduction
def test_gradcheck(reduction):
    hidden, weight, target = problem(tokens=4, vocabulary=9, hidden=3)
    assert torch.autograd.gradcheck(lambda h, w: vocab_parallel_linear_cross_entropy(h, w, target, vocab_size=8,
                                                                                     reduction=reduction, **ALL), (hidden, weight))


@by_reduction
def test_every_backward_over_a_graph_is_right(reduction):
    """As retain_graph makes them, and a schedule that takes the gradients of hidden and of the weight one after the other."""
    hidden, weight, target = problem()
    loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction, **ALL)
    expected = gradients(mk.cross_entropy(hidden @ weight.T, target, reduction=reduction, **ALL), hidden, weight)
    for _ in range(3):
        for found, wanted in zip(gradients(loss, hidden, weight, retain_graph=True), expected, strict=True):
            assert error(found, wanted) < 1e-13
    loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction, **ALL)
    (dhidden,) = gradients(loss, hidden, retain_graph=True)
    (dweight,) = gradients(loss, weight)
    assert error(dhidden, expected[0]) < 1e-13 and error(dweight, expected[1]) < 1e-13
    with pytest.raises(RuntimeError, match="second time"):
        weigh(loss).backward()


@by_reduction
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_only_wanted_gradients_are_formed(reduction, frozen):
    hidden, weight, target = problem()
    full = gradients(vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction), hidden, weight)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    wanted = [(x, g) for x, g in zip((hidden, weight), full, strict=True) if x.requires_grad]
    with Shapes() as seen, torch.set_grad_enabled(frozen != "no_grad"):
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction)
    assert error(loss, mk.cross_entropy(hidden @ weight.T, target, reduction=reduction)) < 1e-14
    assert loss.requires_grad == (frozen in ("hidden", "weight"))
    if not loss.requires_grad:
        assert not any("backward" in name for name in seen.names) and weight.shape not in seen.shapes
        return
    assert frozen != "weight" or weight.shape not in seen.shapes
    assert torch.equal(gradients(loss, wanted[0][0])[0], wanted[0][1])


class Shapes(TorchDispatchMode):
    """The ops that ran, and the shapes of the new tensors that they made."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        given = {id(x.untyped_storage()) for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in given and not x._is_view():
                self.shapes.add(x.shape)
        return out


@by_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_tensor_is_as_large_as_a_tenth_of_the_logits(reduction, dtype):
    """Beside inputs and gradients; benchmarks/linear_cross_entropy.py measures the memory."""
    hidden, weight, target = problem(tokens=3072, vocabulary=3000, dtype=dtype)
    with Shapes() as seen:
        gradients(vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction), hidden, weight)
    largest = max(shape.numel() for shape in seen.shapes - {hidden.shape, weight.shape})
    assert largest * dtype.itemsize <= 3072 * 3000 * 4 / 10
    assert largest >= 3072 * 3000 / 30, "the logits were not seen"


@by_reduction
def test_gradients_become_grad_without_a_copy(reduction):
    hidden, weight, target = problem()
    made = []
    weight.register_hook(lambda g: made.append(g.data_ptr()))
    vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction).sum().backward()
    assert made == [weight.grad.data_ptr()]


@by_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_exact_as_unchunked(reduction, dtype):
    """Against float64: at most 1.5 times the error of logits followed by cross_entropy."""
    hidden, weight, target = problem(tokens=1536, vocabulary=300, hidden=32, dtype=dtype)
    exact = leaf(hidden.detach().double()), leaf(weight.detach().double())
    expected = gradients(mk.cross_entropy(exact[0] @ exact[1].T, target, reduction=reduction), *exact)
    whole = gradients(mk.cross_entropy(hidden @ weight.T, target, reduction=reduction), hidden, weight)
    ours = gradients(vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction), hidden, weight)
    for found, unchunked, wanted in zip(ours, whole, expected, strict=True):
        assert error(found, wanted) < 1.5 * error(unchunked, wanted)


def test_float16_keeps_what_a_loss_scale_lifts():
    hidden, weight, target = problem(tokens=4096, vocabulary=64, hidden=8, dtype=torch.float16)
    exact = leaf(hidden.detach().double()), leaf(weight.detach().double())
    scale = 2.0**17  # beyond float16's range
    expected = torch.autograd.grad(mk.cross_entropy(exact[0] @ exact[1].T, target) * scale, exact)
    found = torch.autograd.grad(vocab_parallel_linear_cross_entropy(hidden, weight, target) * scale, (hidden, weight))
    assert error(found[0], expected[0]) < 5e-3 and error(found[1], expected[1]) < 5e-3


@by_reduction
def test_autocast_computes_in_16_bits_and_sums_in_32(reduction):
    hidden, weight, target = problem(tokens=1536, dtype=torch.float32)
    exact = leaf(hidden.detach().double()), leaf(weight.detach().double())
    expected = gradients(mk.cross_entropy(exact[0] @ exact[1].T, target, reduction=reduction), *exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction)
        whole = mk.cross_entropy(F.linear(hidden, weight), target, reduction=reduction)
        found = gradients(loss, hidden, weight)
    assert loss.dtype == torch.float32 and [x.dtype for x in found] == [torch.float32] * 2
    assert error(loss, whole) < 1e-6
    for ours, unchunked, wanted in zip(found, gradients(whole, hidden, weight), expected, strict=True):
        assert 1e-4 < error(ours, wanted) < 1.2 * error(unchunked, wanted)


@by_reduction
def test_layouts_and_integer_targets(reduction):
    hidden, weight, target = problem()
    expected = vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction)
    wanted = gradients(expected, hidden, weight)
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(vocab_parallel_linear_cross_entropy(hidden, weight, target.to(dtype), reduction=reduction), expected)
    for dtype in (torch.float64, torch.float32):
        h, w = leaf(hidden.detach().to(dtype).T.contiguous()), leaf(weight.detach().to(dtype).T.contiguous())
        loss = vocab_parallel_linear_cross_entropy(h.T, w.T, target, reduction=reduction)
        for found, exact in zip(gradients(loss, h, w), wanted, strict=True):
            assert error(found.T, exact) < (1e-13 if dtype == torch.float64 else 1e-5)
    spread = torch.stack([target, target], 1)[:, 0]
    assert torch.equal(vocab_parallel_linear_cross_entropy(hidden, weight, spread, reduction=reduction), expected)
    row = leaf(hidden.detach()[:1])
    many = vocab_parallel_linear_cross_entropy(row.expand(300, 16), weight, target, reduction=reduction)
    exact = mk.cross_entropy(row.expand(300, 16) @ weight.T, target, reduction=reduction)
    assert error(*(gradients(x, row)[0] for x in (many, exact))) < 1e-13


@by_reduction
def test_results_repeat_bitwise(reduction):
    def once():
        hidden, weight, target = problem(dtype=torch.float32)
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction, **ALL)
        return loss, *gradients(loss, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@by_reduction
def test_compile_without_graph_breaks(reduction):
    hidden, weight, target = problem()

    def loss_of(h, w):
        return vocab_parallel_linear_cross_entropy(h, w, target, reduction=reduction, **ALL)

    def loss_of_logits(x):
        return vocab_parallel_cross_entropy(x, target, reduction=reduction, **ALL)

    logits = leaf((hidden @ weight.T).detach())
    for function, inputs in ((loss_of, (hidden, weight)), (loss_of_logits, (logits,))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        eager = function(*inputs)
        assert error(compiled, eager) < 1e-14
        for found, wanted in zip(gradients(compiled, *inputs), gradients(eager, *inputs), strict=True):
            assert error(found, wanted) < 1e-13


@by_reduction
@pytest.mark.parametrize("name", ["cpu", backend.REFERENCE])
def test_no_token_and_nothing_but_ignored_ones(poisoned, name, reduction):
    for tokens in (0, 5):
        hidden, weight, _ = problem(tokens=tokens)
        target = torch.full((tokens,), -100)
        with mk.use(name):
            loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, reduction=reduction, **ALL)
        assert loss.shape == (target.shape if reduction == "none" else ()) and (loss == 0).all()
        assert all((g == 0).all() for g in gradients(loss, hidden, weight))


def test_inplace_backward():
    x, target = leaf(randn(4, 9, seed=0, dtype=torch.float32)), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="vocab_parallel_cross_entropy: inplace_backward=True needs logits .* got a leaf"):
        vocab_parallel_cross_entropy(x, target, inplace_backward=True)
    with pytest.raises(ValueError, match="vocab_parallel_cross_entropy: inplace_backward=True needs contiguous logits"):
        vocab_parallel_cross_entropy((x * 1).T.contiguous().T, target, inplace_backward=True)
    logits = x * 2
    loss = vocab_parallel_cross_entropy(logits, target, inplace_backward=True)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


BAD_CALLS = [
    ({"reduction": "avg"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
    ({"vocab_size": 6}, ValueError, "the last rank has columns 0 to 4 of vocab_size=6"),
    ({"vocab_start": 1}, ValueError, "vocab_start must be 0 on the first rank, got 1"),
    ({"target": torch.zeros(2)}, RuntimeError, "target must be of an integer dtype, got float32"),
    ({"target": torch.zeros(3, dtype=torch.long)}, RuntimeError, r"without the last dimension, got \[3\]"),
    ({"target": torch.tensor([1, 5])}, RuntimeError, r"target 5 at row 1 is neither ignore_index \(-100\) nor in \[0, 5\)"),
    ({"group": "tp"}, TypeError, "group: expected a ProcessGroup, a DeviceMesh or None, got str"),
]


@pytest.mark.parametrize(("change", "kind", "text"), BAD_CALLS, ids=[next(iter(change)) for change, _, _ in BAD_CALLS])
@pytest.mark.parametrize("name", ["cpu", backend.REFERENCE])
def test_errors(name, change, kind, text):
    options = {"target": torch.tensor([1, 2]), **change}
    who = "" if "group" in change else "vocab_parallel_{}cross_entropy: .*"
    with pytest.raises(kind, match=who.format("") + text), mk.use(name):
        vocab_parallel_cross_entropy(torch.zeros(2, 5), **options)
    with pytest.raises(kind, match=who.format("linear_") + text), mk.use(name):
        vocab_parallel_linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), **options)


def test_hidden_and_weight_that_do_not_fit():
    target = torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match=r"weight must be \[rows, 3\] for hidden \[2, 3\], got \[5, 4\]"):
        vocab_parallel_linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 4), target)
    with pytest.raises(RuntimeError, match="weight must have hidden's dtype float32, got bfloat16"):
        vocab_parallel_linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3, dtype=torch.bfloat16), target)


def test_a_shard_needs_both_its_start_and_the_size():
    """Refused before anything is sent: the group doesn't exist."""
    with pytest.raises(ValueError, match="vocab_start=5 needs vocab_size too, got None"):
        vocab_parallel_cross_entropy(torch.zeros(2, 5), torch.tensor([1, 2]), Group(2, 1), vocab_start=5)
