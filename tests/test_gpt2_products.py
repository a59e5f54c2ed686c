"""The model's own arrangements of matrix products: oneDNN's float32, the projection in blocks, attention by blocks of queries."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron_kernels import linear as products
from megatron_kernels.models import GPT2, GPT2Config, blocks


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(function, inputs, dy):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_close_to_exact(function, plain, inputs, limit, dy=None):
    """Output and gradients within limit of the largest element of plain's in float64."""
    exact_inputs = [x.double() for x in inputs]
    dy = randn(*plain(*exact_inputs).shape, seed=9) if dy is None else dy
    found = gradients(function, inputs, dy.to(inputs[0].dtype))
    for value, exact in zip(found, gradients(plain, exact_inputs, dy), strict=True):
        assert value.shape == exact.shape
        assert (value.double() - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(64, 24), (3, 50, 24), (2, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-14), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_linear(monkeypatch, onednn, shape, with_bias, dtype, limit):
    monkeypatch.setattr(products, "_ONEDNN", onednn and products._has_onednn())
    inputs = [randn(*shape, dtype=dtype), randn(40, 24, seed=1, dtype=dtype)]
    if with_bias:
        inputs.append(randn(40, seed=2, dtype=dtype))
    assert_close_to_exact(products.linear, F.linear, inputs, limit)


def test_linear_takes_strided_inputs_and_gradients():
    weight, bias = randn(40, 24, seed=1, dtype=torch.float32), randn(40, seed=2, dtype=torch.float32)
    wide = randn(70, 48, dtype=torch.float32)
    expanded = torch.ones(1, 1, dtype=torch.float64).expand(70, 40)
    for x in (wide[:, ::2], wide[:, 24:], randn(24, 70, dtype=torch.float32).t()):
        for dy in (None, expanded, randn(40, 70, seed=4).t()):
            assert_close_to_exact(products.linear, F.linear, [x, weight, bias], 3e-6, dy)


def test_linear_gives_only_the_gradients_asked_for():
    x, weight = randn(64, 24, dtype=torch.float32), randn(40, 24, seed=1, dtype=torch.float32).requires_grad_()
    products.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(40, 24), rtol=1e-5, atol=1e-5)
    frozen, bias = weight.detach(), randn(40, seed=2, dtype=torch.float32)
    x.requires_grad_()
    products.linear(x, frozen, bias).sum().backward()
    torch.testing.assert_close(x.grad, frozen.sum(0).expand(64, 24), rtol=1e-5, atol=1e-5)
    assert frozen.grad is None and bias.grad is None


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-14), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_projection_in_blocks(monkeypatch, dtype, limit):
    monkeypatch.setattr(products, "_BLOCK", 16)  # 45 rows: two blocks and a piece
    assert_close_to_exact(products.project, F.linear, [randn(30, 24, dtype=dtype), randn(45, 24, seed=1, dtype=dtype)], limit)


def plain_attention(qkv, mask=None, scale=0.3):
    q, k, v = qkv.transpose(1, 2).unbind(3)
    s = q.shape[2]
    masked = torch.ones(s, s, dtype=torch.bool).triu(1)
    masked = masked if mask is None else masked | mask
    probs = (q @ k.mT * scale).masked_fill(masked, -torch.inf).softmax(-1).masked_fill(masked, 0.0)
    return (probs @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("s", [129, 256, 300])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_by_blocks_of_queries(s, padded, dtype, limit):
    mask = None
    if padded:
        mask = torch.zeros(2, 1, 1, s, dtype=torch.bool)
        mask[0, ..., :5] = True
        mask[1, ..., -40:] = True
    qkv = randn(2, s, 3, 3, 8, dtype=dtype)
    assert blocks.applies(qkv) and not blocks.applies(qkv[:, :blocks.BLOCK])
    assert_close_to_exact(lambda x: blocks.causal_attention(x, mask, 0.3, 0.0), lambda x: plain_attention(x, mask), [qkv], limit)


def test_blocks_with_dropout():
    """The backward uses the draws of the forward, and on average nothing changes."""
    qkv = randn(1, 140, 2, 3, 4)

    def draw(x, seed):
        torch.manual_seed(seed)
        return blocks.causal_attention(x, None, 0.3, 0.2)

    assert torch.autograd.gradcheck(lambda x: draw(x, 1)[:, ::20].sum(-1), qkv.requires_grad_(), fast_mode=True)
    with torch.no_grad():
        mean = torch.stack([draw(qkv, seed) for seed in range(300)]).mean(0)
        spread = torch.stack([draw(qkv, seed) for seed in range(30)]).std(0)
        assert ((mean - plain_attention(qkv)).abs() <= 5 * spread / 300**0.5 + 1e-9).all()


def test_a_long_sequence_takes_the_blocks_and_agrees_with_what_does_not(monkeypatch):
    config = GPT2Config(num_layers=2, hidden_size=32, num_attention_heads=2, max_position_embeddings=200, vocab_size=50,
                        hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0, init_method_std=0.3)
    model, ids = GPT2(config, seed=0, dtype=torch.float64), torch.arange(200)[None] % 50
    calls, attention = [], blocks.causal_attention
    monkeypatch.setattr(blocks, "causal_attention", lambda *a: calls.append(1) or attention(*a))
    by_blocks = model(ids)
    assert len(calls) == 2
    torch.testing.assert_close(by_blocks, model(ids, return_attention_probs=True)[0], rtol=1e-10, atol=1e-10)
    assert len(calls) == 2
