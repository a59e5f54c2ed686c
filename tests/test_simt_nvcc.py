"""The dialect of GPU kernels under nvcc: every construct compiles for every architecture, without spills, and packets are 128 bits.

tests/cpp/simt_example.cu has a kernel of each shape; the same file runs on the CPU in tests/cpp/simt_example.cpp. Needs a CUDA
toolkit and cuobjdump with nvdisasm (the triton package brings both), but no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests/cpp/simt_example.cu"
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
FULL = {"f": 4, "half": 8, "bfloat16": 8}


def tools() -> str:
    """The folder of cuobjdump and nvdisasm, or ""."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    for folder in (beside, Path(found).parent if found else None):
        if folder and (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return str(folder)
    return ""


pytestmark = [
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
    pytest.mark.skipif(not tools(), reason="needs cuobjdump and nvdisasm (the triton package has them)"),
]


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "PATH": os.pathsep.join([tools(), os.environ["PATH"]])})
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def compile_cubin(source: Path, architecture: str, folder: Path) -> Path:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    run("nvcc", "-std=c++17", "-Werror", "all-warnings", f"-arch={architecture}", "-cubin", source, "-o", cubin)
    return cubin


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    text = run("cuobjdump", "-res-usage", cubin)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            for name, line in re.findall(r"Function (\S+):\n\s*(.+)", text)}


def instructions(cubin: Path) -> Iterator[tuple[str, list[str]]]:
    for part in run("cuobjdump", "-sass", cubin).split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        yield name.strip(), re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", code)


def element_and_width(symbol: str) -> tuple[str, int] | None:
    """Of a symbol like ...kernelI<T>Li<W>E..., the first two template arguments."""
    found = re.search(r"_kernelI(?:NS_\d+(bfloat16|half)E|(f))Li(\d+)E", symbol)
    return (found[1] or found[2], int(found[3])) if found else None


def spilling(usage: dict[str, dict[str, int]], code: dict[str, list[str]]) -> list[str]:
    return [name for name in usage if usage[name]["STACK"] or usage[name].get("LOCAL")
            or any(op.startswith(("STL", "LDL")) for op in code[name])]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_example_kernels(architecture, tmp_path):
    cubin = compile_cubin(SOURCE, architecture, tmp_path)
    usage, code = resources(cubin), dict(instructions(cubin))
    assert usage.keys() == code.keys() and len(code) == 39
    assert spilling(usage, code) == []
    assert max(use["REG"] for use in usage.values()) <= 96

    full = single = 0
    for name, ops in code.items():
        parsed = element_and_width(name)
        if not parsed:
            assert "column_totals" in name
            continue
        element, width = parsed
        loads = [op for op in ops if op.startswith("LDG")]
        stores = [op for op in ops if op.startswith("STG")]
        wide = [any(".128" in op for op in group) for group in (loads, stores)]
        if width == FULL[element]:
            full += 1
            assert all(wide), f"{name}: {loads} {stores}"
            if "normalise" in name:  # data used once passes through: evict-first
                assert all(".EF" in op for op in loads + stores), f"{name}: {loads} {stores}"
        else:
            assert width == 1
            single += 1
            assert not any(wide), f"{name}: {loads} {stores}"
    assert full == single == 18


def test_planted_spill_is_seen(tmp_path):
    """Registers for far fewer threads than asked for: the check must notice."""
    source = tmp_path / "spill.cu"
    source.write_text("__global__ void __launch_bounds__(1024, 2) spill(float* p) {\n  float v[200];\n#pragma unroll\n"
                      "  for (int i = 0; i < 200; ++i) v[i] = p[i * 32 + threadIdx.x];\n  __syncthreads();\n#pragma unroll\n"
                      "  for (int i = 0; i < 200; ++i) p[i * 32 + threadIdx.x] = v[i] * v[199 - i];\n}\n", encoding="utf-8")
    cubin = compile_cubin(source, "sm_90", tmp_path)
    assert len(spilling(resources(cubin), dict(instructions(cubin)))) == 1
