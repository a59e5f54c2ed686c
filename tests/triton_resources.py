"""What Triton's compiler made of the kernels, without a GPU: registers, shared memory and spills, for NVIDIA's GPUs and AMD's.

    python tests/triton_resources.py             prints them as JSON, of every configuration that the modules list, for every target
    python tests/triton_resources.py --quick     of every configuration for one target, in turn: what `make test` has time for
    python tests/triton_resources.py --write     rewrites tests/triton_budgets.csv, which tests/test_triton.py compares with

Runs in a process of its own, for under TRITON_INTERPRET kernels are plain functions. Triton keeps what it compiled in its cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before triton's own functions are made for the interpreter

import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "tests/triton_budgets.csv"
OPS = ("bias_gelu", "cross_entropy", "layer_norm", "scaled_masked_softmax")
# By target: its backend and name for Triton, the threads of a warp, and the most shared memory of a block (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability"; for AMD the LDS).
TARGETS = {"cuda:80": ("cuda", 80, 32, 163 << 10), "cuda:90": ("cuda", 90, 32, 227 << 10), "cuda:100": ("cuda", 100, 32, 227 << 10),
           "cuda:120": ("cuda", 120, 32, 99 << 10), "hip:gfx90a": ("hip", "gfx90a", 64, 64 << 10),
           "hip:gfx942": ("hip", "gfx942", 64, 64 << 10)}
ALIGNED = [["tt.divisibility", 16]]


def cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def missing(target: str) -> str:
    """Why a target can't be compiled for, or the result not be read, or ""."""
    backend = TARGETS[target][0]
    if {"cuda": "nvidia", "hip": "amd"}[backend] not in triton.backends.backends:
        return f"Triton {triton.__version__} has no backend for {backend}"
    return "Triton has no cuobjdump" if backend == "cuda" and not cuobjdump().exists() else ""


def read_cuda(cubin: bytes) -> tuple[int, int]:
    """Registers; what spilled: bytes of stack and local memory, and instructions that access them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{cuobjdump().parent}{os.pathsep}{os.environ['PATH']}"}
        usage, code = (subprocess.run([cuobjdump(), option, file.name], capture_output=True, text=True, check=True,
                                      env=environment).stdout for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found and "STG" in code, "cuobjdump prints something else than expected"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local + len(re.findall(r"\b(?:STL|LDL)\b", code))


def read_hip(text: str) -> tuple[int, int]:
    """Vector registers; what spilled: registers of either kind, and bytes of private memory."""
    number = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.M)}
    return number["vgpr_count"], number["vgpr_spill_count"] + number["sgpr_spill_count"] + number["private_segment_fixed_size"]


def compile_one(kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, target: str) -> dict[str, int]:
    """With pointers and the number of columns divisible by 16, as they mostly are."""
    backend, architecture, warp_size, _ = TARGETS[target]
    signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {(i,): ALIGNED for i, (name, kind) in enumerate(signature.items())
                  if kind.startswith("*") or (name == "cols" and kind != "constexpr")}
    made = triton.compile(triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
                          target=GPUTarget(backend, architecture, warp_size), options={"num_warps": warps})
    registers, spills = read_cuda(made.asm["cubin"]) if backend == "cuda" else read_hip(made.asm["amdgcn"])
    return {"registers": registers, "shared": made.metadata.shared, "spills": spills}


def module(op: str) -> ModuleType:
    return import_module(f"megatron_kernels.triton.{op}")


def measure(job: tuple[str, int, str]) -> tuple[str, str, dict[str, int] | str]:
    """(configuration, target, resources or why there are none); a process of its own has only numbers to start from."""
    op, index, target = job
    kernel, signature, constants, warps, label = module(op).compilations()[index]
    try:
        return f"{op}: {label}", target, compile_one(kernel, signature, constants, warps, target)
    except Exception:
        return f"{op}: {label}", target, traceback.format_exc(limit=-2)[-2000:]


def measure_all(quick: bool) -> dict[str, Any]:
    absent = {target: why for target in TARGETS if (why := missing(target))}
    targets = [target for target in TARGETS if target not in absent]
    jobs, listed, written = [], set(), set()
    for op in OPS:
        written |= {f"{op}: {name}" for name in vars(module(op)) if name.endswith("_kernel")}
        for index, (kernel, *_) in enumerate(module(op).compilations()):
            listed.add(f"{op}: {kernel.__name__}")
            # Shifted after each round, lest a list's own period meet the same target again and again.
            turn = targets[(index + index // len(targets)) % len(targets)] if targets else None
            jobs += [(op, index, target) for target in targets if not quick or target == turn]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(measure, jobs, chunksize=4))
    found: dict[str, Any] = {"triton": triton.__version__, "missing": absent, "unlisted": sorted(written - listed), "failed": {},
                             "resources": {}}
    for key, target, result in results:
        if isinstance(result, str):
            found["failed"][f"{key} for {target}"] = result
        else:
            assert target not in found["resources"].setdefault(key, {}), f"two configurations are named {key}"
            found["resources"][key][target] = result
    return found


def load(path: Path = BUDGETS) -> tuple[str, dict[str, dict[str, dict[str, int]]]]:
    """The version of Triton that the budgets are for, and by configuration and target what it needed."""
    first, header, *lines = path.read_text(encoding="utf-8").splitlines()
    columns = [column.split(" ") for column in header.split(";")[1:]]
    budgets: dict[str, dict[str, dict[str, int]]] = {}
    for line in lines:
        key, *values = line.split(";")
        for (target, what), value in zip(columns, values, strict=True):
            budgets.setdefault(key, {}).setdefault(target, {})[what] = int(value)
    return first.removeprefix("# Triton "), budgets


def write(version: str, resources: dict[str, dict[str, dict[str, int]]], path: Path = BUDGETS) -> None:
    """Semicolons between columns, for configurations have commas in their names."""
    columns = [(target, what) for target in TARGETS for what in ("registers", "shared")]
    lines = [f"# Triton {version}", ";".join(["configuration", *map(" ".join, columns)])]
    lines += [";".join([key, *(str(by_target[target][what]) for target, what in columns)]) for key, by_target in resources.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = measure_all(options.quick and not options.write)
    if not options.write:
        print(json.dumps(found))
    elif found["missing"] or found["failed"]:
        sys.exit(f"nothing written: {json.dumps({name: found[name] for name in ('missing', 'failed')}, indent=2)}")
    else:
        write(found["triton"], found["resources"])
        for key, by_target in found["resources"].items():
            if spilling := [target for target, resources in by_target.items() if resources["spills"]]:
                print(f"{key} spills for {', '.join(spilling)}", file=sys.stderr)


if __name__ == "__main__":
    main()
