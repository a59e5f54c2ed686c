"""Checks of arguments, in the words of the compiled libraries, and what launchers ask about tensors."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape(t: Tensor) -> str:
    return str(list(t.shape))


def rows_of(op: str, argument: str, t: Tensor) -> tuple[int, int]:
    """(rows, columns) of a tensor that an op walks by rows."""
    if t.dtype not in DTYPES:
        if t.dtype == torch.float64:
            raise RuntimeError(f"{op}: {argument} must be float32, float16 or bfloat16 on a GPU, got float64 "
                               "(use('reference') computes it)")
        raise RuntimeError(f"{op}: {argument} must be float32, float16, bfloat16 or float64, got {name(t.dtype)}")
    size = t.shape
    if not size or size[-1] < 1:
        raise RuntimeError(f"{op}: {argument} must have a last dimension of at least 1, got shape {shape(t)}")
    return t.numel() // size[-1], size[-1]


def device(op: str, argument: str, t: Tensor, other: str, like: Tensor) -> None:
    if t.device != like.device:
        raise RuntimeError(f"{op}: {argument} must be on the device of {other} {like.device}, got {t.device}")


def same(op: str, argument: str, t: Tensor, other: str, like: Tensor) -> None:
    """Of the same shape, dtype and device."""
    if t.shape != like.shape:
        raise RuntimeError(f"{op}: {argument} must have the shape of {other} {shape(like)}, got {shape(t)}")
    if t.dtype != like.dtype:
        raise RuntimeError(f"{op}: {argument} must have the dtype of {other} {name(like.dtype)}, got {name(t.dtype)}")
    device(op, argument, t, other, like)


def parameter(op: str, argument: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    """A vector [columns] of x's dtype or float32, contiguous; None stays."""
    if t is None:
        return None
    if t.dim() != 1 or t.shape[0] != x.shape[-1]:
        raise RuntimeError(f"{op}: {argument} must have shape [{x.shape[-1]}], got {shape(t)}")
    if t.dtype != x.dtype and t.dtype != torch.float32:
        raise RuntimeError(f"{op}: {argument} must be {name(x.dtype)} (x's dtype) or float32, got {name(t.dtype)}")
    device(op, argument, t, "x", x)
    return t.contiguous()


def row_values(op: str, argument: str, t: Tensor, rows: int, other: str, like: Tensor) -> Tensor:
    """A float32 per row, contiguous."""
    if t.numel() != rows:
        raise RuntimeError(f"{op}: {argument} must have one value per row ({rows}), got shape {shape(t)}")
    if t.dtype != torch.float32:
        raise RuntimeError(f"{op}: {argument} must be float32, got {name(t.dtype)}")
    device(op, argument, t, other, like)
    return t.contiguous()
