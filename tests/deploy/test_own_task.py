"""A task of the run's own over sites: its definition travels signed, each site says which of its columns are read."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import kits
import tiny
from deployed import Deployed, document, over_tls, quickly
from silotune.config import from_mapping
from silotune.data.rows import to_example
from silotune.data.tasks import resolve
from silotune.deploy.check import CHECKS, _FaultError
from silotune.deploy.kits import read_kit
from silotune.deploy.trainer import holdings_of
from silotune.errors import ConfigError, DataError, KitError
from silotune.experiment.run import run_experiment
from silotune.experiment.site import Holdings, task_at
from silotune.federation.wire.run_setup import Setup, without_places
from silotune.settings.sections import MOST_OPTIONS, DataSection, TaskSection

OPEN = {"prompt": "{note}\nWhat is to be done?", "answer": "reply", "fields": ["ward"]}
CLOSED = {"prompt": "{note}", "answer": "level", "options": ["low", "high"]}
PAIRS = {"prompt": "{note}", "answer": "good", "rejected": "bad"}


def rows(start: int, *names: str) -> list[dict[str, str]]:
    note, reply = names
    return [{note: f"case {place}", reply: f"answer {place}"} for place in range(start, start + 8)]


def task_of(definition: Mapping[str, Any]) -> DataSection:
    return DataSection(task="custom", definition=TaskSection.model_validate(definition))


@pytest.mark.parametrize("definition", [OPEN, CLOSED, PAIRS])
def test_a_definition_that_was_written_out_whole_is_the_same_task(definition: dict[str, Any]) -> None:
    section = task_of(definition)
    assert resolve(DataSection.model_validate(section.model_dump(mode="json"))) == resolve(section)
    config = from_mapping({"data": section.model_dump()})
    assert resolve(Setup.model_validate(Setup(config=config).model_dump(mode="json")).config.data) == resolve(section)


def read_at(run: Mapping[str, Any], **has: Any) -> tuple[tuple[str, ...], ...]:
    """Required columns and partition fields of a task as a site's file has it."""
    section, own = task_of(run), Holdings("north", task="custom", **has)
    layout = task_at(own, resolve(section), section.definition).layouts[0]
    return tuple(layout.required()), tuple(layout.fields.values())


def test_a_site_reads_what_it_offers_under_names_of_its_own() -> None:
    columns = {"note": "Befund", "reply": "Antwort"}
    assert read_at(OPEN, columns=columns) == (("Befund", "Antwort"), ())
    assert read_at(OPEN, columns={**columns, "ward": "Station", "more": "x"}) == (("Befund", "Antwort"), ("Station",))
    pinned = TaskSection.model_validate(OPEN)
    assert read_at(OPEN, definition=pinned) == (("note", "reply"), ("ward",))
    assert read_at(OPEN, definition=pinned, columns=columns) == (("Befund", "Antwort"), ("ward",))


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({}, "reads 'note', which [data.columns] in site.toml does not offer"),
        ({"columns": {"note": "Befund"}}, "reads 'reply', which [data.columns] in site.toml does not offer"),
        ({"definition": TaskSection(prompt="{note}!", answer="reply")}, "another than [data.definition] in site.toml"),
        ({"definition": TaskSection.model_validate(OPEN), "columns": {"nota": "x"}}, "did you mean 'note'?"),
    ],
)
def test_a_run_cannot_choose_columns_that_a_site_does_not_offer(has: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_at(OPEN, **has)
    assert said in str(caught.value)


def test_what_stands_beside_a_chat_is_read_where_a_site_offers_it() -> None:
    """Tools, and the system's turn beside ShareGPT's, have columns that no definition names."""
    chat = [{"role": "user", "content": "is it so?"}]
    row = {
        "chat": chat, "answer": "yes", "system": "private", "conversations": chat,
        "tools": [{"name": "look", "description": "private"}],
    }  # fmt: skip
    section = task_of({"prompt": "{chat}", "answer": "answer"})
    columns = {"chat": "chat", "answer": "answer"}
    more = {"tools": "tools", "system": "system", "conversations": "conversations"}
    for offered, roles in ((columns, ["user"]), ({**columns, **more}, ["tools", "system", "user"])):
        own = Holdings("north", task="custom", columns=offered)
        made = to_example(task_at(own, resolve(section), section.definition), row, where="x", number=1)
        assert [role for role, _ in made.messages] == roles


def test_a_definition_has_no_more_options_than_can_be_scored_and_an_error_lists_few() -> None:
    many = [f"code {number}" for number in range(MOST_OPTIONS + 1)]
    with pytest.raises(ValidationError, match="2049 options, at most 2048 are taken"):
        task_of({**CLOSED, "options": many})
    with pytest.raises(DataError, match=r"level is not one of code 0, .*, code 39 and 2008 more$"):
        task = resolve(task_of({**CLOSED, "options": many[:-1]}))
        to_example(task, {"note": "a", "level": "b"}, where="x", number=1)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('task = "custom"', "names no file, which data.task = 'custom' needs"),
        ('task = "custom"\ntrain = "a.csv"', "needs [data.columns], with a line for each column"),
        ('train = "a.csv"', "names no task: set it to one of"),
        ('task = "mixture"\ntrain = "a.csv"', "name the one task that this site's examples are of"),
        ('task = "fpb"', "names no file, and task 'fpb' is not generated"),
        ('task = "fpb"\ntrain = "a.csv"\n[data.definition]\nprompt = "{a}"\nanswer = "b"', "leave it out"),
        ('task = "custom"\ntrain = "a.csv"\n[data.columns]\nnote = "befunt"', "did you mean 'befund'?"),
        ('task = "custom"\ntrain = "a.csv"\n[data.definition]\nprompt = "{befund}"\nanswer = "x"', "'x' is missing"),
    ],
)
def test_check_says_what_the_examples_lack_and_how_to_mend_it(kit: Path, lines: str, said: str) -> None:
    with pytest.raises((_FaultError, DataError)) as caught:
        checked(kit, lines)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_check_says_what_of_the_file_a_run_may_read(kit: Path) -> None:
    assert checked(kit, "") == "none of its own: it takes its share of generated tasks"
    said = checked(kit, 'task = "custom"\ntrain = "a.csv"\n[data.columns]\nnote = "befund"\nreply = "antwort"')
    assert said == "3 rows; a run's own task may read note (column 'befund'), reply (column 'antwort', empty in 1)"
    said = checked(kit, 'task = "fpb"\ntrain = "b.csv"\n[data.columns]\nsentence = "satz"\ntext = "satz"')
    assert said == "1 examples for fpb; the longest has 33 tokens"


def test_a_pinned_definition_is_that_of_the_signed_setup_wherever_its_rows_come_from(kit: Path) -> None:
    pinned = '[data.definition]\nprompt = "{befund}"\nanswer = "antwort"\nhub_id = "some/where"'
    assert checked(kit, f'task = "custom"\ntrain = "c.csv"\n{pinned}').startswith("1 examples for custom")
    data = {"task": "custom", "definition": {"prompt": "{befund}", "answer": "antwort", "hub_id": "some/where"}}
    sent = without_places(from_mapping({"data": data})).data
    assert task_at(holdings_of(read_kit(kit)), resolve(sent), sent.definition) == resolve(sent)


@pytest.mark.parametrize(
    "line", ['[data]\ntest = "a.csv"', '[data]\nvalidation = "a.csv"', '[model]\nprecision = "int4"']
)
def test_what_nobody_reads_is_no_setting_of_a_site(tmp_path: Path, line: str) -> None:
    head, key = line.split("\n")
    settings = kits.make(tmp_path / "f", ["north"]) / "north" / "site.toml"
    settings.write_text(settings.read_text().replace(f"\n{head}\n", f"\n{line}\n"))
    with pytest.raises(ConfigError, match=key.partition(" ")[0]):
        read_kit(settings.parent)


def test_a_kit_whose_settings_name_another_federation_than_its_members_is_refused(tmp_path: Path) -> None:
    settings = kits.make(tmp_path / "f", ["north"]) / "north" / "site.toml"
    settings.write_text(re.sub('federation = ".*"', 'federation = "other"', settings.read_text()))
    with pytest.raises(KitError, match="the kit's settings name 'other'"):
        read_kit(settings.parent).members()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = kits.make(tmp_path_factory.mktemp("kits") / "f", ["north"]) / "north"
    (folder / "a.csv").write_text("befund,antwort\na,b\nc,\nd,e\n")
    (folder / "c.csv").write_text("befund,antwort\na,b\n")
    (folder / "b.csv").write_text("satz,label\nshares rose,positive\n")
    return folder


def checked(kit: Path, lines: str) -> str:
    settings = kit / "site.toml"
    settings.write_text(settings.read_text().partition("\n[data]")[0] + f"\n[data]\n{lines}\n")
    return CHECKS["data format"](read_kit(kit))


@pytest.mark.end_to_end
def test_an_open_task_of_one_s_own_ends_with_the_bits_of_one_process(
    tmp_path: Path, tiny_folder: Path, write: Callable[..., str]
) -> None:
    named = {"north": ("note", "reply"), "south": ("Befund", "Antwort, frei")}
    made, near = Deployed(tmp_path / "f", tiny_folder, tuple(named)), {}
    for number, (site, columns) in enumerate(named.items()):
        near[site] = write(tmp_path / f"near-{site}.csv", rows(8 * number, "note", "reply"))
        file = write(tmp_path / f"{site}.csv", rows(8 * number, *columns))
        offered = [f"{name} = {json.dumps(column)}" for name, column in zip(named["north"], columns, strict=True)]
        settings = made.folder / site / "site.toml"
        text = settings.read_text().replace("# task = ", 'task = "custom"  # ')
        text = text.replace('# train = "/path/to/train.jsonl"', f"train = {json.dumps(file)}")
        settings.write_text("\n".join([text, "[data.columns]", *offered, ""]))
        made.hosts[site] = made.restarted(site)
    apart = {name: write(tmp_path / f"{name}.csv", rows(90, "note", "reply")) for name in ("validation", "test")}
    data = {"task": "custom", "definition": OPEN, "num_train": None, **apart}
    data["partition"] = {"scheme": "file", "files": near}
    own = {"data": data, "training": {"objective": "sft"}, "federation": {"rounds": 1}}
    asked = document(tiny_folder, tmp_path / "runs", **own, evaluation={"per_client": True})
    with over_tls(made), quickly():
        far = made.submitted(asked)
    near_by = run_experiment(from_mapping(asked))
    tiny.assert_same_bits(*(run.part("federated").load_adapter()[0] for run in (far, near_by)))
    assert set(far.part("federated").read_json("per_client")) >= set(named)


@pytest.fixture
def write() -> Callable[..., str]:
    def written(path: Path, found: list[dict[str, str]]) -> str:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
        return str(path)

    return written
