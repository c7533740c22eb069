from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.errors import RunFolderError
from silotune.record import files


def test_plain_gives_strict_json():
    @dataclass
    class Point:
        x: float
        where: Path

    value = {"a": float("nan"), "b": (1, float("inf")), 3: Point(0.5, Path("p")), "s": {2, 1}, "n": np.float32(0.5)}
    assert files.plain(value) == {
        "a": None, "b": [1, None], "3": {"x": 0.5, "where": "p"}, "s": [1, 2], "n": 0.5,
    }  # fmt: skip
    assert files.plain(np.arange(3)) == [0, 1, 2]


def test_plain_refuses_what_json_cannot_say():
    with pytest.raises(TypeError, match="bytes"):
        files.plain({"a": b"x"})


@given(cut=st.integers(min_value=1, max_value=30), rows=st.integers(min_value=0, max_value=3))
def test_a_torn_line_is_left_out_and_then_written_over(tmp_path_factory, cut, rows):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    whole = [{"round": number, "text": "é" * 10} for number in range(rows)]
    for row in whole:
        files.append_line(path, files.to_line(row))
    with path.open("ab") as file:
        file.write(files.to_line({"round": 99, "text": "é" * 10})[:cut])
    assert files.read_lines(path) == whole
    files.append_line(path, files.to_line({"round": rows}))
    assert files.read_lines(path) == [*whole, {"round": rows}]


@pytest.mark.parametrize("broken", [b"{nonsense\n", b"[1]\n", b"\xff\n"])
def test_another_broken_line_is_named_by_number(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 0}\n' + broken + b'{"round": 2}\n')
    with pytest.raises(RunFolderError, match="line 2 is not a JSON object") as caught:
        files.read_lines(path)
    assert "nonsense" not in str(caught.value)


def test_missing_rows_are_no_rows(tmp_path):
    assert files.read_lines(tmp_path / "none.jsonl") == []


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(RunFolderError, match="holds no summary.json"):
        files.read_json(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match="not valid JSON"):
        files.read_json(tmp_path / "summary.json")
    with pytest.raises(RunFolderError, match="cannot use"):
        files.read_json(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert files.read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left in"), (errno.EACCES, "no permission for"), (errno.EIO, "cannot use")],
)
@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_system_errors_become_one_line_and_leave_nothing(tmp_path, monkeypatch, number, words, failing):
    path = tmp_path / "summary.json"
    files.write_json(path, 1)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(RunFolderError, match=words) as caught:
        files.write_json(path, 2)
    assert "\n" not in str(caught.value)
    assert files.read_json(path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    files.append_line(path, files.to_line({"round": 0}))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RunFolderError, match="no space left"):
            files.append_line(path, files.to_line({"round": 1}))
    assert path.read_bytes() == b'{"round": 0}\n'


def test_a_new_folder_replaces_files_of_one_in_place(tmp_path):
    place = tmp_path / "adapter"
    for text in (b"one", b"two"):
        with files.new_folder(place) as building:
            files.write_bytes(building / "a", text)
        assert (place / "a").read_bytes() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_remove_temporary_leaves_the_rest(tmp_path):
    (tmp_path / "part").mkdir()
    keep = tmp_path / "part" / "a.json"
    files.write_json(keep, 1)
    files.temporary_beside(keep).write_text("half")
    files.temporary_beside(tmp_path / "checkpoint-3").mkdir()
    files.remove_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "part"]
