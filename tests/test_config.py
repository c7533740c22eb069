from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.config import Config, from_mapping, load_config, merge, parse_override, read_toml, validated
from silotune.errors import ConfigError
from silotune.settings.base import Section


def faults(document: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        from_mapping(document)
    return caught.value.faults


def test_an_empty_document_is_the_default_run() -> None:
    assert from_mapping({}) == Config()
    assert Config().model.name == "nano"


def test_a_configuration_survives_its_own_dump() -> None:
    config = from_mapping({"data": {"partition": {"scheme": "file", "files": {"a": "a.jsonl"}}}, "seed": 3})
    assert from_mapping(config.model_dump(mode="json")) == config


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().model.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"modle": {}}, "modle: unknown key 'modle': did you mean 'model'? allowed: adapter"),
        (
            {"training": {"learning_rate": float("inf")}},
            "training.learning_rate = inf: input should be a finite number",
        ),
        ({"model": {"nmae": "x"}}, "model.nmae: unknown key 'nmae': did you mean 'name'?"),
        ({"data": {"partition": {"alhpa": 1}}}, "data.partition.alhpa: unknown key 'alhpa': did you mean 'alpha'?"),
        ({"adapter": {"type": "lroa"}}, "adapter: unknown value 'lroa': did you mean 'lora'?"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate = -1: input should be greater than 0"),
        ({"data": {"task": "custom"}}, "data.task = 'custom' needs a section [data.definition]"),
        ({"data": {"partition": {"scheme": "file"}}}, "data.partition.scheme = 'file' needs [data.partition.files]"),
        (
            {"federation": {"clients_per_round": 9}},
            "federation.clients_per_round = 9 exceeds data.partition.clients = 4",
        ),
        ({"federation": {"modes": []}}, "federation.modes must name at least one mode, each once"),
        (
            {"federation": {"modes": ["isolated", "isolated"]}},
            "federation.modes must name at least one mode, each once",
        ),
        (
            {"federation": {"download": {"keep": "top-k"}}},
            "federation.download.keep = 'top-k' leaves too little of a whole model: set federation.download.delta",
        ),
        (
            {"federation": {"upload": {"values": "sign"}, "lora": "alternate"}},
            "federation.upload.values = 'sign' sends later what it leaves out, and federation.lora = 'alternate' has",
        ),
        (
            {"federation": {"download": {"values": "int8"}, "lora": "stack"}},
            "federation.lora = 'stack' sends down what has no one shape: leave federation.download out",
        ),
        (
            {"federation": {"download": {"values": "int8"}, "lora": "svd", "ranks": {"client-0": 2}}},
            "federation.ranks, memory_mb and policies send down what has no one shape: leave federation.download out",
        ),
        (
            {"federation": {"clock": {"buffer": 2}, "lora": "svd"}},
            "federation.clock.buffer takes late updates, which with federation.lora = 'svd' are of other factors",
        ),
        (
            {"federation": {"clock": {}, "engine": "ray"}},
            "federation.engine = 'ray': federation.clock: a clock is simulated in one process: leave it out",
        ),
        (
            {"federation": {"lora": "share-a", "engine": "ray"}},
            "federation.engine = 'ray': federation.personalization, or lora = 'share-a': a client's own model stays",
        ),
        (
            {"federation": {"engine": "ray"}, "privacy": {"protection": "secure_sum"}},
            "federation.engine = 'ray': privacy.protection: the secrets of a sum lie in one process's memory",
        ),
        (
            {"federation": {"clock": {}}, "privacy": {"dp": {"type": "example", "epsilon": 8}}},
            "privacy.dp = 'example' is accounted for updates as they are, of whole rounds: leave federation.upload",
        ),
        ({"federation": {"download": {"values": "sign"}}}, "federation.download.values = 'sign' leaves too little"),
        (
            {"federation": {"upload": {"values": "int3"}}},
            "federation.upload.values: unknown value 'int3': did you",
        ),
        (
            {"federation": {"clock": {"over_sampling": 2}}},
            "federation.clock.over_sampling needs federation.clients_per",
        ),
        ({"federation": {"clock": {"buffer": 5}}}, "federation.clock.buffer = 5 exceeds data.partition.clients = 4"),
        ({"federation": {"clock": {"buffer": 2, "deadline_seconds": 3}}}, "federation.clock.buffer makes rounds async"),
        (
            {"federation": {"clock": {"buffer": 2}, "download": {"delta": True}}},
            "federation.clock.buffer lets clients hold different models",
        ),
        (
            {"federation": {"clock": {"buffer": 2}}, "record": {"keep_updates": True}},
            "federation.clock.buffer weighs updates by their age",
        ),
        (
            {"federation": {"upload": {"values": "int8"}}, "privacy": {"protection": "secure_sum"}},
            "privacy.protection = 'secure_sum' sends sums in a form of its own",
        ),
        ({"federation": {"clock": {"clients": {"a": {"sped": 1}}}}}, "federation.clock.clients.a.sped: unknown key"),
        ({"federation": {"clock": {"clients": {"a": {"available": [[5, 2]]}}}}}, "available = ((5.0, 2.0),) must be"),
        (
            {"federation": {"clock": {"clients": {"a": {"available": [[5, 9e9]]}}}}},
            "federation.clock.clients.a.available ends after period_seconds = 86400",
        ),
        ({"adapter": {"type": "none"}, "model": {"precision": "int4"}}, "adapter.type = 'none' trains all weights"),
        ({"adapter": {"type": "qlora"}, "model": {"precision": "float32"}}, "adapter.type = 'qlora' needs"),
        (
            {"privacy": {"dp": {"type": "distributed", "epsilon": 1}}, "federation": {"weighting": "uniform"}},
            "privacy.dp = 'distributed' noises sums that nobody sees the parts of: set privacy.protection",
        ),
        (
            {
                "privacy": {"dp": {"type": "distributed", "epsilon": 1}, "protection": "secure_sum", "ring_bits": 16},
                "federation": {"weighting": "uniform"},
            },
            "privacy.dp = 'distributed' needs room for the noise: privacy.ring_bits = 32 or 64 (now 16)",
        ),
        (
            {"privacy": {"dp": {"type": "distributed", "epsilon": 1}, "protection": "secure_sum"}},
            "privacy.dp = 'distributed' adds noise to a mean in which no client weighs more than a known share",
        ),
        (
            {"privacy": {"dp": {"epsilon": 4}}},
            "privacy.dp.epsilon: this is a setting of 'example' and 'client' and 'local' and 'distributed' and means",
        ),
        (
            {"privacy": {"dp": "example"}},
            "privacy.dp = 'example' needs privacy.dp.epsilon, privacy.dp.noise_multiplier",
        ),
        (
            {
                "privacy": {"dp": {"type": "client", "epsilon": 1, "client_sampling": "poisson"}},
                "federation": {"weighting": "uniform"},
            },
            "privacy.dp.client_sampling = 'poisson' needs federation.clients_per_round",
        ),
        (
            {"privacy": {"dp": {"type": "local", "epsilon": 1}}, "federation": {"modes": ["federated", "isolated"]}},
            "privacy.dp = 'local' protects institutions from each other",
        ),
        (
            {"privacy": {"dp": {"type": "example", "epsilon": 1}}, "evaluation": {"per_client": True}},
            "evaluation.per_client releases exact figures on private examples",
        ),
        (
            {"privacy": {"dp": {"type": "client", "epsilon": 1}}},
            "privacy.dp = 'client' adds noise to a mean in which no client",
        ),
        (
            {"privacy": {"dp": {"type": "example", "epsilon": 1}}, "federation": {"weighting": "q-ffl"}},
            "federation.weighting = 'q-ffl' needs losses, which clients withhold",
        ),
        (
            {"privacy": {"dp": {"type": "example", "epsilon": 1}}, "federation": {"budget": {"joules": 5}}},
            "federation.budget.joules needs joules, which clients withhold",
        ),
        (
            {
                "privacy": {"dp": {"type": "example", "epsilon": 1}},
                "federation": {"algorithm": {"type": "scaffold", "option": "I"}},
                "training": {"optimizer": "sgd", "clip_norm": 0.0},
            },
            "federation.algorithm.option = 'I' sends an exact gradient",
        ),
        (
            {"privacy": {"dp": {"type": "local", "epsilon": 1}}, "federation": {"algorithm": "fednova"}},
            "federation.algorithm = 'fednova' cannot be used with privacy.dp = 'local'",
        ),
        ({"federation": {"algorithm": "scaffold"}}, "federation.algorithm = 'scaffold' divides an update by steps"),
        (
            {"federation": {"algorithm": "scaffold"}, "training": {"optimizer": {"type": "sgd", "momentum": 0.9}}},
            "federation.algorithm = 'scaffold' needs training.optimizer.momentum = 0",
        ),
        (
            {"federation": {"algorithm": "fednova"}, "training": {"optimizer": {"type": "sgd", "momentum": 0.9}}},
            "federation.algorithm = 'fednova' needs training.optimizer.momentum = 0",
        ),
        (
            {"federation": {"algorithm": "scaffold", "aggregation": "median"}, "training": {"optimizer": "sgd"}},
            "federation.algorithm = 'scaffold' sends controls, from which federation.aggregation = 'median' does not",
        ),
        (
            {"federation": {"algorithm": "fednova", "aggregation": "norm-bound"}},
            "federation.algorithm = 'fednova' sends numbers of steps, from which",
        ),
        (
            {"federation": {"algorithm": {"type": "scaffold", "option": "I"}}, "training": {"optimizer": "sgd"}},
            "federation.algorithm.option = 'I' takes a whole gradient for its control, and steps that are clipped",
        ),
        (
            {"federation": {"algorithm": "feddyn", "clock": {"buffer": 2}}},
            "federation.algorithm = 'feddyn' sums whole updates, and federation.clock.buffer weighs them by age",
        ),
        ({"federation": {"weighting": "capped"}}, "federation.weighting.cap: this key is missing, and has no default"),
        (
            {"federation": {"weighting": "q-ffl", "aggregation": "median"}},
            "federation.aggregation = 'median' counts every update once",
        ),
        (
            {"federation": {"aggregation": "krum"}},
            "federation.aggregation = 'krum' with these settings needs at least 5 clients a round, there are",
        ),
        (
            {"federation": {"attack": {"type": "scaled", "clients": 4}}},
            "federation.attack.clients = 4 leaves no honest one of 4 clients",
        ),
    ],
)
def test_one_fault_is_explained(document: dict[str, Any], fault: str) -> None:
    found = faults(document)
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_all_faults_come_at_once() -> None:
    found = faults({"model": {"nmae": 1}, "adapter": {"rank": 0}, "training": {"objective": "stf"}})
    assert len(found) == 3
    with pytest.raises(ConfigError, match="^x.toml: 3 faults: "):
        from_mapping({"model": {"nmae": 1}, "adapter": {"rank": 0}, "training": {"objective": "stf"}}, source="x.toml")


def test_faults_of_values_and_between_sections_come_at_once() -> None:
    found = faults({"training": {"epohcs": 1}, "adapter": {"type": "qlora"}, "model": {"precision": "float32"}})
    assert [line.split(":")[0] for line in found] == [
        "training.epohcs", "adapter.type = 'qlora' needs model.precision = 'int4'",
    ]  # fmt: skip
    found = faults({"model": {"nmae": 1}, "data": {"partition": {"scheme": "file"}}})
    assert len(found) == 2 and "needs [data.partition.files]" in found[1]
    assert (
        len(faults({"privacy": {"dp": {"type": "example", "epsilon": -1}}})) == 1
    )  # nothing is said of what its absence brings


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"adapter": {"targets": "foo"}}, "adapter.targets: unknown value 'foo': allowed: all-linear, auto"),
        ({"adapter": {"targets": [1]}}, "adapter.targets.0 = 1: input should be a valid string"),
        ({"federation": {"modes": "federated"}}, "federation.modes = 'federated': a list is needed, such as"),
        ({"federation": {"modes": ["federated", "x"]}}, "federation.modes.1: unknown value 'x'"),
        ({"seed": True}, "seed = True: a number is needed"),
        ({"seed": "01"}, "seed = '01': a number is needed"),
        ({"federation": {"rounds": "2"}}, "federation.rounds = '2': a number is needed"),
        ({"training": {"learning_rate": "1e-3"}}, "training.learning_rate = '1e-3': a number is needed"),
        ({"privacy": {"dp": {"type": "example", "epsilon": True}}}, "privacy.dp.epsilon = True: a number is needed"),
    ],
)
def test_a_value_of_several_types_has_one_fault(document: dict[str, Any], fault: str) -> None:
    (found,) = faults(document)
    assert found.startswith(fault) and "tuple" not in found and "literal[" not in found


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"data": {"definition": {"prompt": "{q}", "answer": "a"}}}, "data.definition is for data.task = 'custom'"),
        ({"data": {"partition": {"files": {"a": "x"}}}}, "data.partition.files is for data.partition.scheme = 'file'"),
        ({"adapter": {"type": "ia3", "dora": True}}, "adapter.dora: this is a setting of 'lora' and 'qlora' and means"),
        (
            {"adapter": {"type": "none", "start": "x"}},
            "adapter.start: this is a setting of 'lora' and",
        ),
        ({"privacy": {"ring_bits": 16}}, "privacy.ring_bits = 16 is for privacy.protection = 'secure_sum'"),
        ({"privacy": {"bound": 2}}, "privacy.bound = 2.0 is for privacy.protection = 'secure_sum' or 'he'"),
        (
            {"privacy": {"protection": "secure_sum", "he_packing": 2}},
            "privacy.he_packing = 2 is for privacy.protection = 'he'",
        ),
        (
            {"privacy": {"protection": "secure_sum"}, "record": {"keep_updates": True}},
            "privacy.protection = 'secure_sum' hides the updates that record.keep_updates would keep",
        ),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(document: dict[str, Any], fault: str) -> None:
    (found,) = faults(document)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "name", ["../../esc", "a/b", "/etc", "..", ".", ".a", "-x", "x y", "", "a\n", "a\0", "é", "x" * 201]
)
def test_a_run_s_name_stays_within_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="with a letter, a digit or _ first") as fault:
        from_mapping({"record": {"name": name}})
    (said,) = fault.value.faults
    assert said.startswith(f"record.name = {name!r}: it cannot name a folder: use") and "\n" not in said
    assert from_mapping({"record": {"name": "Run_1.2+b-c"}}).record.name == "Run_1.2+b-c"


def test_the_home_folder_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    data = from_mapping({"data": {"root": "~/data", "train": "~/x.jsonl"}, "record": {"folder": "~/runs"}})
    found = (data.data.root, data.data.train, data.record.folder)
    assert found == (Path("/home/somebody/data"), Path("/home/somebody/x.jsonl"), Path("/home/somebody/runs"))
    nobody = from_mapping({"data": {"root": "~nobody-of-that-name/data"}})
    assert nobody.data.root == Path("~nobody-of-that-name/data")


def test_faults_between_sections_come_at_once() -> None:
    found = faults({"data": {"task": "custom", "partition": {"scheme": "file"}}, "federation": {"modes": []}})
    assert len(found) == 3


def test_clients_per_round_is_free_where_the_data_decide_on_the_clients() -> None:
    document = {"data": {"partition": {"scheme": "field"}}, "federation": {"clients_per_round": 9}}
    assert from_mapping(document).federation.clients_per_round == 9


@pytest.mark.parametrize("document", [{"model": 3}, {"adapter": 3}, {"adapter": {"type": "qlora"}, "model": 3}])
def test_a_section_that_is_no_table_is_refused(document: dict[str, Any]) -> None:
    assert len(faults(document)) == 1


def test_qlora_implies_int4() -> None:
    assert from_mapping({"adapter": {"type": "qlora"}}).model.precision == "int4"
    assert from_mapping({"adapter": {"type": "qlora"}, "model": {"name": "x"}}).model.precision == "int4"
    assert from_mapping({"adapter": {"type": "lora"}}).model.precision == "float32"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("seed=3", ["seed"], 3),
        ("model.name=gpt2", ["model", "name"], "gpt2"),
        ("model.name='gpt2'", ["model", "name"], "gpt2"),
        ("data.root=../shared/data", ["data", "root"], "../shared/data"),
        ("a.b.c=[1, 2]", ["a", "b", "c"], [1, 2]),
        ("evaluation.per_client=true", ["evaluation", "per_client"], True),
        ("a=b=c", ["a"], "b=c"),
        ("a=", ["a"], None),
    ],
)
def test_overrides_are_read_as_toml_or_as_text(text: str, path: list[str], value: object) -> None:
    assert parse_override(text) == (path, value)


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=1", "a.=1"])
def test_broken_overrides_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form section.key=value"):
        parse_override(text)


@given(st.integers(0, 2**32 - 1), st.integers(1, 99))
def test_later_overrides_win_and_the_document_is_left_alone(seed: int, rank: int) -> None:
    document = {"adapter": {"rank": 4}}
    merged = merge(document, ["seed=1", f"seed={seed}", f"adapter.rank={rank}"])
    assert merged == {"seed": seed, "adapter": {"rank": rank}}
    assert document == {"adapter": {"rank": 4}}
    assert from_mapping(merged).adapter.rank == rank


def test_an_override_cannot_turn_a_value_into_a_section() -> None:
    with pytest.raises(ConfigError, match="'seed' is not a section"):
        merge({"seed": 1}, ["seed.x=1"])


def test_load_config_reads_overrides_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[adapter]\nrank = 2\n", encoding="utf-8")
    assert load_config(path, ["adapter.rank=3"]).adapter.rank == 3
    with pytest.raises(ConfigError, match="run.toml: adapter.rank = 0"):
        load_config(path, ["adapter.rank=0"])


def test_broken_toml_is_named_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML: .*line 1"):
        load_config(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file .*none.toml'; 'silotune configs list'"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path / "latin.toml")


def test_an_unknown_key_below_a_free_table_is_explained_without_a_list() -> None:
    found = faults({"data": {"definition": {"prompt": "{a}", "answer": "b", "optoins": []}, "task": "custom"}})
    assert "did you mean 'options'?" in found[0]


def test_what_protection_cannot_do_is_refused() -> None:
    found = faults(
        {
            "privacy": {"protection": "secure_sum", "least_clients": 5},
            "evaluation": {"per_client": True},
            "data": {"partition": {"clients": 4}},
        }
    )
    assert len(found) == 2
    assert "hides each client's figures, which evaluation.per_client asks for" in found[0]
    assert "no sum of fewer than privacy.least_clients = 5: a round has 4 clients" in found[1]
    assert faults({"privacy": {"protection": "secure-sum"}})[0].startswith(
        "privacy.protection: unknown value 'secure-sum': did you mean 'secure_sum'?"
    )
    for threshold in (0.5, 1.0):
        assert len(faults({"privacy": {"threshold": threshold}})) == 1


def test_algorithms_that_need_single_updates_are_refused_under_protection() -> None:
    for name in ("scaffold", "fednova"):
        found = faults(
            {"privacy": {"protection": "he"}, "federation": {"algorithm": name}, "training": {"optimizer": "sgd"}}
        )
        assert len(found) == 1
        assert f"federation.algorithm = {name!r} needs more; it works with fedavg, fedprox" in found[0]
    found = faults(
        {
            "privacy": {"protection": "secure_sum"},
            "federation": {"aggregation": "median", "weighting": "uniform", "attack": "sign-flip"},
        }
    )
    assert ["aggregation = 'median'" in found[0], "weighting = 'uniform'" in found[1], "sign-flip" in found[2]] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"a": 1}, "part: this key is missing"),
        ({"part": {}}, "part.host: this key is missing"),
        ({"part": {"hosst": "x"}}, "part.host: this key is missing|part.hosst: unknown key 'hosst'"),
        ({"part": 3}, "part = 3: a section with keys is needed, such as [part]"),
    ],
)
def test_a_file_that_the_command_does_not_name_is_named_by_every_fault(document, said) -> None:
    class Part(Section):
        host: str

    class Whole(Section):
        part: Part
        a: int = 0

    with pytest.raises(ConfigError) as caught:
        validated(Whole, document, source="kit/site.toml", is_named=True)
    assert len(caught.value.faults) == len(said.split("|"))
    for words in said.split("|"):
        assert any(fault.startswith(f"kit/site.toml: {words}") for fault in caught.value.faults), caught.value.faults
    assert "hosst'}" not in str(caught.value)


def test_what_is_no_mapping_is_said_so() -> None:
    with pytest.raises(ConfigError, match="config.json: holds no keys"):
        from_mapping([], source="config.json")  # type: ignore[arg-type]
