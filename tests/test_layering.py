"""The rules that the source tree keeps, by machine. A folder is a rule about what its files may include and name.

A rule is a function from a tree to its violations. Each is run twice: on this checkout, where it must find nothing, and on a
small tree with a violation planted in it, where it must find exactly that file: a rule that can't fail is no rule.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ITSELF = "tests/test_layering.py"  # holds the planted violations
CODE = {".py", ".h", ".cpp", ".cu"}
TEXT = CODE | {".md", ".toml", ".yml", ".yaml", ".txt", ".in", ""}
SKIPPED = {".git", ".venv", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}

VARIABLES = {"MK_CUDA", "MK_SIMT", "TORCH_CUDA_ARCH_LIST"}
SOMEBODY_ELSES = {"TRITON_INTERPRET", "CXX", "CUDA_HOME"}  # conventions that we follow: Triton's switch, compilers
REFERENCE_IMPORTS = {"__future__", "collections.abc", "math", "torch", "typing"}
# Compiled once, for the baseline, so it may use the C++ library. All else below csrc/cpu is compiled per instruction set.
BASELINE_ONLY = {"csrc/cpu/isa.cpp"}
C_HEADERS = {"stdint.h", "stddef.h", "immintrin.h"}  # types, and intrinsics that are always inlined
LINES = 450


def files(root: Path, *suffixes: str, under: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of the files that git tracks or would track, by suffix and folder; every file where there is no git."""
    if (root / ".git").exists():
        listed = subprocess.run(["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"], check=True,
                                capture_output=True, text=True).stdout.split("\n")
        paths = {root / name for name in listed if name}
    else:
        paths = {path for path in root.rglob("*") if not SKIPPED & set(path.relative_to(root).parts)}
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        if path.is_file() and path.suffix in (suffixes or TEXT) and name.startswith(under):
            yield name, path.read_text(encoding="utf-8")


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def code_only(text: str) -> str:
    """C++ without comments and string literals."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', "", text, flags=re.DOTALL)


def search(root: Path, pattern: str, suffixes: set[str], why: str, under: str = "") -> list[str]:
    return [f"{name}:{number}: {why}: {line.strip()}" for name, text in files(root, *suffixes, under=under) if name != ITSELF
            for number, line in enumerate(text.split("\n"), 1) if re.search(pattern, line)]


def only_binding_includes_torch(root: Path) -> list[str]:
    return [f"{name}: includes {header}" for name, text in files(root, ".h", ".cpp", ".cu", under="csrc/")
            if not name.startswith("csrc/binding/") for header in includes(text)
            if re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", header)]


def binding_does_no_arithmetic(root: Path) -> list[str]:
    """Checks, allocates, fills the contract: no mathematical functions, no vector code, no loop over a tensor's elements."""
    problems = []
    for name, text in files(root, ".h", ".cpp", under="csrc/binding/"):
        problems += [f"{name}: includes {header}" for header in includes(text)
                     if header in ("cmath", "math.h", "numeric", "immintrin.h", "arm_neon.h") or header.endswith("scalar.h")]
        code = code_only(text)
        problems += [f"{name}: calls {call}" for call in re.findall(r"\b(?:exp|log|tanh|erf|sqrt|rsqrt|pow|fma)f?\s*\(", code)]
        problems += [f"{name}: {found}" for found in re.findall(r"#\s*pragma\s+omp.*|_mm\d*_\w+", code)]
        problems += [f"{name}: loops over elements: {loop}" for loop in
                     re.findall(r"\bfor\s*\([^)]*\b(?:numel\(\)|rows|cols)\b[^)]*\)", code)]
    return problems


def sources_include_their_contract_first(root: Path) -> list[str]:
    problems = []
    for name, text in [*files(root, ".cpp", under="csrc/cpu/"), *files(root, ".cu", under="csrc/cuda/")]:
        contract, first = f"{Path(name).stem}.h", (includes(text) or ["nothing"])[0]
        if (root / "csrc" / contract).exists() and Path(first).name != contract:
            problems.append(f"{name}: first includes {first}, not {contract}")
    return problems


def cuda_is_written_in_the_dialect(root: Path) -> list[str]:
    """What only nvcc understands stays out of the kernels: g++ compiles them too, to run them on the host."""
    sources = [source for under in ("csrc/cuda/", "csrc/simt/", "tests/") for source in files(root, ".cu", ".h", under=under)]
    return [f"{name}: {found}" for name, text in sources if name != "csrc/simt/nvcc.h"
            for found in re.findall(r"<<<|__shared__|\b__?asm\b|\basm\b|__CUDA_ARCH__", code_only(text))]


def every_folder_has_every_op(root: Path) -> list[str]:
    ops = {Path(name).stem for name, _ in files(root, ".py", under="megatron_kernels/ops/")} - {"__init__"}
    places = ["csrc/{}.h", "csrc/cpu/{}.cpp", "csrc/binding/{}.cpp", "tests/test_{}.py"]
    places += [place for place in ("csrc/cuda/{}.cu", "megatron_kernels/triton/{}.py") if (root / place).parent.exists()]
    wanted = [place.format(op) for op in sorted(ops) for place in places]
    missing = [f"{path}: missing" for path in wanted if not (root / path).exists()]
    specified = {node.name for _, text in files(root, ".py", under="megatron_kernels/reference.py")
                 for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    return missing + [f"megatron_kernels/reference.py: lacks {op}" for op in sorted(ops - specified)]


def _environment_keys(tree: ast.AST) -> Iterator[str]:
    """What a module asks of os.environ: the constant names, and "?" for a name made at run time."""
    def is_environ(node: ast.AST) -> bool:
        return getattr(node, "attr", None) == "environ" or getattr(node, "id", None) == "environ"

    def key(node: ast.AST) -> str:
        return str(node.value) if isinstance(node, ast.Constant) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            yield key(node.slice)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if is_environ(node.func.value) or node.func.attr == "getenv":
                yield key(node.args[0])
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            yield key(node.left)


def few_environment_variables(root: Path) -> list[str]:
    sources = [*files(root, ".py", under="megatron_kernels/"), *files(root, ".py", under="setup.py")]
    found = [(name, key) for name, text in sources for key in _environment_keys(ast.parse(text))]
    found += [(name, key) for name, text in files(root, ".h", ".cpp", ".cu", under="csrc/")
              for key in re.findall(r'getenv\s*\(\s*"?([^")]*)', text)]
    return [f"{name}: reads {key}" for name, key in found if key not in VARIABLES | SOMEBODY_ELSES]


def per_instruction_set_code_is_self_contained(root: Path) -> list[str]:
    """The linker keeps one copy of an inline function of the C++ library: the baseline could end up with AVX-512 code."""
    problems = []
    for name, text in files(root, ".h", ".cpp", under="csrc/"):
        if name in BASELINE_ONLY or not (name.startswith("csrc/cpu/") or name.count("/") == 1):
            continue
        problems += [f"{name}: includes <{header}>" for header in re.findall(r"^\s*#\s*include\s*<([^>]+)>", text, re.MULTILINE)
                     if header not in C_HEADERS and not header.endswith("intrin.h") and header != "arm_neon.h"]
        problems += [f"{name}: {use}" for use in re.findall(r"\bstd::\w+", code_only(text))]
    return problems


def reference_is_plain_torch(root: Path) -> list[str]:
    problems = []
    for name, text in files(root, ".py", under="megatron_kernels/reference.py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = ["." * node.level + (node.module or "")]
            else:
                continue
            problems += [f"{name}: imports {module}" for module in modules if module not in REFERENCE_IMPORTS]
    return problems


def no_banner_comments(root: Path) -> list[str]:
    return search(root, r"^\s*(#|//|/?\*)\s*[-=*#~_]{3,}", CODE | {".toml", ".yml", ".yaml", ""}, "banner")


def no_unfinished_business(root: Path) -> list[str]:
    return search(root, r"\b(TODO|FIXME|XXX|HACK)\b", TEXT, "unfinished")


def no_machine_paths(root: Path) -> list[str]:
    return search(root, r"(?<![\w.$}])/(work|root|home|Users)/|[A-Z]:\\Users", TEXT, "path of one machine")


def files_are_short(root: Path) -> list[str]:
    lengths = {name: text.count("\n") for name, text in files(root, *CODE)}
    return [f"{name}: {lines} lines, at most {LINES}" for name, lines in lengths.items() if lines > LINES]


# Each rule with a file that breaks it.
PLANTED: dict[Callable[[Path], list[str]], tuple[str, str]] = {
    only_binding_includes_torch: ("csrc/cpu/layer_norm.cpp", '#include "../layer_norm.h"\n#include <torch/extension.h>\n'),
    binding_does_no_arithmetic: ("csrc/binding/layer_norm.cpp", "float f(float x) { return std::exp(x); }\n"),
    sources_include_their_contract_first: ("csrc/cpu/layer_norm.cpp", '#include "simd.h"\n#include "../layer_norm.h"\n'),
    cuda_is_written_in_the_dialect: ("csrc/cuda/layer_norm.cu", "void f() { kernel<<<1, 2>>>(); }\n"),
    every_folder_has_every_op: ("megatron_kernels/reference.py", "def bias_gelu(): ...\n"),
    few_environment_variables: ("megatron_kernels/ops/layer_norm.py", 'import os\nFAST = os.environ.get("MK_FAST")\n'),
    per_instruction_set_code_is_self_contained: ("csrc/cpu/layer_norm.cpp", "#include <algorithm>\n"),
    reference_is_plain_torch: ("megatron_kernels/reference.py", "from .ops import layer_norm\n"),
    no_banner_comments: ("megatron_kernels/ops/layer_norm.py", "# ----- helpers -----\n"),
    no_unfinished_business: ("README.md", "TODO: say more\n"),
    no_machine_paths: ("Makefile", "VENV = /home/somebody/env\n"),
    files_are_short: ("megatron_kernels/ops/layer_norm.py", "x = 1\n" * (LINES + 1)),
}
CLEAN = {
    "csrc/layer_norm.h": "#pragma once\n#include <stdint.h>\n",
    "csrc/cpu/layer_norm.cpp": '#include "../layer_norm.h"\n',
    "csrc/cuda/layer_norm.cu": '#include "../layer_norm.h"\n',
    "csrc/binding/layer_norm.cpp": '#include <torch/csrc/stable/library.h>\n#include "../layer_norm.h"\n',
    "megatron_kernels/ops/__init__.py": "",
    "megatron_kernels/ops/layer_norm.py": 'import os\nARCH = os.environ.get("TORCH_CUDA_ARCH_LIST")\n',
    "megatron_kernels/reference.py": "import torch\n\n\ndef layer_norm(): ...\n",
    "tests/test_layer_norm.py": "",
    "Makefile": "# Comments are fine.\n",
    "README.md": "Text.\n",
}


def plant(root: Path, tree: dict[str, str]) -> None:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_this_tree_keeps(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_planted_violation_is_found(rule, tmp_path):
    plant(tmp_path, CLEAN)
    assert rule(tmp_path) == []
    name, text = PLANTED[rule]
    plant(tmp_path, {name: text})
    assert [problem for problem in rule(tmp_path) if problem.startswith(name)]


@pytest.mark.parametrize(("text", "keys"), [
    ('os.environ["A"]', ["A"]), ('os.environ.get("B", "")', ["B"]), ('os.getenv("C")', ["C"]),
    ('environ.setdefault("D", "1")', ["D"]), ('"E" in os.environ', ["E"]),
    ("os.environ[name]", ["?"]), ("dict(os.environ)", []), ('{}.get("F")', [])])
def test_environment_keys(text, keys):
    assert list(_environment_keys(ast.parse(text))) == keys


def test_every_op_is_benchmarked():
    from benchmarks.ops import CASES

    ops = {path.stem for path in (ROOT / "megatron_kernels" / "ops").glob("*.py")} - {"__init__"}
    assert {case.op for case in CASES} == ops
