"""Command-line options, and the implementations that every op test runs on."""

from __future__ import annotations

import pytest
import torch

import megatron_kernels as mk

INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512bf16"]


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


@pytest.fixture(params=[f"cpu-{isa}" for isa in INSTRUCTION_SETS])
def implementation(request):
    """The test runs inside `mk.use` of each implementation, the CPU's with each instruction set that this processor has."""
    name, _, isa = request.param.partition("-")
    try:
        torch.ops.megatron_kernels._set_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    with mk.use(name):
        yield request.param
    torch.ops.megatron_kernels._set_isa("best")


@pytest.fixture
def poisoned():
    """Memory that the ops allocate is full of NaN: an element that nobody writes can't pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
