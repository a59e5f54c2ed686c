"""Inputs, memory layouts and error bounds shared by the op tests.

A bound is a float64 tensor: the error allowed at each element. It is built from eps of the output's dtype for the final rounding
and eps of the accumulation dtype for the arithmetic before it, times the magnitudes that the formula adds up.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_kernels import backend

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTERPRETED = False  # whether it is Triton's interpreter, where a program's every step costs tens of microseconds; the same
FLOAT64 = True  # whether the implementation under test computes it; set by the fixture `implementation`
ROWS_COLS = [(1, 1), (3, 1), (1, 7), (5, 16), (7, 33), (4, 127), (130, 9), (3, 1024), (2, 1025), (2, 5003)]
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

rows_cols = st.tuples(st.integers(0, 40), st.one_of(st.integers(1, 70), st.integers(1, 1300)))
seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)


def trimmed(full, small):
    """`small` where the implementation under test is interpreted and `full` would take too long there, else `full`."""
    return small if INTERPRETED else full


def supported(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 where the implementation under test does not compute float64."""
    return dtype if FLOAT64 or dtype != torch.float64 else torch.float32


def raw(op: str):
    """The raw ops of the implementation under test."""
    return backend.namespace(backend.choose(op, torch.empty(0)))


def rand(*shape: int, seed: int) -> torch.Tensor:
    """Uniform values in [0, 1), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, device="cpu").to(torch.get_default_device())


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def acc_eps(dtype: torch.dtype) -> float:
    return eps(torch.float64 if dtype == torch.float64 else torch.float32)


def randn(*shape: int, seed: int, dtype: torch.dtype, outliers: bool = True) -> torch.Tensor:
    """Normal values with a few thirty times as large planted among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    if outliers and x.numel() > 3:
        at = torch.randint(x.numel(), (max(1, x.numel() // 50),), generator=generator, device="cpu")
        x.view(-1)[at] *= 30
    return x.to(torch.get_default_device(), dtype)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values with the last dimension not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else torch.stack([x, x], -1)[..., 0]


def padded(x: torch.Tensor) -> torch.Tensor:
    """The same values as columns of a wider tensor."""
    return torch.cat([x, torch.full_like(x[..., :1], torch.nan if x.is_floating_point() else 0)], -1)[..., :-1]


def expanded(x: torch.Tensor) -> torch.Tensor:
    """The first row of x with stride 0 over the rows."""
    return x[:1].expand_as(x) if x.dim() > 1 else x


LAYOUTS = {"misaligned": misaligned, "transposed": transposed, "padded": padded, "expanded": expanded}


def leaf(x: torch.Tensor) -> torch.Tensor:
    """x as it lies in memory, as a leaf that wants a gradient."""
    return x.detach().requires_grad_()


def wide(x: torch.Tensor | None) -> torch.Tensor | None:
    """A float64 leaf with x's values."""
    return None if x is None else x.detach().double().clone().requires_grad_()


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float, what: str,
                  dtype: torch.dtype | None = None) -> None:
    """|actual - expected| <= bound everywhere, NaN where and only where NaN is expected, in the given dtype."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert dtype is None or actual.dtype == dtype, f"{what}: dtype {actual.dtype}, expected {dtype}"
    if actual.numel() == 0:
        return
    a, e = actual.detach().double(), expected.detach().double()
    assert torch.equal(a.isnan(), e.isnan()), f"{what}: NaN at other positions than expected"
    excess = ((a - e).abs() - bound).nan_to_num(0.0)
    worst = int(excess.argmax())
    seen, wanted = a.reshape(-1)[worst].item(), e.reshape(-1)[worst].item()
    assert excess.max() <= 0, (f"{what}: {seen} at flat index {worst}, expected {wanted}, beyond the bound by "
                               f"{excess.max().item():.3g}")


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its biases and norms no longer at their initial values, so that a forgotten one shows."""
    draws = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64).to(parameter.dtype)
    return model
