"""Bytes that the CUDA kernels move, counted by their host build: a measure of speed that needs no GPU.

The tensors of rows and columns are each read and written exactly as often as the op demands. What is small beside them, or stays in
the caches (parameters, masks, statistics, partial sums), is held against a formula of its own. A value that all threads of a warp
load at once counts once for each of them here, and is one access on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from cases import randn

import megatron_kernels as mk

pytestmark = pytest.mark.skipif(not mk.implementations()["simt"].available, reason=mk.implementations()["simt"].detail)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(16, 1024), (24, 1031), (8, 4096), (5, 16384), (3, 20001)]  # odd columns: rows begin anywhere
PROCESSORS = 4
# threads * bytes per row: every thread of a row, at most 1024, loads the row's statistics for itself
PER_ROW = 1024 * 8


def traffic(op: str, *arguments) -> dict[str, tuple[int, int]]:
    """"tensor" or, for the second kernel of an op, "kernel.tensor" -> (bytes read, bytes written)."""
    from megatron_kernels import _simt

    _simt.configure(multiprocessors=PROCESSORS)
    _simt.take_traffic()
    getattr(mk.backend.namespace("simt"), op)(*arguments)
    counted = _simt.take_traffic()
    assert _simt.take_findings() == []
    names = (row["tensor"] if row["kernel"] == op else f"{row['kernel'].removeprefix(op)}.{row['tensor']}" for row in counted)
    return {name: (row["read"], row["written"]) for name, row in zip(names, counted, strict=True)}


def tensor(rows, cols, seed, dtype):
    return randn(rows, cols, seed=seed, dtype=dtype)


def once(x) -> int:
    return x.numel() * x.element_size()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(dtype, shape):
    x, dy = tensor(*shape, 0, dtype), tensor(*shape, 1, dtype)
    n = once(x)
    assert traffic("scaled_masked_softmax_forward", x, None, 1.0, False) == {"x": (n, 0), "y": (0, n)}
    mask = torch.zeros(shape, dtype=torch.bool)
    assert traffic("scaled_masked_softmax_forward", x, mask, 1.0, False) == {"x": (n, 0), "mask": (x.numel(), 0), "y": (0, n)}
    counted = traffic("scaled_masked_softmax_forward", x, mask[:, :1], 1.0, False)
    assert counted["x"] == (n, 0) and counted["mask"][0] <= shape[0] * PER_ROW
    read = 2 * n if dtype == torch.float32 and shape[1] > 16384 else n  # registers hold two rows of 64 KB
    assert traffic("scaled_masked_softmax_backward", dy, x, 1.0, False) == {"y": (read, 0), "dy": (read, 0), "dx": (0, n)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1024, 1031])
def test_causal_softmax_reads_half(dtype, size):
    x, dy = tensor(size, size, 0, dtype), tensor(size, size, 1, dtype)
    n, half = once(x), once(x) // 2 + size * x.element_size() // 2  # the diagonal included
    assert half <= 1.02 * n / 2
    mask = torch.zeros(size, size, dtype=torch.bool)
    counted = traffic("scaled_masked_softmax_forward", x, mask, 1.0, True)
    assert counted == {"x": (half, 0), "mask": (half // x.element_size(), 0), "y": (0, n)}
    assert traffic("scaled_masked_softmax_backward", dy, x, 1.0, True) == {"y": (half, 0), "dy": (half, 0), "dx": (0, n)}


@pytest.mark.parametrize("shape", [(2, 70000), (2, 70001)], ids=str)
def test_softmax_row_too_long_for_registers(shape):
    x, dy = tensor(*shape, 0, torch.bfloat16), tensor(*shape, 1, torch.bfloat16)
    n = once(x)
    assert traffic("scaled_masked_softmax_forward", x, None, 1.0, False) == {"x": (2 * n, 0), "y": (0, n)}
    assert traffic("scaled_masked_softmax_backward", dy, x, 1.0, False) == {"y": (2 * n, 0), "dy": (2 * n, 0), "dx": (0, n)}


@pytest.mark.parametrize("wide", [False, True], ids=["", "float32 parameters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_gelu(dtype, shape, wide):
    x, dy = tensor(*shape, 0, dtype), tensor(*shape, 1, dtype)
    bias = tensor(1, shape[1], 2, torch.float32 if wide else dtype)[0]
    n, cols = once(x), shape[1]
    assert traffic("bias_gelu_forward", x, bias, True) == {
        "x": (n, 0), "y": (0, n), "bias": (x.numel() * bias.element_size(), 0)}  # from the cache: a bias for each element
    counted = traffic("bias_gelu_backward", dy, x, bias, True)
    assert {name: counted[name] for name in ("x", "dy", "dx")} == {"x": (n, 0), "dy": (n, 0), "dx": (0, n)}
    read, written = counted["column_sums.partials"][0], counted["partials"][1]
    assert read % (4 * cols) == 0 and read <= written <= max(4 * PROCESSORS, -(-cols // 256)) * 256 * 4  # a row for 4 blocks each
    assert counted["column_sums.dbias"] == (0, once(bias))


@pytest.mark.parametrize("wide", [False, True], ids=["", "float32 parameters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(dtype, shape, wide):
    rows, cols = shape
    x, dy = tensor(*shape, 0, dtype), tensor(*shape, 1, dtype)
    weight, bias = (tensor(1, cols, seed, torch.float32 if wide else dtype)[0] for seed in (2, 3))
    statistics, n, p = torch.ones(rows), once(x), x.numel() * weight.element_size()
    assert traffic("layer_norm_forward", x, weight, bias, 1e-5) == {
        "x": (n, 0), "y": (0, n), "weight": (p, 0), "bias": (p, 0), "mean": (0, 4 * rows), "rstd": (0, 4 * rows)}

    counted = traffic("layer_norm_backward", dy, x, weight, bias, statistics, statistics.clone())
    if cols == 20001:  # rows that are not aligned are read element by element, of which registers hold 4096
        total = {name: [sum(counted.get(f"{kernel}{name}", (0, 0))[i] for kernel in ("_means.", "_columns.")) for i in (0, 1)]
                 for name in ("x", "dy", "dx")}
        assert total == {"x": [2 * n, 0], "dy": [2 * n, 0], "dx": [0, n]}
        return
    assert {name: counted[name] for name in ("x", "dy", "dx")} == {"x": (n, 0), "dy": (n, 0), "dx": (0, n)}
    for name in ("mean", "rstd"):
        assert counted[name][0] <= rows * PER_ROW
    partials = min(rows, PROCESSORS) * 2 * cols * 4
    if cols * x.element_size() <= 32768:  # registers hold x, dy and the two sums
        assert counted["partials"] == (0, partials)
    else:  # 16 bytes for each element, from the cache
        assert counted["partials"] == (x.numel() * 8, x.numel() * 8 + partials)
    assert counted["column_sums.partials"] == (partials, 0)
    assert counted["column_sums.dweight"] == counted["column_sums.dbias"] == (0, once(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 50304)], ids=str)
def test_cross_entropy(dtype, shape):
    rows, cols = shape
    x, target, statistics = tensor(*shape, 0, dtype), torch.arange(rows), torch.ones(rows)
    n = once(x)
    counted = traffic("cross_entropy_forward", x, target, cols, -100, 0.1, 0.1)
    assert counted["logits"] == (n + rows * x.element_size(), 0)  # the true class once more
    assert counted["loss"] == counted["lse"] == (0, 4 * rows)
    assert counted["target"][0] <= rows * PER_ROW
    counted = traffic("cross_entropy_backward", statistics, x, target, statistics.clone(), 0, cols, -100, 0.1, 0.1)
    assert counted["logits"] == (n, 0) and counted["dlogits"] == (0, n)
    for name in ("dloss", "lse", "target"):
        assert counted[name][0] <= rows * PER_ROW * max(1, cols // 2048)  # each chunk of a row loads them
    none = torch.full((rows,), -100)
    ignored = traffic("cross_entropy_backward", statistics, x, none, statistics.clone(), 0, cols, -100, 0.0, 0.0)
    assert ignored["logits"] == (0, 0) and ignored["dlogits"] == (0, n)
