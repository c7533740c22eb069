from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silotune.errors import KitError, RunFolderError
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


TORN = st.one_of(
    st.integers(1, 30).map(lambda cut: files.to_line({"round": 99, "text": "é" * 10})[:cut]),
    st.tuples(st.integers(0, 20), st.integers(1, 9000), st.sampled_from([b"", b"\n"])).map(
        lambda parts: b'{"round": 99, "text": '[: parts[0]] + b"\0" * parts[1] + parts[2]
    ),
    st.sampled_from([b"[1]\n", b"1\n", b"\xff\n", b"[" * 100_000 + b"\n", b"\n"]),
)
"""What a power cut leaves of a line: its beginning, blocks of zeros, an end of line behind them or none."""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(torn=TORN, rows=st.integers(min_value=0, max_value=3), size=st.sampled_from([1, 5000, 70_000]))
def test_a_torn_line_is_left_out_then_cut_and_noted(tmp_path_factory, caplog, torn, rows, size):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    whole = [{"round": number, "text": "é" * size} for number in range(rows)]
    for row in whole:
        files.append_line(path, files.to_line(row))
    before = path.read_bytes() if rows else b""
    for is_mended in (True, False):
        path.write_bytes(before + torn)
        assert files.read_lines(path) == whole
        caplog.clear()
        if is_mended:
            note = files.mend(path)
            assert path.read_bytes() == before
        files.append_line(path, files.to_line({"round": rows}))
        assert files.read_lines(path) == [*whole, {"round": rows}]
        note = note if is_mended else caplog.messages[0]
        assert note.count("\n") == 0 and f"{str(path)!r} was torn" in note and f"its {len(torn)} bytes" in note
        assert len(caplog.messages) == (0 if is_mended else 1)


def test_nothing_is_cut_where_nothing_is_torn(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    assert files.mend(path) == "" and not path.exists()
    for number in range(3):
        files.append_line(path, files.to_line({"round": number}))
        assert files.mend(path) == ""
    assert len(files.read_lines(path)) == 3 and not caplog.messages


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


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65])
def test_json_is_read_to_a_bounded_depth(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match="config.json.* nests more than 64"):
        files.read_json(path)
    with pytest.raises(KitError, match="config.json.* nests more than 64"):
        files.read_document(path, KitError)
    path.write_text("[" * 64 + "]" * 64)
    assert files.read_json(path) == files.read_document(path, KitError)


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


def test_a_file_and_the_entry_of_its_folder_are_handed_to_the_disk(tmp_path, monkeypatch):
    """The file before it takes its name, the folder after it: else a power cut leaves a name with nothing in it."""
    path, seen = tmp_path / "summary.json", []

    def sync(descriptor: int) -> None:
        seen.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    files.write_json(path, 1)
    (temporary, was_there), folder = seen
    assert temporary.startswith(f"{tmp_path}/.summary.json.") and not was_there
    assert folder == (str(tmp_path), True)
    seen.clear()
    new = tmp_path / "new.jsonl"
    files.append_line(new, b"{}\n")
    files.append_line(new, b"{}\n")
    assert [name for name, _ in seen] == [str(new), str(tmp_path), str(new)]


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
