"""A program takes a tile of neighbouring columns and rows, so that its piece of the bias is loaded once and stays in registers.

The forward reads x and writes y (2T bytes per element). The backward's programs are as many as run at once; each walks down its
columns, writes dx and keeps the sum of what it wrote (3T), and a second kernel adds up the programs' sums: no atomics, and so the
same bits every time.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

OP = "bias_gelu"
PROGRAMS = 5  # of the backward that run at once on a multiprocessor
SUMS = (64, 32)  # tile of column_sums_kernel
LOG2E = tl.constexpr(1.44269504088896340736)


@functools.lru_cache
def configuration(cols: int, size: int, inputs: int) -> tuple[int, int, int]:
    """(rows, columns) of a tile and warps of its program, for rows of `cols` elements of `size` bytes.

    A thread loads 64 bytes of the inputs at once, on GPUs with warps of 32. 256 16-bit elements of a row are a 16-byte packet for
    every thread of a warp, and a narrow tile has few columns beyond the last.
    """
    elements, width = 128 * 64 // (size * inputs), min(256, triton.next_power_of_2(cols))
    if elements // width * cols >= 2**31:  # positions in a tile have 32 bits
        width = elements
    return elements // width, width, 4


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs of the backward run at once; a few where they are interpreted one by one."""
    return PROGRAMS * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2)


# Formulas: csrc/scalar.h says why they are written so. tl.where keeps a NaN, which tl.minimum and tl.maximum do not.
@triton.jit
def at_least(v, low):
    return tl.where(v < low, low, v)


@triton.jit
def at_most(v, high):
    return tl.where(v > high, high, v)


@triton.jit
def exp_minus_2u(v):
    """exp(-2u), u = sqrt(2/pi) (v + 0.044715 v^3)"""
    ALPHA: tl.constexpr = 0.79788456080286535588
    return tl.exp2(v * (-2 * ALPHA * LOG2E + (-2 * ALPHA * 0.044715 * LOG2E) * (v * v)))


@triton.jit
def gauss_tail(a):
    """exp(-a^2/2) / 2 and exp(a^2/2) erfc(a / sqrt 2): their product is Phi(-a) with its full relative accuracy."""
    t = 1.0 / (1.0 + (0.35 * 0.70710678118654752440) * a)
    p = 0.0650749215 * t - 0.392204257
    p = p * t + 0.820446426
    p = p * t - 0.713561407
    p = p * t + 0.649497983
    p = p * t - 0.0621893391
    p = p * t + 0.248029448
    p = p * t + 0.186363656
    p = p * t + 0.198592276
    return tl.exp2((a * a) * (-0.5 * LOG2E) - 1.0), p * t - 4.97254800e-5


@triton.jit
def gelu(v, TANH: tl.constexpr):
    if TANH:
        low = at_least(v, -9.4)  # the sigmoid is 0 from there on, and 1 beyond 9.4
        y = low / (1.0 + exp_minus_2u(at_most(low, 9.4)))
    else:
        a = at_most(tl.abs(v), 15.0)
        half, erfcx = gauss_tail(a)
        y = at_least(v, 0.0) - a * (half * erfcx)
    return y


@triton.jit
def dgelu(v, TANH: tl.constexpr):
    if TANH:
        ALPHA: tl.constexpr = 0.79788456080286535588
        v = at_most(at_least(v, -9.4), 9.4)
        e = exp_minus_2u(v)
        s = 1.0 / (1.0 + e)  # 1 - s = e * s without cancellation
        d = s + s * s * e * v * (2 * ALPHA + (6 * ALPHA * 0.044715) * (v * v))
    else:
        a = at_most(tl.abs(v), 15.0)
        half, erfcx = gauss_tail(a)
        tail = half * (erfcx - (2 * 0.39894228040143267794) * a)
        d = tl.where(v < 0.0, tail, 1.0 - tail)
    return d


@triton.jit
def tile_columns(tile, cols, COLS: tl.constexpr):
    """The first column of a tile, the columns counted from there, and which of them there are."""
    first = tile.to(tl.int64) * COLS
    j = tl.arange(0, COLS)
    return first, j, first + j < cols


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(x, bias, y, rows, cols, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    tiles = tl.cdiv(cols, COLS)
    column, j, inside = tile_columns(tl.program_id(0) % tiles, cols, COLS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)
    at = i[:, None] * cols + j[None, :]
    mask = (row + i < rows)[:, None] & inside[None, :]
    start = row * cols + column
    b = tl.load(bias + column + j, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + start + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(y + start + at, gelu(v + b[None, :], TANH), mask=mask)


@triton.jit(do_not_specialize=["rows", "splits"])
def backward_kernel(dy, x, bias, dx, sums, rows, cols, splits, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Every splits-th tile of some columns, and the sums [splits, cols] over these tiles."""
    tiles = tl.cdiv(cols, COLS)
    column, j, inside = tile_columns(tl.program_id(0) % tiles, cols, COLS)
    split = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.arange(0, ROWS)
    at = i[:, None] * cols + j[None, :]
    b = tl.load(bias + column + j, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for row in range(split * ROWS, rows, splits * ROWS):
        mask = (row + i < rows)[:, None] & inside[None, :]
        start = row * cols + column
        d = tl.load(dy + start + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        v = tl.load(x + start + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        d *= dgelu(v + b[None, :], TANH)
        total += d
        tl.store(dx + start + at, d, mask=mask)
    tl.store(sums + split * cols + column + j, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def column_sums_kernel(sums, out, parts, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    column, j, inside = tile_columns(tl.program_id(0), cols, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for part in range(0, parts, ROWS):
        i = part + tl.arange(0, ROWS)
        at = i.to(tl.int64)[:, None] * cols + j[None, :]
        total += tl.load(sums + column + at, mask=(i < parts)[:, None] & inside[None, :], other=0.0)
    tl.store(out + column + j, tl.sum(total, 0), mask=inside)


def bias_gelu_forward(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    rows, cols = checks.rows_of(OP, "x", x)
    b = checks.parameter(OP, "bias", bias, x)
    x = x.contiguous()
    y = torch.empty_like(x)
    if rows:
        tile_rows, tile_cols, warps = configuration(cols, x.element_size(), 1)
        grid = -(-rows // tile_rows) * -(-cols // tile_cols)
        forward_kernel[(grid,)](x, b, y, rows, cols, tanh, tile_rows, tile_cols, num_warps=warps)
    return y


def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    rows, cols = checks.rows_of(OP, "x", x)
    checks.same(OP, "dy", dy, "x", x)
    b = checks.parameter(OP, "bias", bias, x)
    dy, x = dy.contiguous(), x.contiguous()
    dx, dbias = torch.empty_like(x), torch.empty_like(bias.contiguous())
    if not rows:
        return dx, dbias.zero_()
    tile_rows, tile_cols, warps = configuration(cols, x.element_size(), 2)
    tiles = -(-cols // tile_cols)
    splits = max(1, min(programs(x.device) // tiles, -(-rows // tile_rows)))
    sums = dbias if splits == 1 else torch.empty((splits, cols), dtype=torch.float32, device=x.device)
    backward_kernel[(tiles * splits,)](dy, x, b, dx, sums, rows, cols, splits, tanh, tile_rows, tile_cols, num_warps=warps)
    if splits > 1:
        column_sums_kernel[(-(-cols // SUMS[1]),)](sums, dbias, splits, cols, *SUMS, num_warps=4)
    return dx, dbias


def compilations() -> list[tuple]:
    """(kernel, signature, constexprs, num_warps, label) of what launches use at some row lengths."""
    found: list[tuple] = []
    for size, element in ((4, "*fp32"), (2, "*bf16")):
        forward = {"x": element, "bias": element, "y": element, "rows": "i32", "cols": "i32"}
        backward = {"dy": element, "x": element, "bias": element, "dx": element, "sums": "*fp32", "rows": "i32", "cols": "i32",
                    "splits": "i32"}
        for cols in (64, 1024, 4096, 16384):
            for inputs, kernel, signature in ((1, forward_kernel, forward), (2, backward_kernel, backward)):
                rows, width, warps = configuration(cols, size, inputs)
                for tanh in (True, False):
                    label = f"{kernel.__name__}, {cols} columns of {element[1:]}, {'tanh' if tanh else 'erf'}"
                    found.append((kernel, signature, {"TANH": tanh, "ROWS": rows, "COLS": width}, warps, label))
        sums = {"sums": "*fp32", "out": element, "parts": "i32", "cols": "i32"}
        found.append((column_sums_kernel, sums, {"ROWS": SUMS[0], "COLS": SUMS[1]}, 4, f"column_sums_kernel, {element[1:]}"))
    return found
