"""The forward reads the logits once (T bytes per element): every lane of a program keeps the maximum of what it has seen and the
sum of exponentials relative to it, and the lanes are merged once, at the row's end. The backward reads and writes once (2T), from
the saved log-sum-exp, and may write over what it reads: the target's logit comes from the tile that its gradient goes to.

A long row is cut at 16-byte packets, whatever its length, so that only its first and last tile, which are not full, load and
store single elements.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

OP = "cross_entropy"
LOG2E = tl.constexpr(1.44269504088896340736)
LOWEST = tl.constexpr(-3.40282347e38)  # in place of -infinity as the first maximum: its distance to -infinity is a number
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
VARYING = ["rows", "vocab_start", "vocab_size", "ignore_index"]  # no kernel of their own for 1 or multiples of 16
# A launch multiplies label_smoothing and z_loss by 1.0: an integer would be another kernel, and 1 a constant in it.


@functools.lru_cache
def configuration(cols: int, size: int) -> tuple[int, int, int, int]:
    """(depth, rows, columns) of a tile and warps of its program, for rows of `cols` elements of `size` bytes.

    A tile has depth x columns elements of each of its rows, 64 bytes a thread on GPUs with warps of 32. Along its depth elements
    belong to one thread, which takes their maximum without the others.
    """
    elements, padded, warps = 128 * 64 // size, triton.next_power_of_2(cols), 4
    if padded > elements:
        elements, warps = 2 * elements, 8
    padded = min(padded, elements)
    depth = 4 if padded >= 64 else 1
    return depth, min(64, elements // padded), padded // depth, warps  # each row has a dozen values of its own in registers


@triton.jit
def targets_of(target, row, rows, classes, vocab_start, vocab_size, ignore_index):
    """Of each row: whether it takes part, whether its target is no class, and its target's column, -1 if not among `classes`."""
    t = tl.load(target + row, mask=row < rows, other=0)
    live = (row < rows) & (t != ignore_index)
    bad = live & ((t < 0) | (t >= vocab_size))
    column = t - vocab_start
    return live, bad, tl.where(live & (column >= 0) & (column < classes), column, -1)


@triton.jit
def first_packet(x, first_row, cols, ROWS: tl.constexpr):
    """Where the 16-byte packet begins that has the first element, and how many elements before that; of a single row only."""
    PACKET: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if ROWS == 1 else 1
    begin = first_row * cols
    at = begin // PACKET * PACKET
    return at, begin - at


@triton.jit
def tile_positions(cols, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of a tile's elements, the place in their row, [DEPTH, 1, COLS], and in memory, [DEPTH, ROWS, COLS]."""
    j = tl.arange(0, DEPTH)[:, None, None] * COLS + tl.arange(0, COLS)[None, None, :]
    return j, tl.arange(0, ROWS)[None, :, None] * cols + j


@triton.jit
def place_in_tile(column, start, ROWS: tl.constexpr, TILE: tl.constexpr):
    """A column counted from the tile's start, or the tile's end that is nearer."""
    return tl.minimum(tl.maximum(column - start, 0), TILE).to(tl.int32)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(logits, target, out, lse, rows, cols, classes, vocab_start, vocab_size, ignore_index, smoothing, z_loss,
                   SMOOTH: tl.constexpr, PARTIAL: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    TILE: tl.constexpr = DEPTH * COLS
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    live, bad, column = targets_of(target, row, rows, classes, vocab_start, vocab_size, ignore_index)
    hit = tl.load(logits + row * cols + column, mask=column >= 0, other=0.0).to(tl.float32)
    begin, skew = first_packet(logits, first, cols, ROWS)
    j, at = tile_positions(cols, DEPTH, ROWS, COLS)
    top = tl.full([ROWS, COLS], LOWEST, tl.float32)
    exps = tl.zeros([ROWS, COLS], tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    end = skew + classes
    for start in range(0, tl.where(tl.max(live.to(tl.int32), 0) > 0, end, 0), TILE):  # nothing is read of a row that is ignored
        inside = j < place_in_tile(end, start, ROWS, TILE)
        inside = inside & (j >= place_in_tile(skew, start, ROWS, TILE)) & live[None, :, None]
        if (ROWS == 1) & (start >= skew) & (start + TILE <= end):
            x = tl.load(logits + begin + start + at, eviction_policy="evict_first").to(tl.float32)
        else:
            x = tl.load(logits + begin + start + at, mask=inside, other=-INFINITY).to(tl.float32)
        peak = tl.maximum(top, tl.max(x, 0))
        exps = exps * tl.exp2((top - peak) * LOG2E) + tl.sum(tl.exp2((x - peak[None, :, :]) * LOG2E), 0)
        top = peak
        if SMOOTH:
            total += tl.sum(tl.where(inside, x, 0.0), 0)
    peak = tl.max(top, 1)
    exps = tl.sum(exps * tl.exp2((top - peak[:, None]) * LOG2E), 1)
    peak = tl.where(exps == 0.0, -INFINITY, peak)  # nothing else was there
    share = 1.0 - smoothing
    mean = tl.sum(total, 1) / vocab_size
    exists = row < rows
    if PARTIAL:
        out += row * 3
        tl.store(out, peak, mask=exists)
        tl.store(out + 1, exps, mask=exists)
        tl.store(out + 2, tl.where(bad, NAN, tl.where(column >= 0, share * hit, 0.0) + smoothing * mean), mask=exists)
    else:  # differences from the maximum, so that large logits don't cancel
        log_exps = tl.log(exps)
        both = peak + log_exps
        loss = log_exps - share * (hit - peak) + z_loss * both * both
        if SMOOTH:
            loss -= smoothing * (mean - peak)
        tl.store(out + row, tl.where(bad, NAN, tl.where(column >= 0, loss, 0.0)), mask=exists)
        tl.store(lse + row, both, mask=exists)


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def backward_kernel(dloss, logits, target, lse, dlogits, rows, cols, classes, vocab_start, vocab_size, ignore_index, smoothing,
                    z_loss, tiles, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program takes one of the `tiles` of its rows."""
    TILE: tl.constexpr = DEPTH * COLS
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    start = (tl.program_id(0) % tiles).to(tl.int64) * TILE
    row = first + tl.arange(0, ROWS)
    live, bad, column = targets_of(target, row, rows, classes, vocab_start, vocab_size, ignore_index)
    d = tl.where(bad, NAN, tl.load(dloss + row, mask=live, other=0.0))
    all = tl.load(lse + row, mask=live, other=0.0)
    factor = (d * (1.0 + 2.0 * z_loss * all))[None, :, None]
    uniform = (d * smoothing / vocab_size)[None, :, None]
    share = (d * (1.0 - smoothing))[None, :, None]
    begin, skew = first_packet(logits, first, cols, ROWS)
    j, at = tile_positions(cols, DEPTH, ROWS, COLS)
    low = skew - start  # where in the tile the row's first column would be
    inside = (j >= place_in_tile(skew, start, ROWS, TILE)) & (j < place_in_tile(skew + cols, start, ROWS, TILE))
    inside = inside & (row < rows)[None, :, None]
    is_class = (j < place_in_tile(skew + classes, start, ROWS, TILE)) & live[None, :, None]
    hit = tl.where((column >= 0) & (low + column >= 0) & (low + column < TILE), low + column, -1).to(tl.int32)[None, :, None]
    full = (ROWS == 1) & (low <= 0) & (low + cols >= TILE)
    logits += begin + start
    dlogits += begin + start
    if full:
        wanted = live & (low + classes > tl.zeros_like(row))
        x = tl.load(logits + at, mask=wanted[None, :, None], other=0.0, eviction_policy="evict_first")
    else:
        x = tl.load(logits + at, mask=inside & is_class, other=0.0)
    x = x.to(tl.float32)
    # In float: in 16 bits p - 1 would cancel where p is close to 1.
    d = factor * tl.exp2((x - all[None, :, None]) * LOG2E) - uniform - tl.where(j == hit, share, 0.0)
    d = tl.where(is_class, d, 0.0)
    if full:
        tl.store(dlogits + at, d)
    else:
        tl.store(dlogits + at, d, mask=inside)


def checked(logits: Tensor, target: Tensor, vocab_start: int, vocab_size: int, label_smoothing: float) -> tuple[int, int, int]:
    """(rows, columns, columns that are classes)"""
    rows, cols = checks.rows_of(OP, "logits", logits)
    if target.dtype != torch.int64:
        raise RuntimeError(f"{OP}: target must be int64, got {checks.name(target.dtype)}")
    if target.shape != logits.shape[:-1]:
        raise RuntimeError(f"{OP}: target must have the shape of logits {checks.shape(logits)} without the last dimension, "
                           f"got {checks.shape(target)}")
    if target.device != logits.device:
        checks.device(OP, "target", target, "logits", logits)
    if vocab_start < 0:
        raise RuntimeError(f"{OP}: vocab_start must be at least 0, got {vocab_start}")
    if vocab_size < 1:
        raise RuntimeError(f"{OP}: vocab_size must be at least 1, got {vocab_size}")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"{OP}: label_smoothing must be in [0, 1], got {label_smoothing:g}")
    classes = vocab_size - vocab_start
    return rows, cols, cols if classes > cols else classes if classes > 0 else 0


def launch_forward(logits: Tensor, target: Tensor, out: Tensor, lse: Tensor | None, rows: int, cols: int, classes: int,
                   vocab_start: int, vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float) -> None:
    if not rows:
        return
    depth, tile_rows, tile_cols, warps = configuration(cols, logits.element_size())
    forward_kernel[(-(-rows // tile_rows),)](
        logits.contiguous(), target, out, lse, rows, cols, classes, vocab_start, vocab_size, ignore_index, label_smoothing * 1.0,
        z_loss * 1.0, label_smoothing != 0, lse is None, depth, tile_rows, tile_cols, num_warps=warps)


def cross_entropy_forward(logits: Tensor, target: Tensor, vocab_size: int, ignore_index: int, label_smoothing: float,
                          z_loss: float) -> tuple[Tensor, Tensor]:
    rows, cols, classes = checked(logits, target, 0, vocab_size, label_smoothing)
    if vocab_size > cols:
        raise RuntimeError(f"{OP}: vocab_size must be at most the {cols} columns of logits, got {vocab_size}")
    target = target.contiguous()
    loss = torch.empty_like(target, dtype=torch.float32)
    lse = torch.empty_like(loss)
    launch_forward(logits, target, loss, lse, rows, cols, classes, 0, vocab_size, ignore_index, label_smoothing, z_loss)
    return loss, lse


def cross_entropy_partial(logits: Tensor, target: Tensor, vocab_start: int, vocab_size: int, ignore_index: int,
                          label_smoothing: float) -> Tensor:
    rows, cols, classes = checked(logits, target, vocab_start, vocab_size, label_smoothing)
    out = torch.empty((*target.shape, 3), dtype=torch.float32, device=logits.device)
    launch_forward(logits, target.contiguous(), out, None, rows, cols, classes, vocab_start, vocab_size, ignore_index,
                   label_smoothing, 0.0)
    return out


def launch_backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, dlogits: Tensor | None, vocab_start: int,
                    vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float) -> Tensor:
    rows, cols, classes = checked(logits, target, vocab_start, vocab_size, label_smoothing)
    dloss = checks.row_values(OP, "dloss", dloss, rows, "logits", logits)
    lse = checks.row_values(OP, "lse", lse, rows, "logits", logits)
    logits = logits.contiguous()
    if dlogits is None:
        dlogits = torch.empty_like(logits)
    if not rows:
        return dlogits
    size = logits.element_size()
    depth, tile_rows, tile_cols, warps = configuration(cols, size)
    skew = 16 // size - 1 if tile_rows == 1 and cols % (16 // size) else 0  # at most so much of its first tile is not the row's
    tiles = -(-(cols + skew) // (depth * tile_cols))
    backward_kernel[(-(-rows // tile_rows) * tiles,)](
        dloss, logits, target.contiguous(), lse, dlogits, rows, cols, classes, vocab_start, vocab_size, ignore_index,
        label_smoothing * 1.0, z_loss * 1.0, tiles, depth, tile_rows, tile_cols, num_warps=warps)
    return dlogits


def cross_entropy_backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, vocab_start: int, vocab_size: int,
                           ignore_index: int, label_smoothing: float, z_loss: float) -> Tensor:
    return launch_backward(dloss, logits, target, lse, None, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss)


def cross_entropy_backward_(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, vocab_start: int, vocab_size: int,
                            ignore_index: int, label_smoothing: float, z_loss: float) -> None:
    if not logits.is_contiguous():
        raise RuntimeError(f"{OP}: logits to be overwritten must be contiguous, got shape {checks.shape(logits)}")
    launch_backward(dloss, logits, target, lse, logits, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss)


def compilations() -> list[tuple]:
    """(kernel, signature, constexprs, num_warps, label) of what launches use at some row lengths."""
    found: list[tuple] = []
    numbers = {"rows": "i32", "cols": "i32", "classes": "i32", "vocab_start": "i32", "vocab_size": "i32", "ignore_index": "i32",
               "smoothing": "fp32", "z_loss": "fp32"}
    for size, element in ((4, "*fp32"), (2, "*bf16")):
        forward = {"logits": element, "target": "*i64", "out": "*fp32", "lse": "*fp32", **numbers}
        backward = {"dloss": "*fp32", "logits": element, "target": "*i64", "lse": "*fp32", "dlogits": element, **numbers,
                    "tiles": "i32"}
        for cols in (64, 1024, 4096, 16384):
            depth, rows, width, warps = configuration(cols, size)
            tile = {"DEPTH": depth, "ROWS": rows, "COLS": width}
            label = f"{cols} columns of {element[1:]}"
            for smooth in (False, True):
                options = {"SMOOTH": smooth, "PARTIAL": False, **tile}
                found.append((forward_kernel, forward, options, warps, f"forward_kernel, {label}{', smoothing' * smooth}"))
            found.append((backward_kernel, backward, tile, warps, f"backward_kernel, {label}"))
    return found
