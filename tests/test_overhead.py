"""The benchmark of a call's overhead runs, and its Triton kernels are empty indeed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_kernels as mk

pytestmark = pytest.mark.skipif(not mk.implementations()["triton"].available, reason=mk.implementations()["triton"].detail)
ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_op_is_measured():
    lines = run("-m", "benchmarks.overhead", "--calls", "4", "--series", "1").splitlines()
    for name in ("cpu", "triton"):
        for op in ("scaled_masked_softmax", "bias_gelu", "layer_norm", "cross_entropy"):
            assert any(name in line and op in line for line in lines), (name, op)


def test_no_kernel_is_left():
    """Outputs stay as they were allocated: full of NaN here."""
    run("-c", """
import torch
from benchmarks import overhead
import os
os.environ["TRITON_INTERPRET"] = "1"
import importlib, megatron_kernels as mk
from megatron_kernels.triton import OPS
modules = [importlib.import_module(f"megatron_kernels.triton.{op}") for op in sorted(set(OPS.values()))]
assert overhead.empty_kernels(modules) >= 8
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
with mk.use("triton"):
    for op, function in overhead.functions(mk).items():
        x = torch.ones(2, 16, requires_grad=True)
        y = function(x)
        y.sum().backward()
        assert y.isnan().all() and x.grad.isnan().all(), op
""")
