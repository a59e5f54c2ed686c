"""Losses and fusions under the names of Megatron-LM and apex, on one process, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_kernels import compat

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def smoothed(logits, target, share_of_others, share_of_target):
    p = torch.log_softmax(logits, -1)
    at_target = p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -share_of_target * at_target - share_of_others * (p.sum(-1) - at_target)


def megatron64(logits, target, a=0.0):
    """The true class has 1 - a, each of the K - 1 others a / (K - 1): what the comment in Megatron's cross_entropy.py derives."""
    return smoothed(logits, target, a / (logits.shape[-1] - 1), 1 - a)


def apex64(logits, target, a=0.0):
    """a is shared by all K classes."""
    k = logits.shape[-1]
    return smoothed(logits, target, a / k, 1 - a + a / k)


def check(function, exact, logits, ignored):
    x = logits.detach().requires_grad_()
    loss = function(x)
    dloss = torch.randn(loss.shape, dtype=loss.dtype)
    kept = logits.clone(), dloss.clone()
    (dx,) = torch.autograd.grad(loss, x, dloss)
    assert torch.equal(x.detach(), kept[0]) and torch.equal(dloss, kept[1])
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32) and dx.dtype == logits.dtype
    x64 = logits.double().requires_grad_()
    expected = exact(x64).masked_fill(ignored, 0.0)
    (dx64,) = torch.autograd.grad(expected, x64, dloss.double())
    tolerance = TOLERANCE[loss.dtype]
    torch.testing.assert_close(loss.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(dx.double(), dx64, atol=TOLERANCE[logits.dtype], rtol=TOLERANCE[logits.dtype])
    assert not dx[ignored].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocab_parallel_cross_entropy(dtype, smoothing):
    logits, target = 3 * torch.randn(6, 2, 13).to(dtype), torch.randint(13, (6, 2))
    none = torch.zeros(6, 2, dtype=torch.bool)
    check(lambda x: compat.vocab_parallel_cross_entropy(x, target, smoothing), lambda x: megatron64(x, target, smoothing), logits,
          none)
    if not smoothing:
        check(lambda x: compat.fused_vocab_parallel_cross_entropy(x, target, None), lambda x: megatron64(x, target), logits, none)


@pytest.mark.parametrize("padding", [-1, -100])
def test_negative_targets_are_ignored(padding):
    logits, target = torch.randn(6, 2, 13), torch.randint(13, (6, 2))
    target[1:3] = padding
    check(lambda x: compat.vocab_parallel_cross_entropy(x, target), lambda x: megatron64(x, target.clamp(min=0)), logits,
          target < 0)


def test_smoothing_of_logits_far_apart_is_finite():
    logits = torch.tensor([[[0.0, -200.0, -300.0]]])  # probabilities below float32: the logarithm of a softmax is -inf
    check(lambda x: compat.vocab_parallel_cross_entropy(x, torch.tensor([[0]]), 0.1),
          lambda x: megatron64(x, torch.tensor([[0]]), 0.1), logits, torch.zeros(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(AssertionError, match=r"label_smoothing must be in \[0, 1\)"):
        compat.vocab_parallel_cross_entropy(torch.randn(2, 1, 3), torch.zeros(2, 1, dtype=torch.long), smoothing)


def test_target_beyond_the_vocabulary():
    with pytest.raises(RuntimeError, match="13"):
        compat.vocab_parallel_cross_entropy(torch.randn(2, 1, 13), torch.tensor([[13], [0]]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("padding", [0, -100])
def test_softmax_cross_entropy_loss(dtype, smoothing, padding):
    logits, labels = 3 * torch.randn(9, 11).to(dtype), torch.randint(11, (9,))
    labels[2] = padding
    check(lambda x: compat.SoftmaxCrossEntropyLoss.apply(x, labels, smoothing, padding, dtype == torch.float16),
          lambda x: apex64(x, labels.clamp(min=0), smoothing), logits, labels == padding)


def test_padding_index_is_zero_unless_said():
    loss = compat.SoftmaxCrossEntropyLoss.apply(torch.randn(3, 5), torch.tensor([0, 1, 0]))
    assert loss[0] == loss[2] == 0 and loss[1] > 0


def gelu64(x, bias):
    v = x + bias
    return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


@pytest.mark.parametrize(("dtype", "parameters"), [(t, t) for t in TOLERANCE] + [(torch.bfloat16, torch.float32),
                                                                                (torch.float32, torch.bfloat16)])
def test_bias_gelu_impl(dtype, parameters):
    x, bias = torch.randn(4, 3, 10).to(dtype).requires_grad_(), torch.randn(10).to(parameters).requires_grad_()
    y = compat.bias_gelu_impl(x, bias)
    dy = torch.randn_like(y)
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    expected = gelu64(x64, bias64)
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for grad, like, exact in zip(torch.autograd.grad(y, (x, bias), dy), (x, bias),
                                 torch.autograd.grad(expected, (x64, bias64), dy.double()), strict=True):
        tolerance = max(TOLERANCE[dtype], TOLERANCE[like.dtype]) * 4
        assert grad.dtype == like.dtype and grad.shape == like.shape
        torch.testing.assert_close(grad.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_dropout_add(training, with_bias):
    x, bias, residual = torch.randn(4, 6).bfloat16(), torch.randn(6).bfloat16() if with_bias else None, torch.randn(4, 6)
    kept = x.clone(), residual.clone()
    for function in (lambda p: compat.bias_dropout_add(x, bias, residual, p, training),
                     lambda p: compat.get_bias_dropout_add(training, True)((x, bias), residual, p)):
        whole = x.float() + (bias.float() if with_bias else 0)
        assert torch.equal(function(0.0), residual + whole) and function(0.0).dtype == torch.float32
        dropped = function(0.5) - residual
        if training:
            zero = dropped.abs() < 1e-6
            assert zero.any() and not zero.all()
            torch.testing.assert_close(dropped[~zero], 2 * whole[~zero], atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(dropped, whole, atol=1e-6, rtol=1e-5)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])
