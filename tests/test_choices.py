"""A choice by name and its settings: the plain name, the table, and what belongs to another choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from silotune.config import MOVED, Config, from_mapping, merge, overlaid
from silotune.errors import ConfigError
from silotune.federation.wire.run_setup import without_places
from silotune.settings.algorithms import ALGORITHMS, AlgorithmSettings, FedAdam
from silotune.settings.base import exactly
from silotune.settings.registry import Choice, Table, section_of, table_at, table_of
from silotune.settings.sections import FederationSection


def tables(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Table[Any]]]:
    """Every choice below a section, those within other choices too, with its path of keys."""
    for name in section.model_fields:
        table, inner = table_of(section, name), section_of(section, name)
        if table is not None:
            yield (*path, name), table
            for each in table:
                yield from tables(table[each], (*path, name))
        elif inner is not None:
            yield from tables(inner, (*path, name))


CHOICES = dict(tables(Config))
FOREIGN = [
    (path, name, key, table.owners(key))
    for path, table in CHOICES.items()
    for name in table
    for key in dict.fromkeys(key for other in table for key in table[other].model_fields)
    if key not in table[name].model_fields
]
"""Path of a choice, a name of it, a setting that this one does not have, and the names that have it."""


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value


def faults(document: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        from_mapping(document)
    return caught.value.faults


def test_every_choice_says_where_it_stands_and_every_name_what_it_is() -> None:
    assert len(CHOICES) >= 1 and len(FOREIGN) > 20
    for path, table in CHOICES.items():
        assert table.where == ".".join(path)
        for name in table:
            assert table[name].type == name and table[name].__doc__


@pytest.mark.parametrize(("path", "name", "key", "owners"), FOREIGN, ids=lambda given: str(given))
def test_a_setting_of_another_choice_is_refused_and_names_its_owner(
    path: tuple[str, ...], name: str, key: str, owners: list[str]
) -> None:
    """All of them: of every choice, every name with every setting that others have and it has not."""
    around = path[:-1]
    within = table_at(Config, around)
    document = nested(path, {"type": name, key: 1})
    if within is not None:  # a choice within a choice: the first that has it
        document = nested(around, {"type": within.owners(path[-1])[0], path[-1]: {"type": name, key: 1}})
    owned = " and ".join(map(repr, owners))
    said = f"{'.'.join(path)}.{key}: this is a setting of {owned} and means nothing with {name!r}"
    assert said in faults(document)


@pytest.mark.parametrize("path", CHOICES, ids=".".join)
def test_plain_name_and_table_are_the_same_and_a_dump_is_read_back(path: tuple[str, ...]) -> None:
    for name in CHOICES[path]:
        table = CHOICES[path]
        try:
            made = table.read(name)
        except ValueError:
            assert any(field.is_required() for field in table[name].model_fields.values())
            continue
        assert made == table.read({"type": name}) and type(made) is table[name]
        assert table.read(made.model_dump(mode="json")) == made
        assert made.model_dump()["type"] == name
        assert hash(made) == hash(table.read(name))


def test_a_configuration_with_settings_of_its_choices_is_read_back_equal() -> None:
    config = from_mapping({"federation": {"algorithm": {"type": "fedadam", "server_learning_rate": 0.02}}})
    assert config.federation.algorithm == FedAdam(server_learning_rate=0.02)
    assert from_mapping(config.model_dump(mode="json")) == config
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert exactly(Config, config.model_dump(mode="json")) == config
    assert without_places(config).federation.algorithm == config.federation.algorithm
    assert hash(config.federation.algorithm) == hash(FedAdam(server_learning_rate=0.02))
    assert FederationSection(algorithm="fedavg") != FederationSection(algorithm="fednova")


def test_a_table_without_a_type_is_of_the_default_one() -> None:
    section = from_mapping({"federation": {"algorithm": {"server_learning_rate": 0.5}}}).federation
    assert (section.algorithm.type, section.algorithm.server_learning_rate) == ("fedavg", 0.5)


@pytest.mark.parametrize(
    ("algorithm", "fault"),
    [
        ("fedadm", "federation.algorithm: unknown value 'fedadm': did you mean 'fedadam'? allowed: fedadagrad"),
        ({"type": "fedadm"}, "federation.algorithm: unknown value 'fedadm': did you mean 'fedadam'?"),
        ({"type": "fedprox", "proximal_mo": 1}, "federation.algorithm.proximal_mo: unknown key 'proximal_mo': did you"),
        ({"type": "fedprox", "proximal_mu": -1}, "federation.algorithm.proximal_mu = -1: input should be greater than"),
        ({"type": "fedprox", "proximal_mu": "1"}, "federation.algorithm.proximal_mu = '1': a number is needed"),
        ({"type": "scaffold", "option": "III"}, "federation.algorithm.option: unknown value 'III': did you mean 'II'"),
        ({"type": 3}, "federation.algorithm: unknown value '3': allowed: "),
        (3, "federation.algorithm = 3: a name is needed, or a table with a type and its settings"),
        ([], "federation.algorithm = []: a name is needed"),
    ],
)
def test_what_cannot_be_read_is_one_fault(algorithm: Any, fault: str) -> None:
    (found,) = faults({"federation": {"algorithm": algorithm}, "training": {"optimizer": "sgd"}})
    assert found.startswith(fault)


def test_all_faults_of_a_choice_come_at_once() -> None:
    algorithm = {"type": "fedadam", "server_momentum": 0.5, "server_tau": -1, "tau": 1}
    assert len(faults({"federation": {"algorithm": algorithm, "rounds": 0}})) == 4


# --- documents over documents ---------------------------------------------------------------------------------------

PLAIN = {"federation": {"algorithm": "fedavgm"}}
TABLE = {"federation": {"algorithm": {"type": "fedavgm", "server_learning_rate": 0.3, "server_momentum": 0.5}}}
RATE, NAME = "federation.algorithm.server_learning_rate=0.02", "federation.algorithm=fedadam"
TYPE = "federation.algorithm.type=fedadam"


@pytest.mark.parametrize(
    ("document", "settings", "algorithm"),
    [
        ({}, [NAME], "fedadam"),
        ({}, [RATE], {"server_learning_rate": 0.02}),
        ({}, [NAME, RATE], {"type": "fedadam", "server_learning_rate": 0.02}),
        ({}, [RATE, NAME], {"type": "fedadam", "server_learning_rate": 0.02}),
        (PLAIN, [RATE], {"type": "fedavgm", "server_learning_rate": 0.02}),
        (PLAIN, [RATE, NAME], {"type": "fedadam", "server_learning_rate": 0.02}),
        (TABLE, [NAME], "fedadam"),
        (TABLE, [RATE], {"type": "fedavgm", "server_learning_rate": 0.02, "server_momentum": 0.5}),
        (TABLE, [TYPE], {"type": "fedadam", "server_learning_rate": 0.3}),
        (TABLE, [RATE, TYPE], {"type": "fedadam", "server_learning_rate": 0.02}),
        (TABLE, ["federation.algorithm={type='fedadam', server_tau=1.0}"], {"type": "fedadam", "server_tau": 1.0}),
    ],
)
def test_names_come_first_and_settings_after_them(document: Any, settings: list[str], algorithm: Any) -> None:
    merged = merge(document, settings)
    assert merged["federation"]["algorithm"] == algorithm
    from_mapping(merged)


def test_a_plain_name_takes_the_place_of_the_whole_and_a_table_adds() -> None:
    tuned = {"federation": {"algorithm": {"server_learning_rate": 0.02}}}
    assert overlaid(PLAIN, tuned)["federation"]["algorithm"] == {"type": "fedavgm", "server_learning_rate": 0.02}
    assert overlaid(TABLE, PLAIN) == PLAIN
    other = {"federation": {"algorithm": {"type": "fedadam"}}}
    assert overlaid(TABLE, other)["federation"]["algorithm"] == {"type": "fedadam", "server_learning_rate": 0.3}
    assert TABLE["federation"]["algorithm"]["server_momentum"] == 0.5


# --- earlier configurations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", MOVED)
def test_a_key_of_an_earlier_configuration_says_where_it_went(old: str) -> None:
    new = MOVED[old].split(".")
    table = table_at(Config, new[:-1])
    assert table is not None and (new[-1] == "type" or table.owners(new[-1]))
    found = faults(nested(tuple(old.split(".")), 1))
    assert any(line.startswith(f"{old} moved: write {new[-1]} = 1") for line in found)
    assert any(line.endswith(f"or --set {MOVED[old]}=1") for line in found)


def test_the_new_place_of_an_old_key_is_written_out() -> None:
    (found,) = faults({"federation": {"algorithm": "fedprox", "proximal_mu": 0.1}})
    assert found == (
        'federation.proximal_mu moved: write proximal_mu = 0.1 beside type = "fedprox" in [federation.algorithm], '
        "or --set federation.algorithm.proximal_mu=0.1"
    )


# --- names that come later --------------------------------------------------------------------------------------------


def test_a_name_that_is_added_is_one_like_the_others() -> None:
    class Mine(AlgorithmSettings):
        """For this test."""

        type = "mine"
        strength: float = 1.0

    class Holder(Choice):
        type: ClassVar[str] = "fedavg"

    own = [ALGORITHMS[name] for name in ALGORITHMS]
    table = Table("federation.algorithm", *own, Mine)
    assert table.read({"type": "mine", "strength": 2.0}) == Mine(strength=2.0) and list(table)[-1] == "mine"
    assert "mine" not in ALGORITHMS
    with pytest.raises(ValueError, match="'mine' of Mine is defined already: take another name"):
        Table("federation.algorithm", *own, Mine, Mine)
    with pytest.raises(ValueError, match="'fedavg' of Holder is defined already"):
        Table("federation.algorithm", *own, Holder)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="AlgorithmSettings has no name"):
        Table("federation.algorithm", *own, AlgorithmSettings)
    with pytest.raises(ValueError, match="defined already"):
        Table("federation.algorithm", FedAdam, FedAdam)


def test_another_scheme_leaves_out_what_meant_something_with_the_first_alone() -> None:
    dealt = {"data": {"partition": {"field": "sector", "clients": 3, "alpha": 0.1}}}
    for changed in (
        merge(dealt, ["data.partition.scheme=iid"]),
        overlaid(dealt, {"data": {"partition": {"scheme": "iid"}}}),
    ):
        assert changed["data"]["partition"] == {"clients": 3, "scheme": "iid"}
    with pytest.raises(ConfigError, match="data.partition.alpha is for data.partition.scheme = 'dirichlet' or"):
        from_mapping(merge(dealt, ["data.partition.alpha=2", "data.partition.scheme=iid"]))
    with pytest.raises(ConfigError, match="federation.upload.share is for federation.upload.keep = 'top-k'"):
        from_mapping({"federation": {"upload": {"share": 0.5}}})
