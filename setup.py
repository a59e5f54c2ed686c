"""Builds megatron_kernels/_C_cpu.abi3.so: the op schemas and the CPU kernels, one build of these per instruction set.

The library uses LibTorch's stable ABI at its 2.10 level and Python's limited API, so that one wheel serves every Python >= 3.10
and torch >= 2.10. Build with `pip install --no-build-isolation .`, against the torch that is installed.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit("megatron_kernels builds against an installed torch >= 2.10: `pip install torch setuptools ninja`, "
             "then `pip install --no-build-isolation .`")

ROOT = Path(__file__).resolve().parent
OPS = ["scaled_masked_softmax", "bias_gelu", "layer_norm", "cross_entropy"]
FLAGS = {name: flags for name, *flags in (line.split() for line in (ROOT / "csrc/cpu/flags.txt").read_text().splitlines()
                                          if line[:1].isalpha())}
INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512bf16"] if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
# Error texts and debug information name files by their path in the source tree, not by the build machine's.
COMMON = [*FLAGS["common"], f"-ffile-prefix-map={ROOT}/="]


class Build(BuildExtension):
    def build_extensions(self):
        objects = compile_kernels(Path(self.build_temp))
        for extension in self.extensions:
            extension.extra_objects += objects
        super().build_extensions()


def compile_kernels(build: Path) -> list[str]:
    """Compile csrc/cpu/<op>.cpp once per instruction set; what is newer than every source and header is kept."""
    build.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for pattern in ("csrc/*.h", "csrc/cpu/*") for path in ROOT.glob(pattern))
    compiler = shlex.split(os.environ.get("CXX", "c++"))

    def compile_one(job: tuple[str, str]) -> str:
        op, isa = job
        target = build / f"{op}.{isa}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, Path(__file__).stat().st_mtime):
            command = [*compiler, *COMMON, *FLAGS["kernels"], *FLAGS[isa], f"-DMK_ISA={isa}", "-c", f"csrc/cpu/{op}.cpp",
                       "-o", str(target)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True, cwd=ROOT)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, [(op, isa) for op in OPS for isa in INSTRUCTION_SETS]))


setup(
    ext_modules=[CppExtension(
        "megatron_kernels._C_cpu",
        ["csrc/cpu/isa.cpp", "csrc/binding/schema.cpp", *(f"csrc/binding/{op}.cpp" for op in OPS)],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)],
        extra_compile_args=["-O2", "-g0", *COMMON],
        py_limited_api=True,
    )],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
