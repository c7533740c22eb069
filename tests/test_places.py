from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from silotune.benchmark.expand import Changes, expand
from silotune.benchmark.schema import load_grid
from silotune.config import Config, from_mapping, load_config, load_for_elsewhere
from silotune.settings.places import PLACES, anchored
from silotune.settings.registry import table_of
from silotune.shipped import asked

FILE = """
[model]
name = "base/tiny"
[adapter]
start = "../runs/first"
[data]
task = "fpb"
root = "data"
test = "~/test.jsonl"
[data.partition]
scheme = "file"
files = { a = "a.jsonl", b = "/b.jsonl" }
[federation]
modes = ["federated"]
[evaluation]
gold = "gold.jsonl"
selection = "test"
keep = "best"
forgetting = "embedded"
[privacy]
dp = { type = "example", epsilon = 8, ledger = "ledger" }
[training]
objective = "choice"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "own" / "base" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    path = tmp_path / "own" / "c.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.mark.parametrize("given", [str, Path, lambda name: from_mapping({"data": {"task": "fpb", "train": name}})])
def test_relative_places_of_a_dictionary_begin_where_it_is_given(tmp_path: Path, monkeypatch: Any, given: Any) -> None:
    """A run that is gone on with from another folder finds its data again."""
    monkeypatch.chdir(tmp_path)
    made = given("own.jsonl")
    config = asked(made if isinstance(made, Config) else {"data": {"task": "fpb", "train": made}})
    assert config.data.train == tmp_path / "own.jsonl"


@pytest.mark.parametrize("given", ["absolute", "relative"])
def test_relative_places_of_a_file_begin_at_its_folder(file: Path, given: str) -> None:
    config = load_config(file if given == "absolute" else Path("..") / "own" / "c.toml")
    shown = {str(path.resolve()) for path in (config.data.root, *config.data.partition.files.values()) if path}
    own = file.parent
    assert shown == {str(own / "data"), str(own / "a.jsonl"), "/b.jsonl"}
    assert config.data.test == Path("~/test.jsonl").expanduser()
    assert config.privacy.ledger is not None and config.privacy.ledger.resolve() == own / "ledger"
    assert Path(config.model.name).resolve() == own / "base" / "tiny"
    assert Path(str(config.adapter.begins_from)).resolve() == own.parent / "runs" / "first"
    assert Path(config.evaluation.gold).resolve() == own / "gold.jsonl"
    assert (config.evaluation.selection, config.evaluation.forgetting) == ("test", "embedded")
    assert config.record.folder == Path("runs")


def test_relative_places_of_the_command_line_begin_where_one_works(file: Path) -> None:
    config = load_config(file, ["data.root=mine", "evaluation.gold=mine.csv", "model.name=owner/name"])
    assert config.data.root == Path.cwd() / "mine"
    assert config.evaluation.gold == str(Path.cwd() / "mine.csv")
    assert config.model.name == "owner/name"


def test_a_run_for_elsewhere_keeps_its_places_as_they_are_written(file: Path) -> None:
    config = load_for_elsewhere(file)
    assert (config.data.root, config.evaluation.gold, config.model.name) == (Path("data"), "gold.jsonl", "base/tiny")


def test_a_mark_of_byte_order_before_a_configuration_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("seed = 3\n", encoding="utf-8-sig")
    assert load_config(path).seed == 3


def test_a_place_may_stand_in_any_section() -> None:
    document = {"federation": {"clock": {"trace": "t.csv"}, "policies": {"a": "p.toml", "b": "~/p.toml"}}}
    assert anchored(document, Path("/x")) == {
        "federation": {"clock": {"trace": "/x/t.csv"}, "policies": {"a": "/x/p.toml", "b": "~/p.toml"}}
    }


@pytest.mark.parametrize("wrong", [{"data": 3}, {"data": {"root": 3}}, {"privacy": {"dp": "none"}}, {"data": {}}])
def test_what_is_no_place_is_left_to_the_schema(wrong: dict[str, Any]) -> None:
    assert anchored(wrong, Path("/x")) == wrong


def test_relative_places_of_a_grid_begin_at_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_text(
        'name = "g"\nseeds = [1]\nmodes = ["federated"]\ntasks = ["fpb"]\n'
        'partitions = [{ name = "files", scheme = "file", files = { a = "a.jsonl" } }]\n'
        'adapters = [{ name = "lora", config = { adapter = { start = "first" } } }]\n'
        '[base]\ndata = { root = "data" }\n[[overrides]]\nconfig = { data = { test = "t.jsonl" } }\n',
        encoding="utf-8",
    )
    [planned] = expand(load_grid(path), Changes(settings=("data.validation=v.jsonl",)))
    data = planned.config.data
    assert (data.root, data.test, data.validation) == (tmp_path / "data", tmp_path / "t.jsonl", Path("v.jsonl"))
    assert data.partition.files == {"a": tmp_path / "a.jsonl"}
    assert planned.config.adapter.begins_from == str(tmp_path / "first")


def paths_of(section: type[BaseModel], where: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        key, table = f"{where}{name}", table_of(section, name)
        inner = [table[each] for each in table] if table is not None else list(types_in(field.annotation))
        if Path in inner:
            yield key
        for each in inner:
            if isinstance(each, type) and issubclass(each, BaseModel):
                yield from paths_of(each, f"{key}.")


def types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from types_in(inner)


def test_every_path_of_a_configuration_is_a_place_or_where_results_are_made() -> None:
    found = set(paths_of(Config))
    assert {"data.root", "data.partition.files", "privacy.dp.ledger", "federation.clock.trace"} <= found
    assert found - set(PLACES) == {"record.folder"}
