"""Run by test_wheel.py with the wheel alone: every op, forward and backward, against the float64 reference."""

import sys

import torch

import megatron_kernels as mk


def compare(name, ours, reference, *inputs):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        def gradients(function, dtype, computed, inputs=inputs):
            leaves = [x.to(dtype).to(computed).requires_grad_() if x.is_floating_point() else x for x in inputs]
            output = function(*leaves)
            return output, *torch.autograd.grad(output.float().square().sum(), [x for x in leaves if x.is_floating_point()])

        got, want = gradients(ours, dtype, dtype), gradients(reference, dtype, torch.float64)
        tolerance = 50 * torch.finfo(dtype).eps
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
    print(f"{name}: forward and backward agree")


def main(site):
    assert mk.__file__.startswith(site), f"imported {mk.__file__}, not the wheel in {site}"
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}: {mk.implementations()['cpu'].detail}")
    assert mk.implementations()["cpu"].available, mk.implementations()["cpu"].detail
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 37, 70), torch.randn(70), torch.randn(70)
    compare("scaled_masked_softmax", lambda x: mk.scaled_masked_softmax(x, None, 0.5, True),
            lambda x: mk.reference.scaled_masked_softmax(x, None, 0.5, True), x)
    compare("bias_gelu", mk.bias_gelu, mk.reference.bias_gelu, x, bias)
    compare("layer_norm", mk.layer_norm, mk.reference.layer_norm, x, weight, bias)
    compare("cross_entropy", mk.cross_entropy, mk.reference.cross_entropy, x, torch.randint(70, (3, 37)))


main(sys.argv[1])
