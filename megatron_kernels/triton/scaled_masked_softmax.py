"""A row's mask needs no registers of its own: while the row waits for its sum, a masked position holds -1 among exponentials.

A program keeps a tile of whole rows in registers between its one read and its one write; longer rows go by in chunks, twice. The
mask is read where its strides say, one byte per position at most. What lies right of the diagonal is not read but for the rest of
a packet of 32 bytes, for which the loads stay wide. Bytes moved per element of T: forward 2T (causal 1.5T) and the mask, backward
3T (causal 2T); rows of more than MOST_COLUMNS 3T and 5T.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

OP = "scaled_masked_softmax"
MOST_COLUMNS = 16384  # of a row that registers hold whole
CHUNK = 4096  # columns of a longer one that they hold at once
LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """What a program holds at once: `rows` x `columns` elements, powers of two, and the warps that share them."""

    rows: int
    columns: int
    warps: int


@functools.cache
def plan(cols: int, tensors: int) -> Tile:
    """The tile for rows of `cols`, of as many input tensors: whole rows up to MOST_COLUMNS, else one row's chunk.

    32 elements per thread have loads enough under way at once to hide their latency, and leave room for several programs. More
    than 16 warps would be too many threads for AMD's, which have 64 lanes.
    """
    if cols > MOST_COLUMNS:
        return Tile(1, CHUNK, 8)
    elements, columns = 4096 // tensors, triton.next_power_of_2(cols)
    return Tile(max(1, elements // max(columns, 32)), columns, min(16, max(4, 4 * columns // elements)))


@triton.jit
def _rows(rows, cols, queries, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows: their numbers, which of them exist, and how many of their columns are not right of the diagonal."""
    first = tl.program_id(0).to(rows.dtype) * ROWS  # 32 bits where the number of rows has: dividing 64 bits is slow
    index = tl.arange(0, ROWS)
    row = first + index
    live = tl.zeros([ROWS, 1], tl.int32) + cols
    if CAUSAL:
        live = tl.minimum(tl.maximum(row % queries + (cols - queries + 1), 0), cols)[:, None]
    return row, (index < rows - first)[:, None], live


@triton.jit
def _reads(col, cols, wanted, live, T: tl.constexpr, CAUSAL: tl.constexpr):
    """The columns to read: up to the diagonal, and on to a packet's end, as a load is no wider than its mask is even."""
    reads = wanted & (col < cols)
    if CAUSAL:
        packet: tl.constexpr = 256 // T.primitive_bitwidth
        reads &= col < (live + (packet - 1)) // packet * packet
    return reads


@triton.jit
def _mask_rows(mask, row, size1, size2, stride0, stride1, stride2):
    """Where the bytes of each row's mask begin: rows are numbered through three dimensions, the last one fastest."""
    upper = row // size2
    return (mask + (upper // size1).to(tl.int64) * stride0 + (upper % size1).to(tl.int64) * stride1
            + (row % size2).to(tl.int64) * stride2)[:, None]


@triton.jit
def _load_scores(x, bytes, col, cols, wanted, live, sign, CAUSAL: tl.constexpr, BY_COLUMN: tl.constexpr, POLICY: tl.constexpr):
    """sign * x where it takes part, else -inf; and where it does."""
    reads = _reads(col, cols, wanted, live, x.dtype.element_ty, CAUSAL)
    takes_part = col < live
    if BY_COLUMN:
        takes_part &= ~tl.load(bytes + col, mask=reads, other=True)
    v = tl.load(x + col, mask=reads, other=0.0, eviction_policy=POLICY).to(tl.float32)
    return tl.where(takes_part, v * sign, float("-inf")), takes_part


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["queries", "size1", "size2"])
def scaled_masked_softmax_forward_kernel(
        x, mask, y, rows, cols, queries, size1, size2, stride0, stride1, stride2, sign, factor, CAUSAL: tl.constexpr,
        BY_COLUMN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    row, exists, live = _rows(rows, cols, queries, CAUSAL, ROWS)
    bytes, wanted = mask, exists
    if mask is not None:
        bytes = _mask_rows(mask, row, size1, size2, stride0, stride1, stride2)
        if not BY_COLUMN:
            wanted &= ~tl.load(bytes, mask=exists, other=True)
            live = tl.where(wanted, live, 0)
    begin = row.to(tl.int64)[:, None] * cols
    x += begin
    y += begin
    col = tl.arange(0, BLOCK)[None, :]

    if WHOLE:
        z, takes_part = _load_scores(x, bytes, col, cols, wanted, live, sign, CAUSAL, BY_COLUMN, "evict_first")
        top = tl.max(z, 1, keep_dims=True)
        # Of finite values this difference has no infinity above 0, as scale * x might; NaN and rows of nothing but -inf become NaN.
        e = tl.where(takes_part, tl.exp2((z - top) * factor), -1.0)
        inverse = 1.0 / tl.sum(tl.where(e < 0, 0.0, e), 1, keep_dims=True)
        tl.store(y + col, tl.where(e < 0, 0.0, e * inverse).to(y.dtype.element_ty), mask=exists & (col < cols))
    else:
        chunks = tl.cdiv(cols, BLOCK)
        top = tl.full([ROWS, 1], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in range(tl.cdiv(tl.max(live), BLOCK)):
            at = col + i * BLOCK
            z, takes_part = _load_scores(x, bytes, at, cols, wanted, live, sign, CAUSAL, BY_COLUMN, "evict_last")
            higher = tl.maximum(top, tl.max(z, 1, keep_dims=True))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            sums = sums * tl.exp2((top - shift) * factor) + tl.where(takes_part, tl.exp2((z - shift) * factor), 0.0)
            top = higher
        inverse = 1.0 / tl.sum(sums, 1, keep_dims=True)
        for i in range(chunks):
            at = col + (chunks - 1 - i) * BLOCK  # the last chunk first: it is the one that caches still have
            z, takes_part = _load_scores(x, bytes, at, cols, wanted, live, sign, CAUSAL, BY_COLUMN, "evict_first")
            p = tl.where(takes_part, tl.exp2((z - top) * factor) * inverse, 0.0)
            tl.store(y + at, p.to(y.dtype.element_ty), mask=exists & (at < cols))


@triton.jit
def _load_pair(dy, y, col, cols, exists, live, CAUSAL: tl.constexpr, POLICY: tl.constexpr):
    """Gradients and probabilities, 0 right of the diagonal."""
    reads = _reads(col, cols, exists, live, y.dtype.element_ty, CAUSAL)
    g = tl.load(dy + col, mask=reads, other=0.0, eviction_policy=POLICY)
    p = tl.load(y + col, mask=reads, other=0.0, eviction_policy=POLICY)
    if CAUSAL:
        g, p = tl.where(col < live, g, 0.0), tl.where(col < live, p, 0.0)
    return g.to(tl.float32), p.to(tl.float32)


@triton.jit
def _store_gradient(dx, g, p, dot, scale, col, cols, exists, live, CAUSAL: tl.constexpr):
    d = scale * p * (g - dot)
    if CAUSAL:
        d = tl.where(col < live, d, 0.0)  # also where the dot product is NaN
    tl.store(dx + col, d.to(dx.dtype.element_ty), mask=exists & (col < cols))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["queries"])
def scaled_masked_softmax_backward_kernel(dy, y, dx, rows, cols, queries, scale, CAUSAL: tl.constexpr, ROWS: tl.constexpr,
                                          BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    row, exists, live = _rows(rows, cols, queries, CAUSAL, ROWS)
    begin = row.to(tl.int64)[:, None] * cols
    dy += begin
    y += begin
    dx += begin
    col = tl.arange(0, BLOCK)[None, :]

    if WHOLE:
        g, p = _load_pair(dy, y, col, cols, exists, live, CAUSAL, "evict_first")
        _store_gradient(dx, g, p, tl.sum(g * p, 1, keep_dims=True), scale, col, cols, exists, live, CAUSAL)
    else:
        chunks = tl.cdiv(cols, BLOCK)
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in range(tl.cdiv(tl.max(live), BLOCK)):
            g, p = _load_pair(dy, y, col + i * BLOCK, cols, exists, live, CAUSAL, "evict_last")
            products += g * p
        dot = tl.sum(products, 1, keep_dims=True)
        for i in range(chunks):
            at = col + (chunks - 1 - i) * BLOCK
            g, p = _load_pair(dy, y, at, cols, exists, live, CAUSAL, "evict_first")
            _store_gradient(dx, g, p, dot, scale, at, cols, exists, live, CAUSAL)


class RowStrides(NamedTuple):
    """How a mask broadcasts over x's rows: dimensions, the last one fastest, at least three; and the stride between columns."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    column: int  # 1, or 0 where one byte masks the whole row


@functools.lru_cache(maxsize=1024)
def row_strides(x: torch.Size, mask: torch.Size, strides: tuple[int, ...]) -> RowStrides:
    """Neighbouring dimensions are merged where one stride serves both: no mask of four dimensions needs more than three."""
    missing = len(x) - len(mask)
    if missing < 0 or any(n not in (1, m) for n, m in zip(mask, x[missing:], strict=True)):
        raise RuntimeError(f"{OP}: mask must broadcast to x's shape {list(x)}, got {list(mask)}")
    steps = [0] * missing + [0 if n == 1 else step for n, step in zip(mask, strides, strict=True)]
    merged: list[tuple[int, int]] = []
    for size, step in zip(x[:-1], steps[:-1], strict=True):
        if merged and merged[-1][1] == step * size:
            merged[-1] = merged[-1][0] * size, step
        elif size != 1:
            merged.append((size, step))
    merged = [(1, 0)] * (3 - len(merged)) + merged
    return RowStrides(tuple(size for size, _ in merged), tuple(step for _, step in merged), steps[-1])


def _slices(x: Tensor, mask: Tensor, y: Tensor, where: RowStrides) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of dimensions before the last three a slice for each index."""
    cols = x.shape[-1]
    x, y = x.view(-1, *where.sizes[-3:], cols), y.view(-1, *where.sizes[-3:], cols)
    for i, index in enumerate(itertools.product(*map(range, where.sizes[:-3]))):
        offset = sum(k * step for k, step in zip(index, where.strides[:-3], strict=True))
        yield x[i], mask.as_strided((), (), mask.storage_offset() + offset), y[i]


NO_MASK = RowStrides((1, 1, 1), (0, 0, 0), 0)


def _queries(x: Tensor, causal: bool) -> int:
    if causal and x.dim() < 2:
        raise RuntimeError(f"{OP}: causal=True needs x of at least two dimensions [..., sq, sk], got shape {checks.shape(x)}")
    return x.shape[-2] if causal else 1


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    rows, cols = checks.rows_of(OP, "x", x)
    queries = _queries(x, causal)
    where = NO_MASK
    if mask is not None:
        if mask.dtype != torch.bool:
            raise RuntimeError(f"{OP}: mask must be bool (True = masked out), got {checks.name(mask.dtype)}")
        checks.device(OP, "mask", mask, "x", x)
        where = row_strides(x.shape, mask.shape, mask.stride())
        if where.column > 1:
            mask = mask.contiguous()
            where = row_strides(x.shape, mask.shape, mask.stride())
    x = x.contiguous()
    y = torch.empty_like(x)
    if rows == 0:
        return y
    scale = float(scale)
    # 0 times finite values is 0, whatever the factor; a factor of 0 would turn the -inf of what is masked into NaN.
    sign, factor = (0.0, 1.0) if abs(scale) < 1e-45 else (math.copysign(1.0, scale), abs(scale) * LOG2E)
    tile = plan(cols, 1)
    slices = ((x, mask, y),) if mask is None or len(where.sizes) == 3 else _slices(x, mask, y, where)
    rows //= math.prod(where.sizes[:-3])
    for x_, mask_, y_ in slices:
        scaled_masked_softmax_forward_kernel[(-(-rows // tile.rows),)](
            x_, mask_, y_, rows, cols, queries, *where.sizes[-2:], *where.strides[-3:], sign, factor, causal, where.column != 0,
            tile.rows, tile.columns, tile.columns >= cols, num_warps=tile.warps)
    return y


def scaled_masked_softmax_backward(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    checks.same(OP, "dy", dy, "y", y)
    rows, cols = checks.rows_of(OP, "y", y)
    queries = _queries(y, causal)
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    if rows:
        tile = plan(cols, 2)
        scaled_masked_softmax_backward_kernel[(-(-rows // tile.rows),)](  # triton.cdiv takes 3 us
            dy, y, dx, rows, cols, queries, float(scale), causal, tile.rows, tile.columns, tile.columns >= cols,
            num_warps=tile.warps)
    return dx


def compilations() -> list[tuple[Any, dict[str, str], dict[str, Any], int, str]]:
    """The kernels as they are launched for short, usual and long rows: (kernel, signature, constexprs, warps, label)."""
    found = []
    for element, cols in itertools.product(("fp32", "bf16"), (64, 1024, 4096, 16384, 32768)):
        types = {**dict.fromkeys(("x", "y", "dy", "dx"), f"*{element}"), "mask": "*i1",
                 **dict.fromkeys(("scale", "sign", "factor"), "fp32")}

        def add(kernel: Any, tensors: int, what: str, types=types, label=f"{element} {cols}", cols=cols, **constants: Any) -> None:
            tile = plan(cols, tensors)
            constants.update(ROWS=tile.rows, BLOCK=tile.columns, WHOLE=tile.columns >= cols)
            signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
            found.append((kernel, signature, constants, tile.warps,
                          f"{kernel.__name__.removesuffix('_kernel')} {label}{what}"))

        add(scaled_masked_softmax_forward_kernel, 1, "", mask=None, BY_COLUMN=False, CAUSAL=False)
        add(scaled_masked_softmax_forward_kernel, 1, " causal", mask=None, BY_COLUMN=False, CAUSAL=True)
        add(scaled_masked_softmax_forward_kernel, 1, " masked causal", BY_COLUMN=True, CAUSAL=True)
        add(scaled_masked_softmax_backward_kernel, 2, "", CAUSAL=False)
        add(scaled_masked_softmax_backward_kernel, 2, " causal", CAUSAL=True)
    return found
