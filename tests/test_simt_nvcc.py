"""The dialect of GPU kernels under nvcc: every construct compiles for every architecture, without spills, and packets are 128 bits.

tests/cpp/simt_example.cu has a kernel of each shape; the same file runs on the CPU in tests/cpp/simt_example.cpp. Needs a CUDA
toolkit and cuobjdump with nvdisasm (the triton package brings both), but no GPU.
"""

from __future__ import annotations

import cubins
import pytest
import sass

SOURCE = cubins.ROOT / "tests/cpp/simt_example.cu"

pytestmark = pytest.mark.skipif(bool(cubins.missing()), reason=cubins.missing())


@pytest.mark.parametrize("architecture", cubins.ARCHITECTURES)
def test_example_kernels(architecture, tmp_path):
    cubin = cubins.compile_cubin(SOURCE, architecture, tmp_path)
    kernels = cubins.read(cubin, architecture, SOURCE)
    assert len(kernels) == 39
    assert [kernel.name for kernel in kernels if kernel.spilling] == []
    assert max(kernel.registers for kernel in kernels) <= 96

    widths = [kernel.width for kernel in kernels]
    assert widths.count("full") == widths.count("single") == 18
    for kernel in kernels:
        if kernel.width == "full":
            assert kernel.loads and kernel.stores, kernel
        elif kernel.width == "single":
            assert not kernel.loads and not kernel.stores, kernel
        else:
            assert kernel.name.startswith("column_totals"), kernel

    # Data used once passes through the caches: evict-first.
    accesses = [one.name for symbol, code in sass.parse(cubins.run("cuobjdump", "-sass", cubin)).items() if "normalise" in symbol
                for one in code if one.is_global]
    assert accesses and all(".EF" in name for name in accesses), accesses
