"""One wheel for every Python >= 3.10 and torch >= 2.10: built once from the source distribution, read, and run.

`--wheel-python PATH`, which may be repeated, names further interpreters to run it with.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
# What the library may load. Neither libtorch_python, which is another one for every Python, nor an OpenMP runtime of its own.
MAY_NEED = re.compile(r"lib(c10|torch|torch_cpu|stdc\+\+|m|gcc_s|c)\.so(\.\d+)?|ld-linux-.*")

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF files with binutils")]


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory) -> Path:
    """The sdist, unpacked: made from a copy of what git has, so that nothing built earlier gets in."""
    tree = tmp_path_factory.mktemp("tree")
    listed = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", cwd=tree)
    archive, = (tree / "dist").glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    return next(unpacked.iterdir())


@pytest.fixture(scope="module")
def wheel(source_distribution, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, source_distribution)
    path, = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name, = (name for name in archive.namelist() if name.endswith(".so"))
        return Path(archive.extract(name, tmp_path_factory.mktemp("library")))


def symbols(library: Path, *options: str) -> list[tuple[str, str]]:
    """(kind, name) as nm prints them, versions cut off."""
    lines = (line.split() for line in run("nm", "-D", *options, library).splitlines())
    return [(parts[-2], parts[-1].partition("@")[0]) for parts in lines]


def test_tag(wheel):
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", wheel.name), wheel.name


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"megatron_kernels", wheel.name.split("-cp310")[0] + ".dist-info"}
    packaged = {name for name in names if name.endswith(".py")}
    assert packaged == {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_kernels").rglob("*.py")}
    assert "megatron_kernels/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)


def test_no_torch_symbol_is_newer_than_2_10(library):
    known = set((HERE / "torch_2_10_shims.txt").read_text().split("\n"))
    wanted = [name for _, name in symbols(library, "--undefined-only")]
    of_torch = [name for name in wanted if re.match(r"torch_|aoti_|_ZN?K?(2at|3c10|4aoti|5torch)", name)]
    assert "torch_library_impl" in of_torch
    assert sorted(set(of_torch) - known) == []
    assert [name for name in wanted if name.startswith(("Py", "_Py"))] == []


def test_library_needs_only_what_every_torch_has(library):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", "-W", library))
    assert [name for name in needed if not MAY_NEED.fullmatch(name)] == []


def test_nothing_is_shared_between_instruction_sets(wheel, source_distribution):
    """Each object defines functions in the namespace of its own instruction set and nothing weak: of weak definitions the linker
    keeps one for all, and a processor without AVX-512 could end up with one that was compiled for it."""
    objects = [path for path in source_distribution.rglob("*.o") if path.name.count(".") == 2]  # <op>.<instruction set>.o
    ops = {path.stem for path in (ROOT / "megatron_kernels" / "ops").glob("*.py")} - {"__init__"}
    assert {path.name.split(".")[0] for path in objects} == ops
    if platform.machine() == "x86_64":
        assert len({path.name.split(".")[1] for path in objects}) >= 3
    for path in objects:
        isa = path.name.split(".")[1]
        defined = [line.split()[1:] for line in run("nm", "--defined-only", path).splitlines()]
        assert [name for kind, name in defined if kind in "WVu"] == [], path.name
        visible = [name for kind, name in defined if kind.isupper()]
        assert visible and all(name.startswith(f"_ZN2mk3cpu{len(isa)}{isa}") for name in visible), path.name


def test_library_does_not_name_the_build_directory(library, source_distribution):
    assert os.fsencode(source_distribution.parent) not in library.read_bytes()


def pytest_generate_tests(metafunc):
    if "python" in metafunc.fixturenames:
        given = metafunc.config.getoption("--wheel-python", default=None) or []
        metafunc.parametrize("python", [sys.executable, *given])


def test_every_op_runs(wheel, python, tmp_path):
    site = tmp_path / "site"
    run(python, "-m", "pip", "install", "--no-deps", "--target", site, wheel)
    output = run(python, HERE / "wheel_smoke.py", site, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    print(output)
    assert output.count("forward and backward agree") == 4
