"""Following the files of a run that somebody else writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from silotune.errors import RunFolderError
from silotune.record.files import write_bytes
from silotune.record.follow import Document, Rows, is_held, last_lines
from silotune.record.runs import RunFolder


def new(rows: Rows) -> list[dict[str, object]]:
    _, lines = rows.new_lines()
    return [rows.parsed(line) for line in lines]


def test_only_what_is_new_is_read_and_a_torn_line_is_waited_for(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    rows = Rows(place)
    assert new(rows) == []
    place.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert new(rows) == [{"a": 1}, {"a": 2}]
    with place.open("ab") as file:
        file.write(b": 3}\n")
    assert new(rows) == [{"a": 3}]
    assert new(rows) == [] and rows.faults == []


def test_a_broken_line_is_told_by_its_number_and_passed_over(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    place.write_bytes(b'{"a": 1}\n[1]\nnonsense\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    rows = Rows(place)
    assert [row for row in new(rows) if row] == [{"a": 1}, {"a": 2}]
    assert [fault.split()[1] for fault in rows.faults] == ["2", "3", "4"]


def test_rows_that_come_at_once_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    for content in (b'{"a": 1}\n{"a": 2}\n', b'{"a": 1},{"a": 2}\n{"a": 3}\n', b'{"a": 1}\n\n[3]\n', b""):
        (tmp_path / "rows.jsonl").write_bytes(content)
        at_once, one_by_one = Rows(tmp_path / "rows.jsonl"), Rows(tmp_path / "rows.jsonl")
        assert at_once.new_rows() == (False, new(one_by_one))
        assert (at_once.faults, at_once.number) == (one_by_one.faults, one_by_one.number)


def test_rows_that_were_replaced_are_read_anew(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    place.write_bytes(b'{"round": 1}\n{"round": 2}\n')
    rows = Rows(place)
    new(rows)
    write_bytes(place, b'{"round": 1}\n')
    is_other, lines = rows.new_lines()
    assert is_other and lines == [b'{"round": 1}']
    place.unlink()
    assert rows.new_lines() == (True, [])


def test_a_link_and_a_pipe_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret\n")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(RunFolderError):
            Rows(tmp_path / name).new_lines()
        document = Document(tmp_path / name)
        document.refresh()
        assert document.fault and document.value == {}
    assert last_lines(tmp_path / "link", most_bytes=100) == []


def test_a_document_is_read_again_when_it_is_replaced_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    document = Document(tmp_path / "value.json")
    assert not document.refresh()
    write_bytes(document.path, b'{"a": 1}')
    assert document.refresh() and document.value == {"a": 1} and not document.refresh()
    write_bytes(document.path, b"{")
    assert document.refresh() and "not valid JSON" in document.fault
    document.path.unlink()
    assert document.refresh() and document.fault == ""


def test_the_last_lines_of_a_long_file_are_whole(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    place.write_bytes(b"".join(json.dumps({"a": number}).encode() + b"\n" for number in range(1000)))
    assert last_lines(place, most_bytes=25) == [b'{"a": 998}', b'{"a": 999}']


def test_a_lock_is_looked_at_and_not_taken(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run", config={})
    lock = run.path / ".lock"
    assert is_held(lock) is None, "there is no lock file yet"
    with run.lock():
        assert is_held(lock) is True
    assert is_held(lock) is False
    with run.lock():
        assert is_held(lock, read_locks=lambda: "") is False
    lock.write_text("1 on another-machine\n")
    assert is_held(lock) is None
