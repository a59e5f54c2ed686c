"""Command-line options, and the implementations that every op test runs on."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the package is imported

import cases

import megatron_kernels as mk

INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512bf16"]
THREAD_ORDERS = [0, 1, 12345]  # seeds; 0 is the order of the threads' numbers
IMPLEMENTATIONS = [*(f"cpu-{isa}" for isa in INSTRUCTION_SETS), *(f"simt-{seed}" for seed in THREAD_ORDERS),
                   "triton", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_addoption(parser):
    parser.addoption("--checkpoints", default=None, metavar="DIR",
                     help="directory of Megatron checkpoints with their true tensors and logits, laid out as in CONTRIBUTING.md")
    parser.addoption("--wheel-python", action="append", default=[], metavar="PYTHON",
                     help="interpreter with torch in which the wheel is tried too; repeatable")


def pytest_collection_modifyitems(config, items):
    """Slow tests run only where the marker expression names them, GPU tests only where there is a GPU."""
    chosen = config.getoption("-m")
    for item in items:
        if "slow" in item.keywords and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="slow: runs in `make test-slow`"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """The test runs inside `mk.use` of each implementation, and what it makes without naming a device is on that one's.

    The CPU's runs with each instruction set that this processor has; the CUDA kernels run on the CPU in several orders of threads,
    where nothing may be found, and on a GPU where there is one; so does Triton, which is interpreted elsewhere.
    """
    name, _, option = request.param.partition("-")
    why = mk.implementations()[name]
    if not why.available:
        pytest.skip(why.detail)
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
    cases.FLOAT64, cases.INTERPRETED = name == "cpu", name == "triton" and not on_gpu
    if not cases.FLOAT64 and getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype") == torch.float64:
        pytest.skip("float64 is for CPUs")
    if name == "cpu":
        try:
            torch.ops.megatron_kernels._set_isa(option)
        except RuntimeError as error:
            pytest.skip(str(error))
    if name == "simt":
        from megatron_kernels import _simt
        _simt.configure(seed=int(option))
        _simt.take_findings()
    with mk.use(name), torch.device("cuda") if on_gpu else contextlib.nullcontext():
        yield request.param
    cases.FLOAT64, cases.INTERPRETED = True, False
    if name == "cpu":
        torch.ops.megatron_kernels._set_isa("best")
    if name == "simt":
        _simt.configure()
        assert _simt.take_findings() == []


@pytest.fixture
def poisoned():
    """Memory that the ops allocate is full of NaN: an element that nobody writes can't pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
