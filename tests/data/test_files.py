from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from silotune.config import from_mapping
from silotune.data.files import listing, read_table, suffix_of
from silotune.data.load import read_examples, read_rows
from silotune.data.tasks import TASKS
from silotune.errors import ConfigError, DataError
from silotune.settings.sections import FileSettings
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
    examples = [read_examples(tmp_path / name, TASKS["fpb"])[0] for name in names]
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
        ("a.csv", "a,b\n1,2\n\nSECRET\n", "a.csv: row 2: has 1 cells, the header has 2"),
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


# --- as people have them

ROWS: list[Row] = [{"text": "Très bien", "label": "positive"}, {"text": "a; b", "label": "neutral"}]


def as_csv(delimiter: str) -> str:
    return f"text{delimiter}label\nTrès bien{delimiter}positive\n" + f'"a; b"{delimiter}neutral\n'


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_a_plain_table_is_read_whatever_parts_its_cells_and_encodes_its_text(
    tmp_path: Path, delimiter: str, encoding: str
) -> None:
    (tmp_path / "a.csv").write_bytes(as_csv(delimiter).encode(encoding))
    table = read_table(tmp_path / "a.csv")
    assert table.entries == ROWS
    assert table.delimiter == delimiter
    assert len(table.notes) == (encoding == "cp1252")


@pytest.mark.parametrize("name", ["a.tsv", "a.csv.gz", "a.TSV.gz", "a.b.jsonl.gz", "a.json.gz"])
def test_packed_files_and_tables_with_tabs(tmp_path: Path, name: str) -> None:
    kind = suffix_of(Path(name)).removesuffix(".gz")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    content = {".tsv": as_csv("\t"), ".csv": as_csv(","), ".jsonl": lines, ".json": json.dumps(ROWS)}[kind].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_rows(tmp_path / name) == ROWS


def test_settings_win_over_what_a_file_shows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,x;label\nŁódź,y;neutral\n".encode("cp1250"))
    rows = read_rows(tmp_path / "a.csv", FileSettings(delimiter=";", encoding="cp1250"))
    assert rows == [{"text,x": "Łódź,y", "label": "neutral"}]
    assert FileSettings(delimiter="tab").delimiter == "\t"


@pytest.mark.parametrize("wrong", [{"delimiter": ";;"}, {"delimiter": '"'}, {"encoding": "hex"}, {"encoding": "utf-9"}])
def test_settings_that_name_no_delimiter_and_no_encoding(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))} = "):
        from_mapping({"data": wrong})


def test_a_table_of_one_column_keeps_its_semicolons(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na; b\nc\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.csv") == [{"text": "a; b"}, {"text": "c"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text\nTrès bien\n".encode() + b"tr\xe8s\n", "not UTF-8 text in some places, and UTF-8 in others"),
        ("text\nочень хорошо\n".encode("cp1251"), "not UTF-8 text, and not Western European"),
        (b"text\n\x81\x8d\n", "not UTF-8 text: save it as UTF-8, or name its encoding in data.encoding"),
        (b"\xff\xfet\x00e", "not utf-16-le text"),
    ],
)
def test_an_encoding_that_would_be_a_guess_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"a.csv: {reason}"):
        read_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b"text\nx\n", mtime=0)[:-9]], ids=["none", "cut"])
def test_a_packed_file_that_is_broken(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.csv.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"a.csv.gz: not a valid gzip file, or cut off"):
        read_rows(tmp_path / "a.csv.gz")


def test_a_cell_may_be_as_long_as_a_report(tmp_path: Path) -> None:
    text = "Slept well. " * 20_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{text}",neutral\n', encoding="utf-8")
    assert read_rows(tmp_path / "a.csv") == [{"text": text, "label": "neutral"}]


def test_a_sheet_of_excel(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    for row in (["text", "label", None], ["Très bien", 2, None], [None, None, None], ["#N/A", 0, None], ["x", 1, "y"]):
        sheet.append(row)
    sheet["A4"].data_type = "e"
    book.create_sheet("other")
    book.save(tmp_path / "a.xlsx")
    table = read_table(tmp_path / "a.xlsx")
    assert table.entries[0] == {"text": "Très bien", "label": 2}
    assert [str(entry).split(":")[0] for entry in table.entries[1:]] == ["row 2", "row 3"]
    assert "first of 2 sheets" in table.notes[0]
    (tmp_path / "b.xlsx").write_bytes(b"none")
    with pytest.raises(DataError, match=r"b.xlsx: not a valid .xlsx file"):
        read_rows(tmp_path / "b.xlsx")
