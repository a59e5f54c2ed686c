"""The CPU kernels without torch: CMake's build, the C++ tests on every instruction set of this processor, and sanitizers."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(path.stem for path in (ROOT / "megatron_kernels/ops").glob("*.py") if path.stem != "__init__")
FLAGS = {name: flags for name, *flags in (line.split() for line in (ROOT / "csrc/cpu/flags.txt").read_text("utf-8").splitlines()
                                          if line[:1].isalpha())}
INSTRUCTION_SETS = [name for name in FLAGS if name not in ("common", "kernels")]
if platform.machine() not in ("x86_64", "AMD64"):
    INSTRUCTION_SETS = ["baseline"]
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the environment's tools need not be on the PATH
MISSING = [tool for tool in ("cmake", "ctest", "ninja") if not shutil.which(tool, path=SEARCH)]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (pip install cmake ninja)")


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "PATH": SEARCH, **environment})
    assert done.returncode == 0, f"{shlex.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def configure(folder: Path, sanitize: str) -> None:
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DMK_SANITIZE={sanitize}")


def build(name: str, sanitize: str = "") -> Path:
    """Brings build/<name> up to date."""
    folder = ROOT / "build" / name
    try:
        configure(folder, sanitize)
    except AssertionError:  # configured by a compiler or for a checkout that has moved
        shutil.rmtree(folder, ignore_errors=True)
        configure(folder, sanitize)
    run("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="module")
def built() -> Path:
    return build("cpp")


def test_kernels(built):
    run("ctest", "--test-dir", built, "--output-on-failure", "--no-tests=error", "-j", os.cpu_count() or 1)


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_kernels_under_sanitizers(sanitize):
    folder = build(f"cpp-{sanitize.replace(',', '-')}", sanitize)
    run("ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error", "-j", os.cpu_count() or 1,
        UBSAN_OPTIONS="print_stacktrace=1", ASAN_OPTIONS="detect_leaks=0")  # leak detection needs ptrace


def test_every_kernel_is_compiled_for_every_instruction_set(built):
    """With the flags that setup.py uses, and tested."""
    database = json.loads((built / "compile_commands.json").read_text(encoding="utf-8"))
    commands = {words[words.index("-o") + 1]: words for words in (shlex.split(entry["command"]) for entry in database)}
    tests = {test["name"] for test in json.loads(run("ctest", "--test-dir", built, "--show-only=json-v1"))["tests"]}
    for isa in INSTRUCTION_SETS:
        for op in OPS:
            command = commands[f"CMakeFiles/kernels_{isa}.dir/csrc/cpu/{op}.cpp.o"]
            wanted = [*FLAGS["common"], *FLAGS["kernels"], *FLAGS[isa], f"-DMK_ISA={isa}"]
            assert [word for word in command if word in wanted] == sorted(wanted, key=command.index)
        assert {f"{test}.{isa}" for test in [*OPS, "vec"]} <= tests


def strays(objects: list[Path], isa: str) -> list[str]:
    """What the linker could merge with another build's: every symbol that is not this instruction set's own."""
    names = (line.split(maxsplit=2)[-2:] for line in run("nm", "-C", "--defined-only", "--extern-only", *objects).splitlines())
    return [f"{kind[0]} {kind[1]}" for kind in names
            if len(kind) == 2 and (kind[0] != "T" or not kind[1].startswith(f"mk::cpu::{isa}::"))]


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
def test_instruction_sets_share_no_code(built, tmp_path):
    """Of an inline function the linker keeps one copy, whose ever: baseline code could end up with AVX-512 instructions."""
    for isa in INSTRUCTION_SETS:
        objects = sorted(built.glob(f"CMakeFiles/kernels_{isa}.dir/csrc/cpu/*.o"))
        assert [path.name for path in objects] == [f"{op}.cpp.o" for op in OPS]
        assert strays(objects, isa) == []

    planted = tmp_path / "planted.cpp"
    planted.write_text("#include <vector>\nnamespace mk::cpu::avx2 {\ninline int one() { return 1; }\n"
                       "int two(std::vector<int>& v) { v.push_back(one()); return 2; }\n}\n", encoding="utf-8")
    run(*shlex.split(os.environ.get("CXX", "c++")), "-c", planted, "-o", tmp_path / "planted.o")
    found = strays([tmp_path / "planted.o"], "avx2")
    assert "W mk::cpu::avx2::one()" in found
    assert any("std::vector<int" in name for name in found)
    assert not any("two(" in name for name in found)
