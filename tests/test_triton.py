"""The Triton kernels: what compilers make of them, without a GPU, and paths that rows as short as the op tests' don't take."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import test_layer_norm
import torch
from cases import randn

import megatron_kernels as mk

pytest.importorskip("triton", reason="triton is not installed")

import triton_resources

ROOT = triton_resources.ROOT


def child(*arguments: object, path: os.PathLike = ROOT) -> dict:
    """The JSON that a Python process prints in which kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", path)))
    done = subprocess.run([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["one target each", pytest.param("every target", marks=pytest.mark.slow)])
def measured(request):
    found = child(ROOT / "tests/triton_resources.py", *(["--quick"] if request.param == "one target each" else []))
    if len(found["missing"]) == len(triton_resources.TARGETS):
        pytest.skip("; ".join(found["missing"].values()))
    return found


def every(measured: dict) -> list[tuple[str, str, dict[str, int]]]:
    return [(key, target, found) for key, by_target in measured["resources"].items() for target, found in by_target.items()]


def unfit(measured: dict, most_shared: dict[str, int]) -> list[str]:
    """What no budget may accept."""
    spilling = [f"{key} spills for {target}: {found}" for key, target, found in every(measured) if found["spills"]]
    return spilling + [f"{key} does not fit {target}: {found['shared']} bytes of shared memory, a block has {most_shared[target]}"
                       for key, target, found in every(measured) if found["shared"] > most_shared[target]]


def differences(measured: dict, budget: dict) -> list[str]:
    lines = [f"{key}: not in the budget" for key in measured["resources"] if key not in budget]
    lines += [f"{key}: in the budget, but no such configuration" for key in budget if key not in measured["resources"]]
    return lines + [f"{key}: {found[what]} {what} for {target}, the budget has {budget[key][target][what]}"
                    for key, target, found in every(measured) if key in budget
                    for what in ("registers", "shared") if found[what] != budget[key][target][what]]


def test_every_kernel_compiles(measured):
    assert measured["failed"] == {}
    assert measured["unlisted"] == [], "kernels that no compilations() lists"


def test_no_kernel_spills(measured):
    found = unfit(measured, {target: shared for target, (_, _, _, shared) in triton_resources.TARGETS.items()})
    assert not found, "\n".join(found)


def test_kernels_keep_their_budget(measured):
    version, budget = triton_resources.load()
    if version != measured["triton"]:
        pytest.skip(f"the budget is for Triton {version}, this is {measured['triton']}; no spills is all that is asked of it")
    found = differences(measured, budget)
    assert not found, f"{len(found)} differences; `python tests/triton_resources.py --write` accepts them\n" + "\n".join(found)


@pytest.mark.parametrize(("target", "columns"), [("cuda:90", 16384), ("hip:gfx90a", 32768)])
def test_planted_spill_is_found(target, columns, tmp_path):
    """512 elements per thread of one warp, more than the registers that it may have; 8, or 4, in 16 warps are not."""
    (tmp_path / "planted.py").write_text("""
import json, sys
import triton
import triton.language as tl
import triton_resources

@triton.jit
def planted_kernel(x, y, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    v = tl.load(x + column)
    tl.store(y + column, v / tl.sum(v, 0))

def resources(warps, block):
    return triton_resources.compile_one(planted_kernel, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": block}, warps, sys.argv[1])

if why := triton_resources.missing(sys.argv[1]):
    print(json.dumps({"missing": why}))
else:
    print(json.dumps({"planted": resources(1, int(sys.argv[2])), "fit": resources(16, 4096)}))
""", encoding="utf-8")
    found = child(tmp_path / "planted.py", target, columns, path=tmp_path)
    if "missing" in found:
        pytest.skip(found["missing"])
    assert found["planted"]["spills"] > 100
    assert found["fit"]["spills"] == 0
    assert 8 < found["fit"]["registers"] < 64
    assert found["fit"]["shared"] == 64  # a float of each of 16 warps


def test_differences_and_unfit_are_named():
    budget = {"op: a": {"cuda:80": {"registers": 40, "shared": 0}, "cuda:90": {"registers": 41, "shared": 64}}}
    same = {"resources": {"op: a": {"cuda:90": {"registers": 41, "shared": 64, "spills": 0}}}}
    assert differences(same, budget) == unfit(same, {"cuda:90": 64}) == []
    other = {"resources": {"op: a": {"cuda:90": {"registers": 42, "shared": 128, "spills": 1}}, "op: b": {}}}
    assert differences(other, {**budget, "op: c": {}}) == [
        "op: b: not in the budget", "op: c: in the budget, but no such configuration",
        "op: a: 42 registers for cuda:90, the budget has 41", "op: a: 128 shared for cuda:90, the budget has 64"]
    assert [line.split(" for ")[0].split(" cuda")[0] for line in unfit(other, {"cuda:90": 64})] == ["op: a spills",
                                                                                                     "op: a does not fit"]


def test_budget_file_returns_what_was_written(tmp_path):
    found = {key: {target: {"registers": 40 + i, "shared": 64 * i} for i, target in enumerate(triton_resources.TARGETS)}
             for key in ("op: a, fp32", "op: b")}
    triton_resources.write("3.8.0", found, tmp_path / "budgets.csv")
    assert triton_resources.load(tmp_path / "budgets.csv") == ("3.8.0", found)


@pytest.fixture
def triton_or_skip():
    why = mk.implementations()["triton"]
    if not why.available:
        pytest.skip(why.detail)
    with mk.use("triton"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_of_rows_longer_than_a_tile(triton_or_skip, poisoned, monkeypatch, dtype):
    """With tiles of 16 columns, for the interpreter takes long over rows of more than 16384."""
    layer_norm = importlib.import_module("megatron_kernels.triton.layer_norm")
    monkeypatch.setattr(layer_norm, "forward_plan", lambda cols: layer_norm.Tile(1, 16, 4))
    monkeypatch.setattr(layer_norm, "backward_plan", lambda cols: layer_norm.Tile(2, 16, 4))
    for rows, cols in ((1, 17), (5, 64), (3, 70)):
        x, weight, bias = (randn(*shape, seed=len(shape) + cols, dtype=dtype) for shape in ((rows, cols), (cols,), (cols,)))
        test_layer_norm.check(x, weight, bias.float())
        test_layer_norm.check(x, None, bias)
    test_layer_norm.check(x, None, None)
    y = mk.layer_norm(1e4 + randn(3, 100, seed=0, dtype=torch.float32, outliers=False))
    assert (y.square().mean(-1) - 1).abs().max() < 1e-4
    assert torch.equal(mk.layer_norm(torch.full((2, 50), 3.0), None, torch.arange(50.0)), torch.arange(50.0).expand(2, 50))
    x = torch.full((2, 21), 1e36)
    y, mean, rstd = layer_norm.layer_norm_forward(x, None, None, 1e-5)
    dx, _, _ = layer_norm.layer_norm_backward(torch.ones_like(x), x, None, None, mean, rstd)
    assert not y.any() and not dx.any()


def test_layer_norm_tiles():
    """One tile holds a row as long as that is said to be possible, and no tile has more than 32 elements per thread."""
    layer_norm = importlib.import_module("megatron_kernels.triton.layer_norm")
    for plan, longest in ((layer_norm.forward_plan, 16384), (layer_norm.backward_plan, 8192)):
        for cols in (1, 2, 63, 64, 65, 1000, 1024, 4096, 5000, 8192, 8193, 16384, 16385, 100000):
            tile = plan(cols)
            assert (tile.columns >= cols) == (cols <= longest)
            assert tile.rows * tile.columns <= 32 * 32 * tile.warps
            assert 4 <= tile.warps <= 16
