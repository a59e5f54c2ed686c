"""Runs the GPU tests under compute-sanitizer, one tool after the other, and prints a table; ends with 1 if any found something.

    python tests/sanitize.py                                  memcheck, racecheck, initcheck and synccheck
    python tests/sanitize.py memcheck -- tests/test_ops.py    one of them, and arguments for pytest

Without PyTorch's caching allocator every tensor is an allocation of its own, so that an access beyond it is seen. Tests of
torch.compile and of CUDA graphs, which need that allocator, are left out. Logs are in build/sanitize/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build/sanitize"
TOOLKIT = Path("/usr/local/cuda/bin")
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
KERNELS = "mk4cuda"  # in the symbol of every kernel of csrc/cuda, and of no other library's
FOUND = 86  # exit status of the sanitizer where the tests passed but it found something
TESTS = ["-m", "gpu and not slow", "-k", "not compile and not graph"]


def find_sanitizer() -> str | None:
    """On the PATH, in a CUDA toolkit, or in the pip package nvidia-cuda-sanitizer-api."""
    folders = [Path(path) for path in (sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages())]
    candidates = [TOOLKIT, *(path for folder in folders for path in sorted(folder.glob("nvidia/cu*/bin")))]
    if nvcc := shutil.which("nvcc"):
        candidates.insert(0, Path(nvcc).resolve().parent)
    return shutil.which("compute-sanitizer") or next(
        (found for folder in candidates if (found := shutil.which("compute-sanitizer", path=str(folder)))), None)


def command(sanitizer: str, tool: str, known_options: str, arguments: list[str]) -> list[str]:
    """Of one run. API errors are not reported: PyTorch asks for things that may not be there, and a launch that fails, fails its
    test."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    # Only our kernels are checked; but initcheck, if it is an older one, takes no notice then of what others have written.
    if tool != "initcheck" or "--initcheck-track-filtered" in known_options:
        options += ["--kernel-name", f"kernel_substring={KERNELS}"]
    if tool == "initcheck" and "--initcheck-address-space" in known_options:
        options += ["--initcheck-address-space", "all"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    return [sanitizer, *options, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *arguments]


def findings(log: str) -> int | None:
    """Errors and hazards in a log, or None where it ends without a summary."""
    found = re.findall(r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", log, re.MULTILINE)
    return sum(int(errors or hazards) for errors, hazards in found) if found else None


def verdict(status: int, log: str) -> tuple[bool, str]:
    """Whether a run is clean, and what to print."""
    count = findings(log)
    lines = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|skipped|error|deselected)\b.*?)(?: =+)?$", log, re.MULTILINE)
    tests = lines[-1] if lines else "no tests ran"
    if count is None:
        return False, f"no summary, exit status {status}; {tests}"
    clean = status == 0 and count == 0 and " passed" in tests
    return clean, f"{count} findings; {tests}"


def run_tools(sanitizer: str, tools: list[str], arguments: list[str]) -> bool:
    known = subprocess.run([sanitizer, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    LOGS.mkdir(parents=True, exist_ok=True)
    table, all_clean = [], True
    for tool in tools:
        begin = time.monotonic()
        log = LOGS / f"{tool}.log"
        print(f"{tool}: running, log in {log}", flush=True)
        with log.open("w", encoding="utf-8") as out:
            done = subprocess.run(command(sanitizer, tool, known, arguments), stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                                  env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        clean, text = verdict(done.returncode, log.read_text(encoding="utf-8", errors="replace"))
        table.append(f"{tool:<10} {'clean' if clean else 'NOT CLEAN':<10} {time.monotonic() - begin:6.0f} s  {text}")
        all_clean &= clean
    print("\n".join(table))
    return all_clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tools", nargs="*", help="of " + ", ".join(TOOLS))
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    tools = parser.parse_args(sys.argv[1:split]).tools or TOOLS
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"unknown tool {', '.join(sorted(unknown))}; known are {', '.join(TOOLS)}")

    import torch

    if not torch.cuda.is_available():
        sys.exit("sanitize: needs a GPU, and PyTorch sees none")
    sanitizer = find_sanitizer()
    if not sanitizer:
        sys.exit("sanitize: needs compute-sanitizer: install a CUDA toolkit, or `pip install nvidia-cuda-sanitizer-api`")
    sys.exit(not run_tools(sanitizer, tools, sys.argv[split + 1:]))


if __name__ == "__main__":
    main()
