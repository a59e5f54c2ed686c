"""What nvcc made of the CUDA kernels, without a GPU: registers, memory accesses and instructions of every kernel and architecture.

    python tests/cubins.py            names the kernels that are not bound by memory, that spill, or that leave few threads room
    python tests/cubins.py --write    also rewrites tests/budgets.csv, which tests/test_cubins.py compares with

Cubins and what was read from them are kept in build/cubins/, and made again when a source, nvcc or this file has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
BUDGETS = ROOT / "tests/budgets.csv"
CACHE = ROOT / "build/cubins"
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]

# Threads, blocks and bytes of shared memory of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". A multiprocessor of each of them has four parts with 16384 registers, which a warp takes 256 at a time, and a block's
# shared memory is 1024 bytes of the driver's and its own, 128 bytes at a time: cuda_occupancy.h of the toolkit.
LIMITS = {"sm_80": (2048, 32, 164 << 10), "sm_90": (2048, 32, 228 << 10), "sm_100": (2048, 32, 228 << 10),
          "sm_120": (1536, 24, 100 << 10)}
ARCHITECTURES = list(LIMITS)
TYPES = {"float": "fp32", "half": "fp16", "bfloat16": "bf16"}
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Elements of T that a kernel moves per element of a row; the same where the row is too long for registers (kPackets = 0). Of a loop
# that stores nothing: loads of tensors of T, and of parameters, which may be floats.
TRAFFIC = {
    "scaled_masked_softmax_forward": (2, 3, 1, 0), "scaled_masked_softmax_backward": (3, 5, 2, 0),
    "bias_gelu_forward": (2, 2, 1, 0), "bias_gelu_backward": (3, 3, 2, 0),
    "layer_norm_forward": (2, 3, 1, 0), "layer_norm_backward": (3, 3, 2, 0),
    "layer_norm_backward_means": (2, 2, 2, 1), "layer_norm_backward_columns": (3, 3, 2, 0),
    "cross_entropy_forward": (1, 1, 1, 0), "cross_entropy_backward": (2, 2, 1, 0),
}
# An H100 issues 132 multiprocessors x 4 warps x 32 lanes x 1.7 GHz = 29e12 thread instructions a second and moves 3.35e12 bytes: a
# kernel with more instructions per byte waits for its arithmetic, not for memory.
PER_BYTE = 9
COLUMNS = ["threads", "shared", "registers", "loads", "stores", "narrow", "instructions", "limit", "occupancy"]


def tools() -> str:
    """The folder of cuobjdump and nvdisasm, or ""."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    for folder in (beside, Path(found).parent if found else None):
        if folder and (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return str(folder)
    return ""


def missing() -> str:
    """Why nothing can be compiled or read here, or ""."""
    if not shutil.which("nvcc"):
        return "needs nvcc"
    if not tools():
        return "needs cuobjdump and nvdisasm (the triton package has them)"
    return "" if shutil.which("c++filt") else "needs c++filt (binutils)"


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "PATH": os.pathsep.join([tools(), os.environ["PATH"]])}, **options)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


@cache
def compiler() -> str:
    return re.search(r"V[\d.]+", run("nvcc", "--version"))[0]


def compile_cubin(source: Path, architecture: str, folder: Path) -> Path:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    run("nvcc", *FLAGS, f"-arch={architecture}", "-cubin", source, "-o", cubin)
    return cubin


@dataclass
class Kernel:
    name: str  # as name<arguments>
    arguments: dict[str, str]  # of the template: {"T": "bf16", "W": "8", "kPackets": "4"}
    threads: int  # the most that a block may have
    registers: int
    shared: int
    stack: int
    local: int
    spills: int  # instructions that access local memory
    loads: int  # of 128 bits, of global memory
    stores: int
    narrow: int  # narrower accesses
    halves: int  # of these, stores of 64 bits
    regions: list[list[int]]  # see sass.py: instructions, 128-bit loads, 128-bit stores
    occupancy: int  # percent of the multiprocessor's threads, with blocks of `threads`

    @property
    def width(self) -> str:
        """Of packets: full for 16 bytes, single for one element, else partial; nothing for a kernel without packets."""
        if "W" not in self.arguments:
            return ""
        full = 16 // SIZES[self.arguments["T"]]
        return {full: "full", 1: "single"}.get(int(self.arguments["W"]), "partial")

    @property
    def spilling(self) -> bool:
        return bool(self.stack or self.local or self.spills)

    @property
    def traffic(self) -> tuple[int, int, int, int] | None:
        """Only of kernels that walk the rows of tensors in full packets: in others instructions per element say little."""
        return TRAFFIC.get(self.name.split("<")[0]) if self.width == "full" else None

    @property
    def instructions(self) -> float | None:
        """Of a thread per element of a row: an upper bound for long aligned rows, as sass.py describes it."""
        if not self.traffic:
            return None
        width, held = int(self.arguments["W"]), int(self.arguments.get("kPackets", 0))
        per_packet = self.traffic[2] + self.traffic[3] * width // 4
        # Where stores outnumber loads, the rest of them only fills.
        return round(sum(count / (held or min(loads, stores) or loads / per_packet)
                         for count, loads, stores in self.regions) / width, 1)

    @property
    def limit(self) -> int | None:
        """So many instructions per element take as long as its bytes; a mask's byte is not counted."""
        if not self.traffic:
            return None
        tensors = self.traffic[self.arguments.get("kPackets") == "0"]
        return PER_BYTE * tensors * SIZES[self.arguments["T"]]


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> int:
    most_threads, most_blocks, memory = LIMITS[architecture]
    warps = -(-threads // 32)
    warps_by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256))
    blocks = min(most_blocks, most_threads // (32 * warps), warps_by_registers // warps, memory // (1024 + -(-shared // 128) * 128))
    return round(100 * blocks * warps * 32 / most_threads)


@cache
def parameters(source: Path) -> dict[str, list[str]]:
    """The names of every kernel template's parameters, and of every enumeration's values."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (*(ROOT / "csrc/cuda").glob("*.h"), source))
    found = re.findall(r"template <([^<>]*)>\s*MK_KERNEL\b[^;{]*?\b(\w+_kernel)\(", text)
    values = re.findall(r"enum class (\w+) {([^}]*)}", text)
    return {**{name: [parameter.split()[-1] for parameter in given.split(",")] for given, name in found},
            **{name: [value.strip() for value in given.split(",")] for name, given in values}}


def describe(demangled: str, source: Path) -> tuple[str, dict[str, str]]:
    """bias_gelu_forward<bf16 W8 GeluErf> and its template arguments."""
    plain = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", demangled)
    name, rest = re.match(r"(?:void )?(\w+)(.*)", plain).groups()
    inside = rest[1:rest.index(">(")] if rest.startswith("<") else ""
    values = []
    for value in re.findall(r"(?:[^,<]|<[^<>]*>)+", inside):
        value = re.sub(r"<.*", "", value.strip())
        enumerator = re.fullmatch(r"\((\w+)\)(\d+)", value)
        values.append(parameters(source)[enumerator[1]][int(enumerator[2])] if enumerator else TYPES.get(value, value))
    arguments = dict(zip(parameters(source)[name], values, strict=True)) if values else {}
    shown = []
    for parameter, value in arguments.items():
        word = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", parameter.removeprefix("k")).lower()
        if value in ("true", "false"):
            shown += [word] if value == "true" else []
        elif parameter.startswith("k"):
            shown.append(f"{word}={value}")
        else:
            shown.append(f"W{value}" if parameter == "W" else value)
    return name.removesuffix("_kernel") + (f"<{' '.join(shown)}>" if shown else ""), arguments


def read(cubin: Path, architecture: str, source: Path) -> list[Kernel]:
    usage = {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
             for name, line in re.findall(r"Function (\S+):\n\s*(.+)", run("cuobjdump", "-res-usage", cubin))}
    bounds = {}
    for part in run("cuobjdump", "-elf", cubin).split("\n.nv.info.")[1:]:
        if found := re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\S+) (\S+) (\S+)", part.split("\n.")[0]):
            bounds[part.split("\n")[0]] = int(found[1], 16) * int(found[2], 16) * int(found[3], 16)
    code = sass.parse(run("cuobjdump", "-sass", cubin))
    assert usage.keys() == code.keys(), cubin
    demangled = run("c++filt", input="\n".join(code)).split("\n")
    kernels = []
    for (symbol, body), plain in zip(code.items(), demangled, strict=True):
        use, accesses = usage[symbol], [one for one in body if one.is_global]
        threads = bounds.get(symbol, 1024)
        # From sm_90 on the driver's part of a block's shared memory is reported with it, where there is any.
        shared = use["SHARED"] - (1024 if use["SHARED"] and architecture != "sm_80" else 0)
        kernels.append(Kernel(
            *describe(plain, source), threads, use["REG"], shared, use["STACK"], use["LOCAL"],
            spills=sum(one.name.startswith(("STL", "LDL")) for one in body),
            loads=sum(one.is_wide and one.name.startswith("LD") for one in accesses),
            stores=sum(one.is_wide and one.name.startswith("ST") for one in accesses),
            narrow=sum(not one.is_wide for one in accesses),
            halves=sum(one.name.startswith("ST") and ".64" in one.name for one in accesses),
            regions=[[weight.instructions, weight.loads, weight.stores] for weight in sass.Graph(body).regions()],
            occupancy=occupancy(architecture, threads, use["REG"], shared)))
    return kernels


def fingerprint(source: Path) -> str:
    headers = sorted(path for pattern in ("csrc/*.h", "csrc/cuda/*.h", "csrc/simt/*.h") for path in ROOT.glob(pattern))
    texts = [path.read_bytes() for path in (source, *headers, Path(__file__), Path(sass.__file__))]
    return hashlib.sha256(b"\0".join([compiler().encode(), *texts])).hexdigest()


def measure(source: Path, architecture: str) -> list[Kernel]:
    key, kept = fingerprint(source), CACHE / f"{source.stem}.{architecture}.json"
    if kept.exists() and (found := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return [Kernel(**kernel) for kernel in found["kernels"]]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        cubin = compile_cubin(source, architecture, Path(folder))
        kernels = read(cubin, architecture, source)
        if fingerprint(source) == key:  # nobody has edited it meanwhile
            report = Path(folder) / "report"
            report.write_text(json.dumps({"key": key, "kernels": list(map(asdict, kernels))}), encoding="utf-8")
            os.replace(cubin, kept.with_suffix(".cubin"))
            os.replace(report, kept)
    return kernels


def measure_all(sources: Iterable[Path] = SOURCES) -> dict[str, dict[str, dict[str, Kernel]]]:
    """By op, kernel and architecture."""
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: measure(*job), jobs)
        out: dict[str, dict[str, dict[str, Kernel]]] = {}
        for (source, architecture), kernels in zip(jobs, found, strict=True):
            for kernel in kernels:
                out.setdefault(source.stem, {}).setdefault(kernel.name, {})[architecture] = kernel
    return out


Rows = dict[str, dict[str, list[str]]]  # by "op,kernel" and column: a value per architecture


def rows(measured: dict[str, dict[str, dict[str, Kernel]]]) -> Rows:
    def text(value: float | None) -> str:
        return "-" if value is None else str(value)

    return {f"{op},{name}": {column: [text(getattr(one, column)) for one in by_architecture.values()] for column in COLUMNS}
            for op, kernels in measured.items() for name, by_architecture in sorted(kernels.items())}


def write(path: Path, table: Rows) -> None:
    lines = [f"# nvcc {compiler()}. Four values are those of {', '.join(ARCHITECTURES)}; one holds for all.",
             ",".join(["op", "kernel", *COLUMNS])]
    for key, row in table.items():
        lines.append(",".join([key, *(values[0] if len(set(values)) == 1 else " ".join(values) for values in row.values())]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(path: Path) -> tuple[str, Rows]:
    """The version of nvcc, and what its kernels had."""
    first, _, *lines = path.read_text(encoding="utf-8").splitlines()
    table: Rows = {}
    for op, name, *row in (line.split(",") for line in lines):
        values = [value.split(" ") for value in row]
        values = [one * len(ARCHITECTURES) if len(one) == 1 else one for one in values]
        table[f"{op},{name}"] = dict(zip(COLUMNS, values, strict=True))
    return re.search(r"V[\d.]+(?<!\.)", first)[0], table


def main() -> None:
    if why := missing():
        sys.exit(f"cubins.py {why}")
    measured = measure_all()
    if sys.argv[1:] == ["--write"]:
        write(BUDGETS, rows(measured))
    above, spills, few = [], [], []
    for op, kernels in measured.items():
        for name, by_architecture in kernels.items():
            every = list(by_architecture.values())
            most, limit = max(one.instructions or 0 for one in every), max(one.limit or 0 for one in every)
            least = min(one.occupancy for one in every)
            above += [f"{op}: {name}: {most} of {limit}"] if most > limit else []
            spills += [f"{op}: {name} on {architecture}: {one.spills} accesses"
                       for architecture, one in by_architecture.items() if one.spilling]
            few += [f"{op}: {name}: {least}%"] if least < 50 else []
    print(f"More instructions per element than memory takes time for: {len(above)}", *above, sep="\n  ")
    print(f"Local memory: {len(spills)}", *spills, sep="\n  ")
    print(f"Room for less than half of a multiprocessor's threads: {len(few)}", *few, sep="\n  ")


if __name__ == "__main__":
    main()
