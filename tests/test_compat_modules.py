"""The extension modules that compat.install registers: names, positional orders, what they return and what they leave alone.

Expected values are computed here in float64 with plain PyTorch.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types

import pytest
import torch

from megatron_kernels import compat, use

NAMES = {"scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda", "scaled_softmax_cuda",
         "generic_scaled_masked_softmax_cuda", "fused_layer_norm_cuda", "fused_mix_prec_layer_norm_cuda", "fast_layer_norm",
         "xentropy_cuda"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # a few units of rounding


@pytest.fixture
def modules():
    compat.install()
    yield types.SimpleNamespace(**{name: sys.modules[name] for name in NAMES})
    compat.uninstall()


@pytest.fixture(params=["cpu", "reference"])
def implementation(request):
    with use(request.param):
        yield request.param


def close(actual, expected, scale=1.0):
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[actual.dtype] * scale
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def softmax64(x, scale, mask=None):
    z = x.double() * scale
    return torch.softmax(z if mask is None else z.masked_fill(mask, -torch.inf), -1)


def gradient64(function, inputs, dy):
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*inputs), inputs, dy.double())


def test_importing_compat_imports_neither_megatron_nor_apex():
    code = ("import sys, megatron_kernels.compat\n"
            "bad = [n for n in sys.modules if n.split('.')[0] in ('megatron', 'apex', 'transformers')]\n"
            f"bad += [n for n in {sorted(NAMES)!r} if n in sys.modules]\n"
            "assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_install_and_uninstall():
    before = set(sys.modules)
    assert compat.install() == dict.fromkeys(NAMES, "registered")
    assert set(sys.modules) - before == NAMES and "apex" not in sys.modules
    assert compat.install() == dict.fromkeys(NAMES, "registered")  # the second time changes nothing
    import scaled_masked_softmax_cuda

    assert importlib.util.find_spec("scaled_masked_softmax_cuda") is scaled_masked_softmax_cuda.__spec__
    assert set(compat.uninstall()) == NAMES
    assert not NAMES & set(sys.modules) and compat.uninstall() == []
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("scaled_masked_softmax_cuda")


def test_install_of_some():
    assert compat.install(["xentropy_cuda"]) == compat.install("xentropy_cuda") == {"xentropy_cuda": "registered"}
    assert "fast_layer_norm" not in sys.modules
    assert compat.uninstall() == ["xentropy_cuda"]
    with pytest.raises(ValueError, match="apex"):
        compat.install(["apex"])


def test_what_is_installed_is_not_hidden_unless_asked(tmp_path, monkeypatch):
    (tmp_path / "fast_layer_norm.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = types.ModuleType("xentropy_cuda")
    monkeypatch.setitem(sys.modules, "xentropy_cuda", loaded)
    report = compat.install()
    try:
        assert report.pop("fast_layer_norm") == f"kept: {tmp_path / 'fast_layer_norm.py'}"
        assert report.pop("xentropy_cuda") == "kept: sys.modules"
        assert set(report.values()) == {"registered"}
        assert importlib.import_module("fast_layer_norm").real and sys.modules["xentropy_cuda"] is loaded
        real = sys.modules["fast_layer_norm"]
        assert set(compat.install(replace=True).values()) == {"registered"}
        assert hasattr(importlib.import_module("fast_layer_norm"), "ln_fwd") and sys.modules["xentropy_cuda"] is not loaded
    finally:
        compat.uninstall()
    assert sys.modules["fast_layer_norm"] is real and sys.modules["xentropy_cuda"] is loaded
    del sys.modules["fast_layer_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.3, torch.tensor([0.3])[0]], ids=["float", "tensor"])
def test_causal_softmax(modules, implementation, dtype, scale):
    x, dy = torch.randn(3, 20, 20, dtype=dtype), torch.randn(3, 20, 20, dtype=dtype)
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    y = modules.scaled_upper_triang_masked_softmax_cuda.forward(x, scale)
    assert y.dtype == dtype and not y[:, future].any()
    close(y, softmax64(x, float(scale), future))
    kept = dy.clone()
    dx = modules.scaled_upper_triang_masked_softmax_cuda.backward(dy, y, scale)
    close(dx, gradient64(lambda t: softmax64(t, float(scale), future), [x], dy)[0])
    assert torch.equal(dy, kept) and dx.dtype == dtype  # upstream writes over the incoming gradient


@pytest.mark.parametrize("name", ["scaled_masked_softmax_cuda", "generic_scaled_masked_softmax_cuda"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("batch", [1, 2])
def test_masked_softmax(modules, implementation, name, mask_dtype, batch):
    module = getattr(modules, name)
    x, dy = torch.randn(2, 3, 5, 7).bfloat16(), torch.randn(2, 3, 5, 7).bfloat16()
    mask = torch.rand(batch, 1, 5, 7) < 0.4
    mask[..., 0] = False
    mask[:, :, 2] = True  # a row with nothing left
    y = module.forward(x, mask.to(mask_dtype), torch.tensor(0.5))
    expected = softmax64(x, 0.5, mask).nan_to_num(0.0)
    close(y, expected)
    assert not y[:, :, 2].any()
    dx = module.backward(dy, y, 0.5)
    exact = 0.5 * expected * (dy.double() - (expected * dy.double()).sum(-1, keepdim=True))
    close(dx, exact)
    assert not dx[:, :, 2].any()


def test_masks_of_other_types_are_refused(modules):
    with pytest.raises(TypeError, match=r"mask must be bool or uint8.*float32"):
        modules.scaled_masked_softmax_cuda.forward(torch.randn(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 1.0)


@pytest.mark.parametrize("shape", [(2, 3, 1, 5), (1, 1, 3, 17), (2, 1, 2, 5000)])
def test_softmax_of_shapes_that_upstream_refuses(modules, shape):
    x, dy = torch.randn(shape), torch.randn(shape)
    y = modules.scaled_softmax_cuda.forward(x, 2.0)
    close(y, softmax64(x, 2.0))
    kept = dy.clone()
    close(modules.scaled_softmax_cuda.backward(dy, y, 2.0), gradient64(lambda t: softmax64(t, 2.0), [x], dy)[0], 4)
    assert torch.equal(dy, kept)


def test_scale_is_not_rounded_to_the_inputs_type(modules):
    x, scale = torch.linspace(-90, 90, 64).reshape(1, 1, 2, 32).bfloat16(), 0.3
    assert float(torch.tensor(scale).bfloat16()) != scale
    close(modules.scaled_softmax_cuda.forward(x, scale), softmax64(x, scale))


def test_get_batch_per_block(modules):
    lengths = {17: 8, 32: 8, 100: 8, 128: 8, 129: 4, 4096: 4, 16: 16, 8: 32, 1: 256}  # 128 threads, at most 32 for 1 or 2 rows
    assert {sk: modules.scaled_masked_softmax_cuda.get_batch_per_block(64, sk, 2, 4) for sk in lengths} == lengths


def layer_norm64(x, w, b, eps=1e-5):
    x = x.double()
    y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return y * w.double() + b.double()


def rms_norm64(x, w, eps=1e-5):
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * w.double()


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize(("dtype", "parameters"), [(t, t) for t in [*DTYPES, torch.float64]] + [(torch.bfloat16, torch.float32)])
def test_layer_norm_affine(modules, implementation, dtype, parameters, memory_efficient):
    f = modules.fused_layer_norm_cuda
    x, dy = torch.randn(4, 3, 12).to(dtype), torch.randn(4, 3, 12).to(dtype)
    w, b = (torch.rand(12) + 0.5).to(parameters), torch.randn(12).to(parameters)
    result = f.forward_affine(x, (12,), w, b, 1e-5)
    assert isinstance(result, list)
    y, mean, invvar = result
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert y.dtype == dtype and mean.shape == invvar.shape == (12,) and mean.dtype == invvar.dtype == statistics
    close(y, layer_norm64(x, w, b), 2)
    close(mean, x.double().mean(-1).flatten())
    close(invvar, torch.rsqrt(x.double().var(-1, unbiased=False) + 1e-5).flatten(), 4)
    saved = (None, invvar, y) if memory_efficient else (mean, invvar, x)
    grads = f.backward_affine(dy, *saved, (12,), w, b, 1e-5, memory_efficient)
    assert isinstance(grads, list) and [g.dtype for g in grads] == [dtype, parameters, parameters]
    slack = 20 if memory_efficient else 8  # the output is rounded before it is undone; sums of 12 rows
    for grad, expected in zip(grads, gradient64(layer_norm64, [x, w, b], dy), strict=True):
        assert grad.shape == expected.shape
        tolerance = TOLERANCE[dtype] * slack
        torch.testing.assert_close(grad.double(), expected, atol=tolerance, rtol=tolerance)


def test_layer_norm_over_two_dimensions_and_without_parameters(modules, implementation):
    f = modules.fused_layer_norm_cuda
    x, dy = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    w, b = torch.rand(3, 4), torch.randn(3, 4)
    exact = lambda x, w, b: layer_norm64(x.flatten(1), w.flatten(), b.flatten()).reshape(5, 3, 4)  # noqa: E731
    y, mean, invvar = f.forward_affine(x, [3, 4], w, b, 1e-5)
    close(y, exact(x, w, b), 2)
    for grad, expected in zip(f.backward_affine(dy, mean, invvar, x, [3, 4], w, b, 1e-5),  # before apex had memory_efficient
                              gradient64(exact, [x, w, b], dy), strict=True):
        close(grad, expected, 8)
    y, mean, invvar = f.forward(x, (4,), 1e-5)
    one, zero = torch.ones(4), torch.zeros(4)
    close(y, layer_norm64(x, one, zero), 2)
    expected = gradient64(lambda x: layer_norm64(x, one, zero), [x], dy)[0]
    close(f.backward(dy, mean, invvar, x, (4,), 1e-5, False), expected, 40)
    close(f.backward(dy, None, invvar, y, (4,), 1e-5, True), expected, 40)


@pytest.mark.parametrize("name", ["fused_layer_norm_cuda", "fused_mix_prec_layer_norm_cuda", "fast_layer_norm"])
@pytest.mark.parametrize(("dtype", "parameters"), [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_types_give_the_parameters_type(modules, name, dtype, parameters):
    x, w, b = torch.randn(6, 10).to(dtype), (torch.rand(10) + 0.5).to(parameters), torch.randn(10).to(parameters)
    dy = torch.randn(6, 10).to(parameters)
    module = getattr(modules, name)
    if name == "fast_layer_norm":
        y, mean, invvar = module.ln_fwd(x, w, b, 1e-5)
        *grads, dgamma_part, dbeta_part = module.ln_bwd(dy, x, mean, invvar, w, None, False)
        assert torch.equal(dgamma_part.sum(0).to(parameters), grads[1]) and torch.equal(dbeta_part.sum(0).to(parameters), grads[2])
    else:
        forward = module.forward_affine_mixed_dtypes if name == "fused_layer_norm_cuda" else module.forward_affine
        y, mean, invvar = forward(x, (10,), w, b, 1e-5)
        grads = module.backward_affine(dy, mean, invvar, x, (10,), w, b, 1e-5)
    assert y.dtype == parameters and mean.dtype == torch.float32
    close(y, layer_norm64(x, w, b), 2)
    for grad, like, expected in zip(grads, (x, w, b), gradient64(layer_norm64, [x, w, b], dy), strict=True):
        assert grad.dtype == like.dtype
        close(grad, expected, 8)


def test_fast_layer_norm_from_the_output(modules):
    x, w, b, dy = torch.randn(6, 10), torch.rand(10) + 0.5, torch.randn(10), torch.randn(6, 10)
    y, _, invvar = modules.fast_layer_norm.ln_fwd(x, w, b, 1e-5)
    grads = modules.fast_layer_norm.ln_bwd(dy, y, None, invvar, w, b, True)
    assert len(grads) == 5
    for grad, expected in zip(grads[:3], gradient64(layer_norm64, [x, w, b], dy), strict=True):
        close(grad, expected, 20)
    with pytest.raises(RuntimeError, match=r"mean is None"):
        modules.fast_layer_norm.ln_bwd(dy, x, None, invvar, w, b, False)


def test_memory_efficient_with_a_zero_weight_is_finite(modules):
    x, w, b, dy = torch.randn(6, 4), torch.tensor([1.0, 0.0, -0.0, -2.0]), torch.randn(4), torch.randn(6, 4)
    f = modules.fused_layer_norm_cuda
    y, _, invvar = f.forward_affine(x, (4,), w, b, 1e-5)
    dx, dw, _ = f.backward_affine(dy, None, invvar, y, (4,), w, b, 1e-5, True)
    assert dx.isfinite().all() and dw.isfinite().all()
    exact = gradient64(layer_norm64, [x, w, b], dy)
    close(dw[[0, 3]], exact[1][[0, 3]], 40)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(modules, dtype, memory_efficient):
    f = modules.fused_layer_norm_cuda
    x, w, dy = torch.randn(4, 3, 12).to(dtype), (torch.rand(12) + 0.5).to(dtype), torch.randn(4, 3, 12).to(dtype)
    y, invvar = f.rms_forward_affine(x, (12,), w, 1e-5)
    assert y.dtype == dtype and invvar.shape == (12,) and invvar.dtype == torch.float32
    close(y, rms_norm64(x, w), 2)
    grads = f.rms_backward_affine(dy, invvar, y if memory_efficient else x, (12,), w, 1e-5, memory_efficient)
    for grad, expected in zip(grads, gradient64(rms_norm64, [x, w], dy), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected, atol=TOLERANCE[dtype] * 20, rtol=TOLERANCE[dtype] * 20)
    one = torch.ones(12)
    y, invvar = f.rms_forward(x, (12,), 1e-5)
    close(y, rms_norm64(x, one), 2)
    expected = gradient64(lambda x: rms_norm64(x, one), [x], dy)[0]
    close(f.rms_backward(dy, invvar, y if memory_efficient else x, (12,), 1e-5, memory_efficient), expected, 20)
    y, _ = f.rms_forward_affine_mixed_dtypes(x, (12,), w.float(), 1e-5)
    assert y.dtype == torch.float32
    close(y, rms_norm64(x, w), 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda f: f.forward(torch.randn(2, 3), (), 1e-5), r"normalized_shape must name at least one dimension"),
    (lambda f: f.forward(torch.randn(2, 3), (4,), 1e-5), r"normalized_shape \(4,\), got shape \(2, 3\)"),
    (lambda f: f.forward_affine(torch.randn(2, 3), (3,), torch.ones(4), torch.ones(3), 1e-5), r"\(3,\) of normalized_sh.*\(4,\)")])
def test_shapes_that_do_not_fit_are_refused(modules, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(modules.fused_layer_norm_cuda)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_xentropy(modules, implementation, dtype, smoothing):
    logits, labels, dloss = 3 * torch.randn(6, 11).to(dtype), torch.randint(11, (6,)), torch.randn(6)
    labels[0] = 0  # a class like the others here
    def exact(logits):
        p = torch.log_softmax(logits, -1)
        return -(1 - smoothing) * p[torch.arange(6), labels] - smoothing * p.mean(-1)
    kept = dloss.clone(), logits.clone()
    result = modules.xentropy_cuda.forward(logits, labels, smoothing, dtype == torch.float16)
    assert isinstance(result, list)
    losses, lse = result
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.dtype == lse.dtype == wide and losses.shape == lse.shape == (6,)
    close(losses, exact(logits.double()), 4)
    close(lse, logits.double().logsumexp(-1), 4)
    dlogits = modules.xentropy_cuda.backward(dloss, logits, lse, labels, smoothing)
    assert dlogits.dtype == dtype
    close(dlogits, gradient64(exact, [logits], dloss)[0])
    assert torch.equal(dloss, kept[0]) and torch.equal(logits, kept[1])
