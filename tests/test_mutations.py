"""The C++ tests notice a broken kernel: tests/mutations.py breaks it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mutations
import pytest


def test_every_line_to_break_is_there():
    assert len(mutations.MUTATIONS) >= 20
    assert mutations.misfits() == []


def test_a_line_that_changed_is_named(tmp_path):
    shutil.copytree(mutations.ROOT / "csrc", tmp_path / "csrc")
    for mutation in mutations.MUTATIONS[:2]:
        path = tmp_path / "csrc" / mutation.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, "0"), encoding="utf-8")
    first, second, *rest = mutations.misfits(tmp_path)
    assert mutations.MUTATIONS[0].old in first and "occurs 0 times" in first and mutations.MUTATIONS[1].old in second
    assert not rest


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake", path=mutations.ENVIRONMENT["PATH"]), reason="needs cmake")
def test_every_break_is_noticed():
    done = subprocess.run([sys.executable, Path(mutations.__file__)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
