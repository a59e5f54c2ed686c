"""layer_norm in Triton. The trick: a row is one tile that stays in registers, so mean and variance take a pass each over one read.

Forward moves 2T bytes per element, T being an element's size; a row beyond 16384 columns gets both statistics from one pass
(Welford, in every lane) and is read again for y: 3T. Backward moves 3T: a persistent grid of programs, each of which adds up
dweight and dbias in registers while it computes dx, and leaves one partial row of either; a second kernel adds those up, always in
the same order. Beyond 8192 columns these are divided among programs too, after a kernel that reads x and dy for the two means that
dx needs: 5T.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

OP = "layer_norm"


class Tile(NamedTuple):
    """What a program holds at once: `rows` x `columns` elements, powers of two, and the warps that share them."""

    rows: int
    columns: int
    warps: int


def plan(cols: int, elements: int, longest: int) -> Tile:
    """The tile for rows of `cols`, of about `elements`: whole rows up to `longest`, else one row's part. Few elements per thread
    leave registers for many warps; more than 16 warps AMD's wavefronts of 64 do not allow."""
    columns = max(16, triton.next_power_of_2(cols)) if cols <= longest else elements
    rows = max(1, elements // columns)
    return Tile(rows, columns, min(16, max(4, rows * columns // 512)))


@cache
def forward_plan(cols: int) -> Tile:
    return plan(cols, 2048, 16384)


@cache
def backward_plan(cols: int) -> Tile:
    """The longest rows: x, dy and the sums of either take half of a multiprocessor's registers."""
    return plan(cols, 4096, 8192)


@cache
def sums_plan(parts: int) -> Tile:
    """Of the kernel that adds up partial rows: as many programs as possible, but 128 bytes of a row for each."""
    rows = min(256, max(16, triton.next_power_of_2(parts)))
    return Tile(rows, 8192 // rows, 8)


@triton.jit
def row_offsets(rows, cols, first, ROWS: tl.constexpr):
    """Where rows begin, [ROWS, 1], and which exist. In 64 bits: x may have more than 2^31 elements."""
    row = first + tl.arange(0, ROWS)[:, None]
    return row, row * cols, row < rows


@triton.jit
def normalised(v, mean, rstd, weight, bias, column, exists):
    """y of a tile."""
    v = (v - mean) * rstd
    if weight is not None:
        v *= tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    return v


@triton.jit
def layer_norm_forward_kernel(x, weight, bias, y, means, rstds, rows, cols, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, begin, is_row = row_offsets(rows, cols, tl.program_id(0).to(tl.int64) * ROWS, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    exists = is_row & (column < cols)
    v = tl.load(x + begin + column, mask=exists, other=0.0, eviction_policy="evict_first").to(tl.float32)
    # Correctly rounded: the mean of equal values is that value, and their row has no variance.
    mean = tl.math.div_rn(tl.sum(v, 1, keep_dims=True), cols * 1.0)
    centred = tl.where(exists, v - mean, 0.0)
    rstd = tl.math.rsqrt(tl.math.div_rn(tl.sum(centred * centred, 1, keep_dims=True), cols * 1.0) + eps)
    tl.store(means + row, mean, mask=is_row)
    tl.store(rstds + row, rstd, mask=is_row)
    out = normalised(v, mean, rstd, weight, bias, column, column < cols)
    tl.store(y + begin + column, out, mask=exists, eviction_policy="evict_first")


@triton.jit
def layer_norm_forward_long_kernel(x, weight, bias, y, means, rstds, cols, eps, BLOCK: tl.constexpr):
    """One row per program, in parts. Each lane has the mean and the squares about it of the values it saw."""
    row = tl.program_id(0).to(tl.int64)
    x += row * cols
    y += row * cols
    lane = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    count = 0.0
    for start in range(0, cols, BLOCK):
        exists = start + lane < cols
        v = tl.load(x + start + lane, mask=exists, other=0.0, eviction_policy="evict_last").to(tl.float32)
        count += 1.0
        shift = tl.where(exists, v - mean, 0.0)
        mean += shift * tl.math.div_rn(1.0, count)
        squares += tl.where(exists, shift * (v - mean), 0.0)
    counts = ((cols - lane + BLOCK - 1) // BLOCK).to(tl.float32)  # as many as this lane saw
    whole = tl.math.div_rn(tl.sum(counts * mean, 0), cols * 1.0)
    squares += counts * (mean - whole) * (mean - whole)
    rstd = tl.math.rsqrt(tl.math.div_rn(tl.sum(squares, 0), cols * 1.0) + eps)
    tl.store(means + row, whole)
    tl.store(rstds + row, rstd)
    for start in range(0, cols, BLOCK):
        column = start + lane
        v = tl.load(x + column, mask=column < cols, other=0.0, eviction_policy="evict_first").to(tl.float32)
        out = normalised(v, whole, rstd, weight, bias, column, column < cols)
        tl.store(y + column, out, mask=column < cols, eviction_policy="evict_first")


@triton.jit
def backward_terms(dy, x, weight, mean, rstd, column, exists, is_column, POLICY: tl.constexpr):
    """dy, g = dy weight and xhat of a tile, all 0 where there is no element: (0 - mean) rstd may be infinite, 0 times that NaN."""
    d = tl.load(dy + column, mask=exists, other=0.0, eviction_policy=POLICY).to(tl.float32)
    v = tl.load(x + column, mask=exists, other=0.0, eviction_policy=POLICY).to(tl.float32)
    g = d
    if weight is not None:
        g = d * tl.load(weight + column, mask=is_column, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return d, g, tl.where(exists, (v - mean) * rstd, 0.0)


@triton.jit
def layer_norm_backward_means_kernel(dy, x, weight, means, rstds, row_means, cols, BLOCK: tl.constexpr):
    """Of every row, one per program, the means of g = dy weight and of g xhat: [rows, 2]."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(means + row)
    rstd = tl.load(rstds + row)
    sums = tl.zeros([BLOCK], tl.float32)
    dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        column = start + tl.arange(0, BLOCK)
        exists = column < cols
        _, g, xhat = backward_terms(dy + row * cols, x + row * cols, weight, mean, rstd, column, exists, exists, "evict_last")
        sums += g
        dots += g * xhat
    tl.store(row_means + row * 2, tl.sum(sums, 0) / cols)
    tl.store(row_means + row * 2 + 1, tl.sum(dots, 0) / cols)


@triton.jit
def layer_norm_backward_kernel(dy, x, weight, means, rstds, row_means, dx, partials, rows, cols, DWEIGHT: tl.constexpr,
                               DBIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = rstd (g - mean(g) - xhat mean(g xhat)), and into partials, [programs, DWEIGHT + DBIAS, cols], this program's sums of
    dy xhat and of dy. A tile has whole rows, or some of their columns where the rows' means are given."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, rows, tl.num_programs(0) * ROWS):
        row, begin, is_row = row_offsets(rows, cols, first, ROWS)
        exists = is_row & (column < cols)
        mean = tl.load(means + row, mask=is_row, other=0.0)
        rstd = tl.load(rstds + row, mask=is_row, other=0.0)
        d, g, xhat = backward_terms(dy + begin, x + begin, weight, mean, rstd, column, exists, column < cols, "evict_first")
        if row_means is None:
            sum_mean = tl.sum(g, 1, keep_dims=True) / cols
            dot_mean = tl.sum(g * xhat, 1, keep_dims=True) / cols
        else:
            sum_mean = tl.load(row_means + row * 2, mask=is_row, other=0.0)
            dot_mean = tl.load(row_means + row * 2 + 1, mask=is_row, other=0.0)
        dweight += d * xhat
        dbias += d
        tl.store(dx + begin + column, rstd * (g - sum_mean - xhat * dot_mean), mask=exists, eviction_policy="evict_first")
    partials += tl.program_id(0).to(tl.int64) * (DWEIGHT + DBIAS) * cols + column
    if DWEIGHT:
        tl.store(partials, tl.sum(dweight, 0, keep_dims=True), mask=column < cols)
    if DBIAS:
        tl.store(partials + DWEIGHT * cols, tl.sum(dbias, 0, keep_dims=True), mask=column < cols)


@triton.jit
def column_sums(partials, stride, out, parts, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)[:, None]
        sums += tl.load(partials + part.to(tl.int64) * stride + column, mask=(part < parts) & (column < cols), other=0.0)
    tl.store(out + column, tl.sum(sums, 0, keep_dims=True), mask=column < cols)


@triton.jit
def layer_norm_parameters_kernel(partials, dweight, dbias, parts, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums over the programs' partial rows, a pair of rows each where both are wanted."""
    if dweight is None:
        column_sums(partials, cols, dbias, parts, cols, ROWS, BLOCK)
    elif dbias is None:
        column_sums(partials, cols, dweight, parts, cols, ROWS, BLOCK)
    else:
        column_sums(partials, cols * 2, dweight, parts, cols, ROWS, BLOCK)
        column_sums(partials + cols, cols * 2, dbias, parts, cols, ROWS, BLOCK)


@cache
def multiprocessors(index: int | None) -> int:
    return 4 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = checks.rows_of(OP, "x", x)
    weight, bias = checks.parameter(OP, "weight", weight, x), checks.parameter(OP, "bias", bias, x)
    x = x.contiguous()
    y = torch.empty_like(x)
    # Sizes one by one: a tuple of them takes a microsecond longer.
    mean = x.new_empty(*x.shape[:-1], dtype=torch.float32) if x.dim() > 1 else x.new_empty((), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows:
        tile = forward_plan(cols)
        if cols <= tile.columns:
            layer_norm_forward_kernel[(-(-rows // tile.rows),)](
                x, weight, bias, y, mean, rstd, rows, cols, eps, tile.rows, tile.columns, num_warps=tile.warps)
        else:
            layer_norm_forward_long_kernel[(rows,)](
                x, weight, bias, y, mean, rstd, cols, eps, tile.columns, num_warps=tile.warps)
    return y, mean, rstd


def layer_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
                        rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    checks.same(OP, "dy", dy, "x", x)
    rows, cols = checks.rows_of(OP, "x", x)
    mean, rstd = checks.row_values(OP, "mean", mean, rows, "x", x), checks.row_values(OP, "rstd", rstd, rows, "x", x)
    weight, bias = checks.parameter(OP, "weight", weight, x), checks.parameter(OP, "bias", bias, x)
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    tile = backward_plan(cols)
    divided = -(-cols // tile.columns)
    parts = min(-(-rows // tile.rows), max(1, multiprocessors(x.device.index) * (16 // tile.warps) // divided))
    sums = (weight is not None) + (bias is not None)
    partials = x.new_empty(parts, sums, cols, dtype=torch.float32)
    if rows:
        row_means = None
        if divided > 1:
            row_means = x.new_empty(rows, 2, dtype=torch.float32)
            layer_norm_backward_means_kernel[(rows,)](
                dy, x, weight, mean, rstd, row_means, cols, tile.columns // 2, num_warps=tile.warps)
        layer_norm_backward_kernel[(parts, divided)](
            dy, x, weight, mean, rstd, row_means, dx, partials, rows, cols, weight is not None, bias is not None, tile.rows,
            tile.columns, num_warps=tile.warps)
    if sums:
        tile = sums_plan(parts)
        layer_norm_parameters_kernel[(-(-cols // tile.columns),)](
            partials, dweight, dbias, parts, cols, tile.rows, tile.columns, num_warps=tile.warps)
    return dx, x.new_empty(0) if dweight is None else dweight, x.new_empty(0) if dbias is None else dbias


def compilations() -> list[tuple[Any, dict[str, str], dict[str, Any], int, str]]:
    """The kernels as they are launched for short, usual and long rows: (kernel, signature, constexprs, warps, label)."""
    found = []

    def add(kernel: Any, label: str, types: dict[str, str], warps: int, **constants: Any) -> None:
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        found.append((kernel, signature, constants, warps, f"{kernel.__name__.removesuffix('_kernel')} {label}"))

    def types_of(element: str, parameter: str) -> dict[str, str]:
        return {**dict.fromkeys(("x", "y", "dy", "dx"), f"*{element}"), **dict.fromkeys(("weight", "bias", "dweight", "dbias"),
                f"*{parameter}"), **dict.fromkeys(("means", "rstds", "row_means", "partials"), "*fp32"), "eps": "fp32",
                **dict.fromkeys(("rows", "cols", "parts"), "i32")}

    for element, parameter in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")):
        types, name = types_of(element, parameter), element if element == parameter else f"{element} with {parameter} weight"
        for cols in (64, 1024, 4096, 8192, 16384, 32768):
            label, tile = f"{name} {cols}", forward_plan(cols)
            if cols <= tile.columns:
                add(layer_norm_forward_kernel, label, types, tile.warps, ROWS=tile.rows, BLOCK=tile.columns)
            else:
                add(layer_norm_forward_long_kernel, label, types, tile.warps, BLOCK=tile.columns)
            tile = backward_plan(cols)
            constants: dict[str, Any] = {"DWEIGHT": True, "DBIAS": True, "ROWS": tile.rows, "BLOCK": tile.columns}
            if cols > tile.columns:
                add(layer_norm_backward_means_kernel, label, types, tile.warps, BLOCK=tile.columns // 2)
            else:
                constants["row_means"] = None
            add(layer_norm_backward_kernel, label, types, tile.warps, **constants)
        for parts in (16, 256):
            tile = sums_plan(parts)
            add(layer_norm_parameters_kernel, f"{name} {parts} parts", types, tile.warps, ROWS=tile.rows, BLOCK=tile.columns)
    return found
