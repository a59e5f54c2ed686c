"""What README.md and docs/ show works: the Python runs, the commands and their options exist, the links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = {"evaluate"}  # commands that have commands
page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language; "" for those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for name, code in fenced if name == language]


def commands(page: Path, program: str) -> list[list[str]]:
    lines = [line for language in ("", "sh", "bash") for code in blocks(page, language)
             for line in code.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True)) and words[0] == program]


@pytest.mark.parametrize("code", blocks(ROOT / "README.md", "python"))
def test_readme_python_runs(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_readme_example_is_short():
    example, = blocks(ROOT / "README.md", "python")
    assert len(example.splitlines()) <= 17


@page_by_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = [words[1] for words in commands(page, "make")]
    assert set(shown) <= targets


@page_by_page
def test_command_line_options_exist(page):
    helps: dict[str, str] = {}
    for words in commands(page, "megatron-kernels"):
        name = " ".join(words[1:3] if words[1] in GROUPS else words[1:2])
        if name not in helps:
            done = subprocess.run([sys.executable, "-m", "megatron_kernels.cli", *name.split(), "--help"], capture_output=True,
                                  text=True, env={"COLUMNS": "200", "TERM": "dumb"})
            assert done.returncode == 0, done.stderr
            helps[name] = done.stdout
        options = [word for word in words[2:] if word.startswith("--")]
        assert [option for option in options if option not in helps[name]] == [], " ".join(words)


@page_by_page
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", prose)
    assert [target for target in targets if not (page.parent / target).exists()] == []
