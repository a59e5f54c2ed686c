"""FusedScaleMaskSoftmax and its functions, with the arguments that Megatron-LM and apex give them."""

from __future__ import annotations

import enum

import pytest
import torch

from megatron_kernels import compat

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def exact(x, scale=1.0, mask=None):
    z = x.double() * scale
    if mask is None:
        return torch.softmax(z, -1)
    return torch.softmax(z.masked_fill(mask, -torch.inf), -1).nan_to_num(0.0)


def check(function, x, scale, mask):
    """Values and gradients of function(x) against float64; x and the incoming gradient are left as they were."""
    x = x.detach().requires_grad_()
    y = function(x)
    assert y.dtype == x.dtype and y.shape == x.shape
    dy = torch.randn_like(y)
    kept = x.detach().clone(), dy.clone()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(x.detach(), kept[0]) and torch.equal(dy, kept[1])
    p = exact(x.detach(), scale, mask)
    tolerance = {"atol": TOLERANCE[x.dtype] * max(scale, 1), "rtol": TOLERANCE[x.dtype]}
    torch.testing.assert_close(y.double(), p, **tolerance)
    torch.testing.assert_close(dx.double(), scale * p * (dy.double() - (p * dy.double()).sum(-1, keepdim=True)), **tolerance)


def mask_func(scores, mask):
    """As Megatron's attention_mask_func."""
    return scores.masked_fill_(mask, -10000.0)


def causal(sq, sk):
    return torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1)


def module(mask_type=compat.AttnMaskType.padding, fusion=True, scale=None, fp32=True, half=None, **kwargs):
    return compat.FusedScaleMaskSoftmax(half == torch.float16, half == torch.bfloat16, mask_type, fusion, mask_func, fp32, scale,
                                        **kwargs)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_functions(dtype):
    x = torch.randn(2, 3, 6, 6).to(dtype)
    mask = torch.rand(2, 1, 6, 6) < 0.4
    mask[0, 0, 1] = True  # nothing left: zeros
    check(lambda x: compat.ScaledUpperTriangMaskedSoftmax.apply(x, 0.7), x.flatten(0, 1), 0.7, causal(6, 6))
    check(lambda x: compat.ScaledMaskedSoftmax.apply(x, mask, torch.tensor(0.7)), x, 0.7, mask)
    check(lambda x: compat.ScaledMaskedSoftmax.apply(x, mask.to(torch.uint8), 0.7), x, 0.7, mask)
    check(lambda x: compat.ScaledMaskedSoftmax.apply(x, None, 0.7), x, 0.7, None)
    check(lambda x: compat.GenericScaledMaskedSoftmax.apply(x, mask, 0.7), x, 0.7, mask)
    check(lambda x: compat.ScaledSoftmax.apply(x, 0.7), x, 0.7, None)


def test_masks_that_are_not_masks_are_refused():
    with pytest.raises(TypeError, match=r"ScaledMaskedSoftmax: mask must be bool or uint8"):
        compat.ScaledMaskedSoftmax.apply(torch.randn(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 1.0)


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("sq", "sk"), [(6, 6), (1, 6), (3, 7)])
@pytest.mark.parametrize("mask_type", ["padding", "causal"])
@pytest.mark.parametrize("masked", [True, False])
def test_fused_scale_mask_softmax(fusion, dtype, sq, sk, mask_type, masked):
    x = torch.randn(3, 1, sq, sk).to(dtype)  # of sizes that upstream's kernels refuse
    mask = torch.rand(3, 1, sq, sk) < 0.3 if masked else None
    if masked:
        mask[..., 0] = False
    whole = causal(sq, sk) if mask_type == "causal" else torch.zeros(sq, sk, dtype=torch.bool)
    whole = whole if mask is None else whole | mask
    op = module(compat.AttnMaskType[mask_type], fusion, scale=2.0, half=dtype)
    assert op.is_kernel_available(mask, 3, 1, sq, sk) is fusion
    check(lambda x: op(x, mask), x, 2.0, whole)


def test_fully_masked_rows():
    """The op gives zeros. Unfused, mask_func decides: Megatron's gives every key the same."""
    x, mask = torch.randn(1, 1, 2, 4), torch.tensor([[True] * 4, [False] * 4]).reshape(1, 1, 2, 4)
    assert not module()(x, mask)[0, 0, 0].any()
    torch.testing.assert_close(module(fusion=False)(x, mask)[0, 0, 0], torch.full((4,), 0.25))


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("window", [(2, 0), (1, 1), (0, 0), (8, 8)])
def test_window(fusion, window):
    x = torch.randn(2, 3, 5, 7)
    distance = torch.arange(7) - (torch.arange(5).unsqueeze(1) + 2)
    out = (distance < -window[0]) | (distance > window[1])
    op = module(compat.AttnMaskType.causal, fusion, window_size=window)
    check(lambda x: op(x, None), x, 1.0, out)


def test_softmax_offset_takes_part_in_the_denominator():
    x, mask, offset = torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5) < 0.3, torch.randn(3)
    y = module()(x, mask, offset)
    e = torch.exp(x.double()).masked_fill(mask, 0.0)
    e = e / (e.sum(-1, keepdim=True) + offset.double().exp().reshape(1, 3, 1, 1))
    torch.testing.assert_close(y.double(), e, atol=2e-6, rtol=1e-5)


def test_a_mask_that_is_added_is_left_to_mask_func():
    x, bias = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    op = compat.FusedScaleMaskSoftmax(False, False, compat.AttnMaskType.padding, True, torch.add, True, 0.5)
    assert not op.is_kernel_available(bias, *x.shape)
    torch.testing.assert_close(op(x, bias).double(), torch.softmax(0.5 * x.double() + bias.double(), -1), atol=2e-6, rtol=1e-5)
    causal_op = compat.FusedScaleMaskSoftmax(False, False, compat.AttnMaskType.causal, True,
                                             lambda s, m: s.masked_fill(m, -1e4) if m.dtype == torch.bool else s + m, True, None)
    expected = exact(x.double() + bias.double(), 1.0, causal(4, 5))
    torch.testing.assert_close(causal_op(x, bias).double(), expected, atol=2e-6, rtol=1e-5)


def test_enumerations_of_others():
    class TheirMaskType(enum.Enum):
        padding = 7
        causal = 9

    x = torch.randn(1, 2, 4, 4)
    check(lambda x: module(TheirMaskType.causal)(x, None), x, 1.0, causal(4, 4))
    check(lambda x: module(TheirMaskType.padding)(x, None), x, 1.0, None)


@pytest.mark.parametrize("error", [AssertionError, RuntimeError, ValueError])  # Megatron's, apex's, ours
def test_errors(error):
    with pytest.raises(error, match=r"both input_in_fp16 and input_in_bf16"):
        compat.FusedScaleMaskSoftmax(True, True, compat.AttnMaskType.causal, True, mask_func, True, None)
    with pytest.raises(error, match=r"softmax_in_fp32 must be True where scale is given, got scale 2.0"):
        module(scale=2.0, fp32=False)
    with pytest.raises(error, match=r"got shape \(2, 3, 4\)"):
        module()(torch.randn(2, 3, 4), None)


def test_get_batch_per_block_and_positional_arguments_of_apex():
    assert module().get_batch_per_block(128, 128, 2, 4) == compat.FusedScaleMaskSoftmax.get_batch_per_block(8, 64, 1, 1) == 8
    op = compat.FusedScaleMaskSoftmax(False, True, compat.AttnMaskType.causal, True, mask_func, True, 3)
    assert op.input_in_float16 and op.scale == 3 and op.window_size is None


def test_compile_without_graph_breaks():
    op, x, mask = module(compat.AttnMaskType.causal, scale=2.0), torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8) < 0.2
    torch.testing.assert_close(torch.compile(op, fullgraph=True, backend="aot_eager")(x, mask), op(x, mask))
