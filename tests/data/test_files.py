from __future__ import annotations

import csv
import gzip
import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from silotune.config import from_mapping
from silotune.data import files
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
        ("a.csv", "a,a\n1,2\n", "a.csv: columns 1 and 2 have the same name: rename one"),
        ("a.csv", "a,b\n1,2\n\nSECRET\n", "a.csv: row 2: has 1 cells, the header has 2"),
        ("a.csv", 'a\n"SECRET\n', "a.csv: line 2: not valid CSV"),
        ("a.parquet", "PAR1SECRET", "a.parquet: not a valid Parquet file"),
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
    (tmp_path / "b.xlsx").write_bytes(b"PK\x03\x04none")
    with pytest.raises(DataError, match=r"b.xlsx: not a valid .xlsx file"):
        read_rows(tmp_path / "b.xlsx")


# --- of another kind than the name says


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (
            "a.csv",
            b"PK\x03\x04...",
            "holds a zip archive, as an Excel workbook is one, and no .csv: let its name end in .xlsx",
        ),
        (
            "a.csv",
            gzip.compress(b"a,b\n1,2\n", mtime=0),
            "holds a file packed by gzip, and no .csv: let its name end in .gz",
        ),
        ("a.csv.gz", b"a,b\n1,2\n", "leave .gz out of its name"),
        ("a.txt", b"PAR1...", "holds a Parquet file, and no .txt"),
        ("a.tsv", "\ufeff\n <HTML><table>".encode(), "holds HTML or XML"),
        ("a.xlsx", b"<?xml version='1.0'?>", "holds HTML or XML"),
        ("a.xlsx", b"\xd0\xcf\x11\xe0\xa1", "holds a workbook of an old Excel, or one with a password"),
        ("a.xlsx", b"note;label\n", "holds text, and no .xlsx: let its name end in .csv"),
        ("a.csv", b'{"note": "x", "label": "y"}\n', "holds JSON, and no .csv: let its name end in .jsonl"),
        ("a.csv", b'[\n  {"note": "x"}]', "holds a list in JSON, and no .csv: let its name end in .json"),
        ("a.jsonl", b'[\n  {"note": "x"}\n]', "holds one list, and not an object a line: let its name end in .json"),
        ("a.json", b'{"note": "x"}\n{"note": "y"}\n', "if each line is a row, let its name end in .jsonl"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_is_refused_with_what_to_do(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / name)
    assert reason in str(caught.value)


def test_running_text_that_is_a_table_of_tabs_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("note\tlabel\nx\twait\n".encode("utf-16"))
    assert "as a table if its name ends in .tsv" in read_table(tmp_path / "a.txt").notes[0]
    (tmp_path / "b.txt").write_text("A text.\n\tAn indented line.\n", encoding="utf-8")
    assert not read_table(tmp_path / "b.txt").notes


# --- quotes, names and empty rows of tables


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


@pytest.mark.parametrize(
    ("delimiter", "first"),
    [("\t", '"Ow" he says'), (";", '"Ow" he says, twice'), (",", '"Ow he says'), ("|", 'a 5" cut, "deep')],
)
def test_quotes_that_can_only_be_characters_stay_in_the_text_with_a_note(
    tmp_path: Path, delimiter: str, first: str
) -> None:
    rows = [("note", "label"), (first, "wait"), ("plain", "urgent"), (first, "wait")]
    table = read_table(written(tmp_path, "a.csv", "\n".join(map(delimiter.join, rows))))
    assert [(row["note"], row["label"]) for row in table.entries if isinstance(row, dict)] == rows[1:]
    is_told = [note for note in table.notes if "quotes are read as characters" in note]
    assert len(is_told) == first.startswith('"')


@pytest.mark.parametrize(
    "text",
    [
        'note,label\n"He says "ow"",wait\nx,urgent\n',  # stands in quotes, with others within
        'note,label\n"He says \\"ow\\", twice",wait\n',  # cells that hold the delimiter
        'note\n"He says\n',  # a single column
    ],
)
def test_quotes_that_could_mean_both_are_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"line 2: not valid CSV .*: double each quote .* set data.quotes = 'text'"):
        read_table(written(tmp_path, "a.csv", text))


def test_the_line_of_a_quote_that_stays_open_is_the_one_where_its_row_begins(tmp_path: Path) -> None:
    text = 'sep=,\nnote,label\nx,wait\n"open,wait\ny,urgent,1\n'
    with pytest.raises(DataError, match="line 4: not valid CSV"):
        read_table(written(tmp_path, "a.csv", text))


def test_rows_that_quotes_may_have_merged_are_told_and_can_be_said_to_be_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", 'note\tlabel\n"open\twait\nx\turgent\na 5"\twait\n')
    table = read_table(path)
    assert len(table.entries) == 1
    assert "1 rows on 3 lines, each of which could be a row; if it is one, set data.quotes = 'text'" in table.notes[0]
    assert [row["note"] for row in read_rows(path, FileSettings(quotes="text"))] == ['"open', "x", 'a 5"']
    real = written(tmp_path, "b.csv", 'note,label\n"Comes\r\nlate, again",wait\nx,urgent\n')
    assert read_rows(real)[0] == {"note": "Comes\r\nlate, again", "label": "wait"}
    assert not read_table(real).notes


def test_the_line_that_tells_excel_the_delimiter_is_no_header(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "a.csv", "sep=;\r\nnote;crp\r\nx;1,5\r\n")) == [{"note": "x", "crp": "1,5"}]


def test_rows_of_empty_cells_are_no_rows_and_columns_without_names_are_told(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a.csv", ",note,,,\n1,x,,,\n, ,,,\n,,,,\n2,y,,,\n"))
    assert table.entries == [{"note": "x"}, {"note": "y"}]
    assert [note.partition(": ")[2] for note in table.notes] == [
        "not read, because the first row does not name it: column 1"
    ]


def test_a_row_with_too_many_cells_says_what_may_have_parted_one(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a.csv", "note,crp\nx,1,5\ny\n"))
    assert [str(entry) for entry in table.entries] == [
        "row 1: has 3 cells, the header has 2: a cell that holds ',' needs quotes around it",
        "row 2: has 1 cells, the header has 2",
    ]


def test_a_sheet_says_what_it_does_not_read(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    for row in ([None, "note", "share", "code", ""], [1, "x", 0.05, 7, None], ["", " ", None, None, None]):
        sheet.append(row)
    sheet["C2"].number_format, sheet["D2"].number_format = "0.0%", "000"
    book.save(tmp_path / "a.xlsx")
    table = read_table(tmp_path / "a.xlsx")
    assert table.entries == [{"note": "x", "share": 0.05, "code": 7}]
    assert [note.partition(": ")[2].partition(",")[0] for note in table.notes] == [
        "not read",
        "column 3 shows percent",
        "column 4 shows zeros before its numbers",
    ]
    book.create_sheet("cover", 0)
    book.save(tmp_path / "b.xlsx")
    with pytest.raises(DataError, match=r"is empty below .*first of 2 sheets: put the one with the examples first"):
        read_table(tmp_path / "b.xlsx")


def test_a_packed_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    flood = b"text\n" + b"a" * (65 << 20)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(flood))
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/workbook.xml", flood)
    for name in ("a.csv.gz", "a.xlsx"):
        with pytest.raises(DataError, match=f"{name}: unpacks to more than 64 MB, 100 times its size"):
            read_rows(tmp_path / name)


def test_a_file_beyond_the_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(path: Path) -> bytes:
        raise MemoryError

    (tmp_path / "a.csv").touch()
    monkeypatch.setattr(files, "_unpacked", too_large)
    with pytest.raises(DataError, match=r"a.csv: does not fit into this machine's memory"):
        read_rows(tmp_path / "a.csv")


@pytest.mark.parametrize(("place", "limit"), [("A2000", "_MOST_SHEET_ROWS"), ("XFD2", "_MOST_EMPTY_CELLS")])
def test_a_sheet_with_a_cell_far_from_the_others_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, limit: str
) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active["A1"], book.active[place] = "text", "a"
    book.save(tmp_path / "a.xlsx")
    monkeypatch.setattr(files, limit, 1000)
    with pytest.raises(DataError, match="more than .* rows, or cells far to the right of the others"):
        read_rows(tmp_path / "a.xlsx")


def test_a_sheet_that_claims_to_be_larger_is_read_as_it_is(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["text", "label"])
    book.active.append(["a", None])
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "a.xlsx") as old, zipfile.ZipFile(tmp_path / "b.xlsx", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'ref="A1:B2"', b'ref="A1:XFD1048576"'))
    assert read_rows(tmp_path / "b.xlsx") == read_rows(tmp_path / "a.xlsx") == [{"text": "a", "label": None}]
