"""setup.py: what it builds, where it finds a CUDA compiler, and what it says when there is none."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("MK_CUDA", "MK_SIMT", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME")


@pytest.fixture
def run_setup(monkeypatch):
    """Runs setup.py, of which nothing is built, with these variables and this torch.version.cuda; its names, and its libraries."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(cuda: str | None = "13.0", **variables: str) -> tuple[dict, list[str]]:
        built: list[str] = []
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: built.extend(e.name for e in arguments["ext_modules"]))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # of "nvidia", the pip packages
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(ROOT / "setup.py")), [name.removeprefix("megatron_kernels.") for name in built]

    return run


def toolkit(home: Path, codes: str = "sm_80 sm_90 sm_100 sm_120", top: Path | None = None) -> Path:
    """A toolkit that has what setup.py looks for, with a compiler that answers two questions."""
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    (home / "lib64/libcudart_static.a").touch()
    nvcc = home / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\ncase $1 in\n--dryrun) echo '#$ TOP={top or home}' >&2;;\n--list-gpu-code) echo {codes};;\nesac\n")
    nvcc.chmod(0o755)
    return home


def test_cpu_library_always_and_others_where_asked_for(run_setup, tmp_path):
    home = str(toolkit(tmp_path / "cuda"))
    assert run_setup(CUDA_HOME=home)[1] == ["_C_cpu", "_C_cuda"]
    assert run_setup(CUDA_HOME=home, MK_CUDA="0")[1] == ["_C_cpu"]
    assert run_setup(CUDA_HOME=home, MK_CUDA="0", MK_SIMT="1")[1] == ["_C_cpu", "_simt"]
    names, libraries = run_setup(None, CUDA_HOME=home, MK_CUDA="", MK_SIMT="0")
    assert libraries == ["_C_cpu"]
    assert names["missing"] == f"torch {torch.__version__} is not a CUDA build"


def test_cuda_that_is_asked_for_and_missing_ends_the_build(run_setup):
    with pytest.raises(SystemExit, match="megatron_kernels: MK_CUDA=1, but torch .* is not a CUDA build"):
        run_setup(None, MK_CUDA="1")


def test_no_compiler_says_what_to_install(run_setup, monkeypatch, tmp_path):
    names, _ = run_setup(MK_CUDA="0")
    monkeypatch.delenv("MK_CUDA")
    assert "pip install nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.*" in names["no_cuda"](None)
    home = toolkit(tmp_path / "cuda")
    assert names["no_cuda"](home) == ""
    (home / "lib64/libcudart_static.a").rename(home / "libcudart_static.a")
    assert f"{home} has no lib64/libcudart_static.a" in names["no_cuda"](home)
    assert "pip install nvidia-cuda-runtime==13.0.*" in names["no_cuda"](home)


def test_a_script_on_the_path_leads_to_the_toolkit(run_setup, monkeypatch, tmp_path):
    real = toolkit(tmp_path / "real")
    script = toolkit(tmp_path / "script", top=real / "bin/..")
    (script / "include/cuda_runtime.h").unlink()
    monkeypatch.setenv("PATH", os.pathsep.join([str(script / "bin"), os.environ["PATH"]]))
    names, _ = run_setup()
    assert names["home"] == real


def test_pip_packages_of_the_compiler_are_found(run_setup, monkeypatch, tmp_path):
    names, _ = run_setup(MK_CUDA="0")
    home = toolkit(tmp_path / "site/nvidia/cu13")
    toolkit(tmp_path / "site/nvidia/cu12")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "elsewhere"), str(tmp_path / "site/nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    assert names["cuda_home"]() == home


def test_architectures(run_setup, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "cuda", codes="sm_80 sm_90")
    names, _ = run_setup(CUDA_HOME=str(home))
    assert names["gencode"](home / "bin/nvcc") == ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 12.0+PTX")
    assert names["gencode"](home / "bin/nvcc") == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_120,code=sm_120",
                                                   "-gencode=arch=compute_120,code=compute_120"]


def test_build_without_torch_says_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = subprocess.run([sys.executable, ROOT / "setup.py", "--name"], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "pip install torch setuptools ninja" in done.stderr
