"""The norm modules under the names of apex and Megatron-LM, against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_kernels import compat

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


def exact(x, weight, bias, dims, rms=False, eps=1e-5):
    axes = tuple(range(-dims, 0))
    if not rms:
        x = x - x.mean(axes, keepdim=True)
    y = x / torch.sqrt(x.square().mean(axes, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def randomise(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5 if name == "weight" else torch.randn_like(p))
    return module


def check(module, x, dtype, dims=1, rms=False, slack=1):
    x = x.detach().requires_grad_()
    parameters = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    y = module(x)
    assert y.dtype == dtype and y.shape == x.shape
    dy = torch.randn_like(y)
    kept = dy.clone()
    grads = torch.autograd.grad(y, [x, *parameters], dy)
    assert torch.equal(dy, kept) and [g.dtype for g in grads] == [t.dtype for t in (x, *parameters)]
    inputs = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    y64 = exact(*[*inputs, None, None][:3], dims, rms)
    tolerance = max(TOLERANCE[t] for t in (x.dtype, dtype)) * slack
    torch.testing.assert_close(y.double(), y64, atol=tolerance, rtol=tolerance)
    for grad, expected in zip(grads, torch.autograd.grad(y64, inputs, dy.double()), strict=True):
        torch.testing.assert_close(grad.double(), expected, atol=8 * tolerance, rtol=8 * tolerance)  # sums of some rows


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("cls", "rms"), [(compat.FusedLayerNorm, False), (compat.FusedRMSNorm, True)])
def test_in_the_inputs_type(cls, rms, dtype, memory_efficient):
    module = randomise(cls(24, 1e-5, True, memory_efficient).to(dtype))
    check(module, torch.randn(2, 5, 24).to(dtype), dtype, rms=rms, slack=2 if memory_efficient else 1)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("cls", "rms"), [(compat.FusedLayerNorm, False), (compat.FusedRMSNorm, True)])
def test_over_two_dimensions(cls, rms, affine, memory_efficient):
    module = randomise(cls((3, 8), elementwise_affine=affine, memory_efficient=memory_efficient))
    assert module.normalized_shape == (3, 8) and [p.shape for p in module.parameters()] == [(3, 8)] * (affine * (2 - rms))
    check(module, torch.randn(4, 3, 8), torch.float32, dims=2, rms=rms, slack=2 if memory_efficient else 1)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize(("x", "parameters"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16),
                                               (torch.float32, torch.float16)])
@pytest.mark.parametrize("cls", [compat.MixedFusedLayerNorm, compat.FastLayerNorm])
def test_in_the_parameters_type(cls, x, parameters, memory_efficient):
    module = randomise(cls(33, memory_efficient=memory_efficient).to(parameters))  # a size that apex's FastLayerNorm has not
    check(module, torch.randn(3, 4, 33).to(x), parameters, slack=2 if memory_efficient else 1)


def test_float32_parameters_beside_a_bfloat16_input():
    check(randomise(compat.FusedLayerNorm(16)), torch.randn(5, 16).bfloat16(), torch.bfloat16)
    check(randomise(compat.FusedRMSNorm(16)), torch.randn(5, 16).bfloat16(), torch.bfloat16, rms=True)


def test_parameters_and_their_first_values():
    for cls in (compat.FusedLayerNorm, compat.MixedFusedLayerNorm, compat.FastLayerNorm, compat.FusedRMSNorm):
        state = cls(6).state_dict()
        assert list(state) == (["weight"] if cls is compat.FusedRMSNorm else ["weight", "bias"])
        assert (state["weight"] == 1).all() and ("bias" not in state or not state["bias"].any())
    assert compat.FastLayerNorm(6).epsilon == compat.FusedLayerNorm(6).eps == 1e-5
    assert list(compat.FusedLayerNorm(6, elementwise_affine=False).parameters()) == []


def test_the_signature_of_megatron():
    module = compat.MixedFusedLayerNorm(12, 1e-6, False, True, True)
    assert module.eps == 1e-6 and all(p.sequence_parallel for p in module.parameters())
    assert not module.weight.any()  # stored minus 1
    x = torch.randn(4, 12)
    torch.testing.assert_close(module(x).double(), exact(x.double(), None, None, 1, eps=1e-6), atol=4e-6, rtol=4e-6)
    assert not any(p.sequence_parallel for p in compat.MixedFusedLayerNorm(12).parameters())


def test_mixed_always_has_parameters():
    with pytest.warns(UserWarning, match="always has weight and bias"):
        compat.MixedFusedLayerNorm(4, elementwise_affine=True)
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match="elementwise_affine must be True, got False"):
            compat.MixedFusedLayerNorm(4, elementwise_affine=False)
    with pytest.raises(TypeError, match="affine"):
        compat.MixedFusedLayerNorm(4, affine=True)


@pytest.mark.parametrize("cls", [compat.FusedLayerNorm, compat.FusedRMSNorm])
def test_input_that_does_not_fit(cls):
    with pytest.raises(RuntimeError, match=r"\(6,\), got shape \(2, 5\)"):
        cls(6)(torch.randn(2, 5))


@pytest.mark.parametrize("cls", [compat.FusedLayerNorm, compat.MixedFusedLayerNorm, compat.FastLayerNorm, compat.FusedRMSNorm])
def test_autocast_decides_the_type(cls):
    module, x = cls(8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert module(x).dtype == torch.float32


def test_memory_efficient_keeps_the_output_and_not_the_input():
    saved = []
    module, x = randomise(compat.FusedLayerNorm(16, memory_efficient=True)), torch.randn(5, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x * 1)
    assert [t.shape for t in saved if t.dim() > 1] == [(5, 16)]
    assert any(t.data_ptr() == y.data_ptr() for t in saved)


@pytest.mark.parametrize("cls", [compat.FusedLayerNorm, compat.MixedFusedLayerNorm, compat.FastLayerNorm, compat.FusedRMSNorm])
def test_compile_without_graph_breaks(cls):
    module, x = randomise(cls(8)), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
