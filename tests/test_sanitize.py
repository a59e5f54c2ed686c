"""tests/sanitize.py without a GPU, with a script in the tool's place: finding it, calling it, and what is made of its output."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import cubins
import pytest
import sanitize
import torch

CLEAN = "12 passed, 3 deselected in 4.2s\n========= ERROR SUMMARY: 0 errors\n"


def script(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    monkeypatch.setattr(sanitize.site, "getsitepackages", list)
    monkeypatch.setattr(sanitize.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(sanitize, "TOOLKIT", tmp_path / "cuda/bin")


@pytest.mark.parametrize("place", ["bin", "toolkit/bin", "cuda/bin", "site-packages/nvidia/cu13/bin", "user/nvidia/cu13/bin"])
def test_sanitizer_is_found(place, tmp_path, nothing_installed):
    assert sanitize.find_sanitizer() is None
    if place == "toolkit/bin":
        script(tmp_path / "toolkit/bin/nvcc")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvcc").symlink_to(tmp_path / "toolkit/bin/nvcc")
    tool = script(tmp_path / place / "compute-sanitizer")
    assert sanitize.find_sanitizer() == str(tool)


def test_command():
    old, new = "", "--initcheck-track-filtered-global-memory --initcheck-address-space"
    ours = f"--kernel-name kernel_substring={sanitize.KERNELS}"
    for tool in sanitize.TOOLS:
        for known in (old, new):
            line = " ".join(sanitize.command("cs", tool, known, ["-x"]))
            assert line.startswith(f"cs --tool {tool} --error-exitcode {sanitize.FOUND} ")
            assert (ours in line) == (tool != "initcheck" or known == new)
            assert ("--initcheck-address-space all" in line) == (tool == "initcheck" and known == new)
            assert line.endswith(f"{sys.executable} -m pytest -q -p no:cacheprovider {' '.join(sanitize.TESTS)} -x")


@pytest.mark.skipif(bool(cubins.missing()), reason=cubins.missing())
def test_every_kernel_is_checked(tmp_path):
    """Kernels are chosen by what is in their symbol."""
    for source in cubins.SOURCES:
        cubins.measure(source, "sm_90")
        usage = cubins.run("cuobjdump", "-res-usage", cubins.CACHE / f"{source.stem}.sm_90.cubin")
        symbols = [line.split()[1] for line in usage.split("\n") if line.startswith(" Function ")]
        assert symbols and all(sanitize.KERNELS in symbol for symbol in symbols), symbols


@pytest.mark.parametrize(("status", "log", "clean", "text"), [
    (0, CLEAN, True, "0 findings; 12 passed, 3 deselected in 4.2s"),
    (0, "==== 12 passed in 4.2s ====\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True,
     "0 findings; 12 passed in 4.2s"),
    (sanitize.FOUND, "12 passed in 4s\n========= ERROR SUMMARY: 1 error\n", False, "1 findings; 12 passed in 4s"),
    (0, "12 passed in 4s\n========= RACECHECK SUMMARY: 7 hazards displayed (5 errors, 2 warnings)\n", False,
     "7 findings; 12 passed in 4s"),
    (1, "1 failed, 11 passed in 4s\n========= ERROR SUMMARY: 0 errors\n", False, "0 findings; 1 failed, 11 passed in 4s"),
    (0, "12 skipped in 1s\n========= ERROR SUMMARY: 0 errors\n", False, "0 findings; 12 skipped in 1s"),
    (5, "========= ERROR SUMMARY: 0 errors\n", False, "0 findings; no tests ran"),
    (255, "========= Error: Target application terminated before first instrumented API call\n", False,
     "no summary, exit status 255; no tests ran"),
])
def test_verdict(status, log, clean, text):
    assert sanitize.verdict(status, log) == (clean, text)


@pytest.mark.parametrize(("racecheck", "status"), [("0 hazards", 0), ("3 hazards", sanitize.FOUND)])
def test_tools_run_one_after_the_other(racecheck, status, tmp_path, monkeypatch, capsys):
    fake = script(tmp_path / "compute-sanitizer", f"""
[ "$1" = --help ] && exit
echo "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {tmp_path}/calls
echo "2 passed in 1s"
[ "$2" != racecheck ] && echo "========= ERROR SUMMARY: 0 errors" && exit 0
echo "========= RACECHECK SUMMARY: {racecheck} displayed (0 errors, 0 warnings)"
exit {status}""")
    monkeypatch.setattr(sanitize, "LOGS", tmp_path / "logs")
    assert sanitize.run_tools(str(fake), sanitize.TOOLS, []) == (status == 0)
    assert (tmp_path / "calls").read_text() == "".join(f"{tool} 1\n" for tool in sanitize.TOOLS)
    assert {path.stem for path in (tmp_path / "logs").iterdir()} == set(sanitize.TOOLS)
    table = capsys.readouterr().out.split("\n")[-5:-1]
    assert [line.split()[0] for line in table] == sanitize.TOOLS
    assert ("NOT CLEAN" in table[1]) == (status != 0) and all(" clean " in line for line in (table[0], *table[2:]))


def test_what_is_missing_is_one_line(tmp_path, nothing_installed, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sanitize: needs a GPU, and PyTorch sees none"):
        sanitize.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="sanitize: needs compute-sanitizer: .*pip install nvidia-cuda-sanitizer-api"):
        sanitize.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run")
def test_exit_statuses():
    def status(*arguments: str) -> int:
        return subprocess.run([sys.executable, sanitize.__file__, *arguments], capture_output=True).returncode

    assert status() == 1 and status("memcheck", "--", "-x") == 1
    assert status("leakcheck") == 2
