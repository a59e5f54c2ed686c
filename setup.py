"""Builds the libraries of megatron_kernels against the torch that is installed: `pip install --no-build-isolation .`

_C_cpu.abi3.so    op schemas and CPU kernels, one build of these per instruction set: always
_C_cuda.abi3.so   the CUDA kernels: where torch is a CUDA build and a CUDA compiler is found. MK_CUDA=1 ends the build with an error
                  where it is not, MK_CUDA=0 leaves it out; TORCH_CUDA_ARCH_LIST as torch knows it
_simt             the CUDA kernels as functions on the CPU, for tests: with MK_SIMT=1

The first two use LibTorch's stable ABI at its 2.10 level and Python's limited API: one wheel serves every Python >= 3.10 and
torch >= 2.10.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit("megatron_kernels builds against an installed torch >= 2.10: `pip install torch setuptools ninja`, "
             "then `pip install --no-build-isolation .`")

ROOT = Path(__file__).resolve().parent
OPS = ["scaled_masked_softmax", "bias_gelu", "layer_norm", "cross_entropy"]
FLAGS = {name: flags for name, *flags in (line.split() for line in (ROOT / "csrc/cpu/flags.txt").read_text().splitlines()
                                          if line[:1].isalpha())}
INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512bf16"] if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
# Error texts and debug information name files by their path in the source tree, not by the build machine's.
COMMON = [*FLAGS["common"], f"-ffile-prefix-map={ROOT}/="]
CXX = shlex.split(os.environ.get("CXX", "c++"))


def cuda_home() -> Path | None:
    """Where CUDA_HOME says, the compiler's pip packages, or a toolkit. An nvcc on the PATH may be a script."""
    candidates = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    if packages := importlib.util.find_spec("nvidia"):
        major = (torch.version.cuda or "0").split(".")[0]
        candidates += [Path(folder) / f"cu{major}" for folder in packages.submodule_search_locations or []]
    if nvcc := shutil.which("nvcc"):
        answer = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        candidates += [Path(top).resolve() for top in re.findall(r"^#\$ TOP=(.+)$", answer.stdout + answer.stderr, re.MULTILINE)]
    candidates.append(Path("/usr/local/cuda"))
    return next((home for home in candidates if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists()), None)


def no_cuda(home: Path | None) -> str:
    """Why there will be no CUDA library, or nothing."""
    if os.environ.get("MK_CUDA") == "0":
        return "MK_CUDA=0"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build"
    version = ".".join(torch.version.cuda.split(".")[:2])
    if home is None:
        return ("no CUDA compiler: install a toolkit, or pip install " +
                " ".join(f"nvidia-{part}=={version}.*" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl")))
    return "" if runtime_library(home) else (f"{home} has no lib64/libcudart_static.a or lib/libcudart_static.a: install the rest "
                                             f"of the toolkit, or pip install nvidia-cuda-runtime=={version}.*")


def runtime_library(home: Path) -> Path | None:
    """CUDA's runtime, linked statically: the library then loads beside a torch of another CUDA version."""
    return next((path for path in (home / "lib64/libcudart_static.a", home / "lib/libcudart_static.a") if path.exists()), None)


def gencode(nvcc: Path) -> list[str]:
    """Flags for TORCH_CUDA_ARCH_LIST, or for those of our architectures that this compiler knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    flags = []
    for name in (wanted or ARCHITECTURES).replace(" ", ";").split(";"):
        number, ptx = name.removesuffix("+PTX").replace(".", ""), name.endswith("+PTX")
        if name and (wanted or f"sm_{number}" in known):
            flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
            flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if ptx else []
    return flags


def cpu_jobs() -> dict[str, list[str]]:
    """Object file -> command."""
    return {f"{op}.{isa}.o": [*CXX, *COMMON, *FLAGS["kernels"], *FLAGS[isa], f"-DMK_ISA={isa}", "-c", f"csrc/cpu/{op}.cpp"]
            for op in OPS for isa in INSTRUCTION_SETS}


def cuda_jobs(home: Path) -> dict[str, list[str]]:
    nvcc = home / "bin/nvcc"
    flags = ["-std=c++17", "-O3", *gencode(nvcc), f"-Xcompiler=-fPIC,-fvisibility=hidden,-ffile-prefix-map={ROOT}/="]
    return {f"{op}.cuda.o": [str(nvcc), *flags, "-c", f"csrc/cuda/{op}.cu"] for op in OPS}


def simt_jobs() -> dict[str, list[str]]:
    command = [*CXX, *COMMON, "-O2", "-c"]
    return {**{f"{op}.simt.o": [*command, "-x", "c++", f"csrc/cuda/{op}.cu"] for op in OPS},
            **{f"simt_{path.stem}.o": [*command, str(path.relative_to(ROOT))] for path in sorted(ROOT.glob("csrc/simt/*.cpp"))}}


def compile_all(jobs: dict[str, list[str]], build: Path) -> None:
    """Run the commands whose object is older than any source."""
    build.mkdir(parents=True, exist_ok=True)
    sources = [path for pattern in ("setup.py", "csrc/*.h", "csrc/c*/*", "csrc/simt/*") for path in ROOT.glob(pattern)]
    newest = max(path.stat().st_mtime for path in sources)

    def compile_one(job: tuple[str, list[str]]) -> None:
        target = build / job[0]
        if not target.exists() or target.stat().st_mtime < newest:
            command = [*job[1], "-o", str(target)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True, cwd=ROOT)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs.items()))


def library(name: str, sources: list[str], *macros: str, **options: object) -> CppExtension:
    """One with the stable ABI; each has a build of its own of csrc/binding/<op>.cpp."""
    return CppExtension(f"megatron_kernels.{name}", [*sources, *(f"csrc/binding/{op}.cpp" for op in OPS)],
                        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), *((macro, None) for macro in macros)],
                        extra_compile_args=["-O2", "-g0", *COMMON], **options)


home = cuda_home()
missing = no_cuda(home)
if missing and os.environ.get("MK_CUDA") == "1":
    sys.exit(f"megatron_kernels: MK_CUDA=1, but {missing}")

LIBRARIES = [(library("_C_cpu", ["csrc/cpu/isa.cpp", "csrc/binding/schema.cpp"], "TORCH_STABLE_ONLY", py_limited_api=True),
              cpu_jobs())]
if not missing:
    LIBRARIES.append((library("_C_cuda", [], "TORCH_STABLE_ONLY", "MK_BINDING_CUDA", py_limited_api=True, libraries=["torch_cuda"],
                              extra_link_args=[str(runtime_library(home)), "-ldl", "-lrt", "-lpthread"]), cuda_jobs(home)))
if os.environ.get("MK_SIMT") == "1":
    LIBRARIES.append((library("_simt", ["csrc/binding/schema.cpp", "csrc/binding/simt.cpp"], "MK_BINDING_SIMT"), simt_jobs()))


class Build(BuildExtension):
    def build_extensions(self):
        print(f"megatron_kernels: no CUDA library: {missing}" if missing else f"megatron_kernels: CUDA compiler in {home}")
        build = Path(self.build_temp)
        compile_all({target: command for _, jobs in LIBRARIES for target, command in jobs.items()}, build)
        for extension, jobs in LIBRARIES:
            extension.extra_objects += [str(build / target) for target in jobs]
        super().build_extensions()

    def build_extension(self, extension):
        """The libraries have sources in common, so each has a folder for its objects."""
        folder = self.build_temp
        self.build_temp = os.path.join(folder, extension.name)
        super().build_extension(extension)
        self.build_temp = folder


setup(
    ext_modules=[extension for extension, _ in LIBRARIES],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
