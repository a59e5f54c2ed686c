"""Result files of the benchmarks: there is never half of one, and what can't be read is said in one line."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks import files


def test_written_whole_and_nothing_left(tmp_path):
    path = tmp_path / "new" / "r.json"
    files.write_json(path, {"kind": "a"})
    assert json.loads(path.read_text()) == {"kind": "a"} and os.listdir(path.parent) == ["r.json"]


def test_what_was_there_stays_until_the_end(tmp_path):
    path = tmp_path / "r.txt"
    files.write(path, "before")
    with files.replacing(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "before"
        before = os.stat(partial).st_ino
    assert path.read_text() == "half" and os.stat(path).st_ino == before  # put in its place, not copied over it
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as partial:
        partial.write_text("other")
        raise KeyboardInterrupt
    assert path.read_text() == "half" and os.listdir(tmp_path) == ["r.txt"]


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot read: No such file"), ("{", "no JSON"), ("[]", "expected a run, of kind 'a', got 'list'"),
    ('{"kind": "b"}', "expected a run, of kind 'a', got 'b'"), ("{}", "expected a run, of kind 'a', got None")])
def test_what_is_not_it(tmp_path, content, message):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"r.json: {message}"):
        files.read_json(path, "a run", "a")
