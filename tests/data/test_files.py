from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from silotune.data.files import listing
from silotune.data.load import read_examples, read_rows
from silotune.data.tasks import TASKS
from silotune.errors import DataError
from silotune.structs import Row


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    content: list[Row] = [{"text": "Ä, b", "label": "neutral"}, {"text": 'say "x"\nagain', "label": "positive"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8-sig")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "a.PARQUET")
    names = ("a.jsonl", "a.json", "a.csv", "a.PARQUET")
    assert [read_rows(tmp_path / name) for name in names] == [content] * 4
    examples = [read_examples(tmp_path / name, TASKS["fpb"]) for name in names]
    assert [example.answer for example in examples[0]] == ["neutral", "positive"]
    assert all(own == examples[0] for own in examples)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n\n{"text": SECRET}\n',
            "a.jsonl: line 3: not valid JSON (column 10: Expecting value)",
        ),
        ("a.jsonl", '"SECRET"\n', "a.jsonl: line 1: is not a JSON object"),
        ("a.jsonl", "", "a.jsonl: is empty"),
        ("a.jsonl", " \n", "a.jsonl: is empty"),
        ("a.json", '[\n{"a": SECRET}]', "a.json: not valid JSON (line 2, column 7"),
        ("a.json", '{"a": "SECRET"}', "a.json: holds no list of rows"),
        ("a.json", '[{}, "SECRET"]', "a.json: row 2: is not a JSON object"),
        ("a.csv", "a,b\n", "a.csv: is empty"),
        ("a.csv", "", "a.csv: is empty"),
        ("a.csv", "a,a\n1,2\n", "a.csv: two columns have the same name"),
        ("a.csv", "a,b\n1,2\n\nSECRET\n", "a.csv: row 2 has 1 cells, the header has 2"),
        ("a.csv", 'a\n"SECRET\n', "a.csv: line 2: not valid CSV"),
        ("a.parquet", "SECRET", "a.parquet: not a valid Parquet file"),
        ("a.xml", "SECRET", "unknown kind of file '.xml'; allowed: .jsonl, .json, .csv, .parquet, .txt"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert reason in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "b.csv").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no file '.*a.jsonl'; .* holds b.csv, folder/"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"holds nothing \(it does not exist\)"):
        read_rows(tmp_path / "none" / "a.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(DataError, match=r"latin.jsonl: not UTF-8 text"):
        read_rows(tmp_path / "latin.jsonl")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read: Permission denied"):
        read_rows(path)


def test_a_long_listing_is_cut(tmp_path: Path) -> None:
    for number in range(15):
        (tmp_path / f"{number:02}").touch()
    assert listing(tmp_path).endswith("11 and 3 more")
    assert listing(tmp_path / "00") == "nothing (it does not exist)"
