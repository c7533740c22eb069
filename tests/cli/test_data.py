from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.config import load_config
from silotune.data.load import load

SECRET = "SECRET"


def note(number: int) -> str:
    return f"{SECRET} aged {number} came at night."


def table(start: int, count: int, delimiter: str) -> str:
    lines = [f"{note(start + n)}{delimiter}{['wait', 'urgent'][n % 2]}{delimiter}x" for n in range(count)]
    return "\n".join([delimiter.join(("Note", "Urgency", "Ward")), *lines]) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own = tmp_path / "files"
    own.mkdir()
    (own / "Südklinik.csv").write_bytes((table(0, 20, ";") + f"é;wait;x\n;wait;x\n{SECRET}\n").encode("cp1252"))
    (own / "north.tsv").write_text(table(18, 20, "\t") + note(19).upper() + "\turgent\tx\n", encoding="utf-8")
    (own / "test.csv").write_text(table(60, 10, ","), encoding="utf-8")
    return own


def test_a_configuration_is_written_for_a_file_an_institution_and_its_data_are_checked(
    silotune: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "c.toml"
    outcome = silotune("init", folder, "--out", out)
    assert outcome.code == 0, outcome.err
    assert SECRET not in outcome.out
    config = load_config(out)
    assert sorted(config.data.partition.files) == ["Sudklinik", "north"]
    assert (config.data.test, config.data.on_bad_row) == (folder / "test.csv", "skip")
    dataset = load(config.data, seed=0)
    assert len(dataset.splits["test"]) == 10
    assert "files/test.csv" in out.read_text(encoding="utf-8") and str(tmp_path) not in out.read_text(encoding="utf-8")

    found = json.loads(silotune("data", "check", "--config", out, "--json").out)
    south = next(part for part in found["files"] if part["client"] == "Sudklinik")
    assert (south["rows"], south["examples"], south["bad_rows"]["count"]) == (23, 21, 2)
    assert south["bad_rows"]["first"][0] == {"place": "row 22", "reason": "field 'Note' is empty"}
    assert (south["encoding"], south["delimiter"]) == ("cp1252", ";")
    assert [column["empty"] for column in south["columns"]] == [1, 0, 0]
    north = next(part for part in found["files"] if part["client"] == "north")
    assert north["duplicates"] == {"exact": 0, "alike": 1}
    [across] = found["across"]
    assert (across["exact"], across["alike"]) == (2, 3)
    assert found["contradictions"] == 0
    assert found["labels"] == {"wait": 26, "urgent": 26}
    assert SECRET not in json.dumps(found)


def test_a_check_tells_what_would_be_cut_and_shows_no_text_unless_asked(
    silotune: Callable[..., Any], folder: Path
) -> None:
    file = folder / "north.tsv"
    outcome = silotune("data", "check", file, "--set", "model.max_length=24")
    assert outcome.code == 0, outcome.err
    assert "[data.definition]" in outcome.out and 'answer = "Urgency"' in outcome.out
    assert "labels: wait 10, urgent 11" in outcome.out
    assert SECRET not in outcome.out
    found = json.loads(silotune("data", "check", file, "--set", "model.max_length=24", "--json").out)
    assert found["files"][0]["tokens"]["cut"] == 21 and found["files"][0]["tokens"]["longest"] > 24
    assert SECRET in silotune("data", "check", file, "--show").out


def test_a_check_says_what_the_model_cannot_be_given(silotune: Callable[..., Any], tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "lab"}}]
    turns = [{"role": "user", "content": "K?"}, {"role": "assistant", "content": "4.1"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"tools": tools, "messages": turns}) + "\n", encoding="utf-8")
    outcome = silotune("data", "check", tmp_path / "chats.jsonl")
    assert "this model cannot be given 1 example: the tokenizer's chat template does not show tools" in outcome.out


def test_a_check_for_a_task_names_the_rows_that_do_not_fit(silotune: Callable[..., Any], folder: Path) -> None:
    outcome = silotune("data", "check", folder / "north.tsv", "--task", "fpb")
    assert outcome.code == 0
    assert "21 rows do not fit: field 'text' is missing" in outcome.out and "(row 1, row 2," in outcome.out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((), 2, "name a file, or a configuration with --config"),
        (("a.csv", "--task", "fpb", "--config", "fpb"), 2, "--task and --config both name a task"),
        (("none.csv",), 3, "no file"),
        (("numbers.csv",), 3, "none of the columns a, b looks like"),
        (("--config", "quickstart"), 3, "no files are named"),
    ],
)
def test_what_cannot_be_checked_is_said_in_one_line(
    silotune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, code: int, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    outcome = silotune("data", "check", *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (code, 1)
    assert told in outcome.err


def test_a_configuration_for_one_file(silotune: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.toml"
    found = json.loads(silotune("init", folder / "north.tsv", "--out", out, "--json").out)
    assert found["config"] == str(out)
    config = load_config(out)
    assert (config.data.train, config.data.partition.clients) == (folder / "north.tsv", 2)
    again = silotune("init", folder, "--out", out)
    assert again.code == 2 and "is there already" in again.err
    assert silotune("init", tmp_path / "none", "--out", tmp_path / "d.toml").code == 3


def test_a_first_configuration_takes_what_is_said_of_its_files(silotune: Callable[..., Any], tmp_path: Path) -> None:
    text = "备注,标签\n" + "".join(f"病人 {number},{'急缓'[number % 2]}\n" for number in range(40))
    (tmp_path / "a.csv").write_bytes(text.encode("gbk"))
    out = tmp_path / "c.toml"
    assert "name its encoding" in silotune("init", tmp_path / "a.csv", "--out", out).err
    outcome = silotune(
        "init", tmp_path / "a.csv", "--out", out, "--set", "data.encoding=gbk", "--set", "model.max_length=99"
    )
    assert outcome.code == 0, outcome.err
    config = load_config(out)
    assert (config.data.encoding, config.model.max_length) == ("gbk", 99)
    assert config.data.definition is not None and config.data.definition.options == ("急", "缓")


def test_files_whose_columns_have_other_names_are_told(
    silotune: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    odd = "text,klass\n" + "".join(f"x {number},wait\n" for number in range(9))
    (folder / "odd.csv").write_text(odd, encoding="utf-8")
    outcome = silotune("init", folder, "--out", tmp_path / "c.toml")
    assert (outcome.code, outcome.err.count("\n")) == (3, 1)
    assert "odd.csv: no row fits what the columns of all files show (field 'Note' is missing" in outcome.err


def test_a_guessed_task_is_printed_as_toml_however_long_its_lines(silotune: Callable[..., Any], tmp_path: Path) -> None:
    labels = [f"a rather long label number {number}" for number in range(8)]
    rows = "".join(f"Patient {number} coughs.,{labels[number % 8]}\n" for number in range(40))
    (tmp_path / "a.csv").write_text(f"note,label\n{rows}", encoding="utf-8")
    shown = silotune("data", "check", tmp_path / "a.csv").out
    assert "[data]" in shown and f'options = ["{labels[0]}", ' in shown
    assert tomllib.loads(shown[shown.index("[data]") :])["data"]["definition"]["options"] == labels


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": f"q {n}", "completion": "a", "label": n % 2 == 0} for n in range(40)], "only pairs"),
        ([{"question": f"q {n}", "reply": f"a {n}"} for n in range(5)], "clients of at least 4 examples need"),
    ],
)
def test_no_configuration_is_written_that_no_run_could_begin(
    silotune: Callable[..., Any], tmp_path: Path, rows: list[dict[str, Any]], told: str
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = silotune("init", tmp_path / "a.jsonl", "--out", tmp_path / "c.toml")
    assert outcome.code == 3 and told in outcome.err and not (tmp_path / "c.toml").exists()


def test_judged_answers_with_pairs_to_score_are_learnt_by_kto(silotune: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    judged = [{"prompt": f"q {n}", "completion": "a", "label": n % 2 == 0} for n in range(40)]
    pairs = [{"prompt": f"p {n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    for name, rows in {"north": judged, "test": pairs, "validation": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = silotune("init", folder, "--out", tmp_path / "c.toml")
    assert outcome.code == 0, outcome.err
    assert load_config(tmp_path / "c.toml").training.objective.type == "kto"


def test_columns_without_end_and_names_that_act_on_a_terminal_are_told_in_part(
    silotune: Callable[..., Any], tmp_path: Path
) -> None:
    names = ["text", "label", "a\nrow of ours \x1b[2J", f"{SECRET * 11}", *(f"c{number}" for number in range(200))]
    rows = [{"text": note(number), "label": "ab"[number % 2], **dict.fromkeys(names[2:], "x")} for number in range(20)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = silotune("data", "check", file)
    assert SECRET not in outcome.out + outcome.err and "\x1b" not in outcome.out
    assert "... and 104 more" in outcome.out and "(a name of 66 characters)" in outcome.out
    assert not any(line.startswith("row of ours") for line in outcome.out.splitlines())
