"""Packages of the user's own: what they add is found, used, and refused where it cannot be or may not be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from silotune.cli.listings import plugins as command
from silotune.config import Config, from_mapping, plugins_of
from silotune.data.tasks import task_named
from silotune.errors import ConfigError, MissingPackageError, PluginError, PolicyError
from silotune.experiment.needs import config_of
from silotune.experiment.site import setup_of
from silotune.federation.wire.run_setup import check_plugins, read_setup
from silotune.methods.algorithms import method
from silotune.record.runs import RunFolder
from silotune.settings import plugins
from silotune.settings.algorithms import ALGORITHMS, FedAvg
from silotune.settings.sections import FederationSection

SOURCES = Path(__file__).parents[1] / "examples" / "plugin" / "src"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with entry points where Python looks for packages, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(
        package: str, entries: Mapping[str, str], *, version: str = "1.0", source: str = "", group: str = "algorithms"
    ) -> None:
        info = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = [f"[silotune.{group}]", *(f"{name} = {place}" for name, place in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        if source:
            (tmp_path / f"{package.replace('-', '_')}.py").write_text(source)
        plugins.installed.cache_clear()

    yield put
    plugins.installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("silotune_nesterov", "my_"))]:
        del sys.modules[name]


@pytest.fixture
def nesterov(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package under examples, as if it were installed."""
    monkeypatch.syspath_prepend(str(SOURCES))
    install("silotune-nesterov", {"nesterov": "silotune_nesterov:Nesterov"}, version="0.1.0")


def naming(algorithm: object) -> Config:
    return from_mapping({"federation": {"algorithm": algorithm}})


def test_a_package_adds_an_algorithm_with_settings_of_its_own(nesterov: None) -> None:
    config = naming({"type": "nesterov", "server_momentum": 0.5})
    assert plugins_of(config) == {"silotune-nesterov": "0.1.0"}
    assert from_mapping(config.model_dump(mode="json")) == config
    weights, delta = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, -1.0])}
    made = method(config.federation)
    once, memory = made.step(weights, delta, {}, 1.0)
    assert once["w"].tolist() == [1.75, 0.5]  # w + delta + m v, v = delta
    twice, _ = made.step(once, delta, memory, 1.0)
    assert twice["w"].tolist() == [1.75 + 0.5 + 0.5 * 0.75, 0.5 - 1.0 - 0.5 * 1.5]


def test_without_momentum_it_is_fedavg(nesterov: None) -> None:
    weights, delta = {"w": torch.randn(5)}, {"w": torch.randn(5)}
    plain = method(FederationSection(algorithm="fedavg")).step(weights, delta, {}, 1.0)[0]
    own = method(naming({"type": "nesterov", "server_momentum": 0.0}).federation).step(weights, delta, {}, 1.0)[0]
    assert torch.equal(plain["w"], own["w"])


def test_nothing_of_a_package_is_imported_before_it_is_named(nesterov: None) -> None:
    naming("fedadam")
    assert "silotune_nesterov" not in sys.modules
    naming("nesterov")
    assert "silotune_nesterov" in sys.modules and "silotune_nesterov.step" not in sys.modules


def test_a_wrong_setting_and_an_unknown_name_are_told_as_those_of_silotune(nesterov: None) -> None:
    with pytest.raises(ConfigError, match="server_momentum"):
        naming({"type": "nesterov", "server_momentum": 2})
    with pytest.raises(ConfigError, match=r"option: this is a setting of 'scaffold' and means nothing with 'nesterov'"):
        naming({"type": "nesterov", "option": "I"})
    with pytest.raises(ConfigError, match=r"'nestorov'.*did you mean 'nesterov'"):
        naming("nestorov")


BROKEN = {
    "raise RuntimeError('no such luck')": r"cannot be imported \(RuntimeError: no such luck\)",
    "import nothing_like_this": r"cannot be imported \(ModuleNotFoundError: No module named 'nothing_like_this'\)",
    "Mine = 3": "is no subclass of AlgorithmSettings, which federation.algorithm takes",
    "from silotune.settings.algorithms import FedAvg as Mine": "calls itself type = 'fedavg': make both alike",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_package_that_cannot_be_used_is_named_and_stops_nothing_else(install: Install, source: str) -> None:
    install("my-package", {"mine": "my_package:Mine"}, source=source)
    with pytest.raises(PluginError, match=f"the plug-in 'mine' of my-package 1.0.*{BROKEN[source]}"):
        naming("mine")
    assert naming("fedavg").federation.algorithm == FedAvg()


def test_a_package_with_settings_and_nothing_behind_them_is_named(install: Install) -> None:
    source = (
        "from silotune.settings.algorithms import AlgorithmSettings\n\n"
        "class Mine(AlgorithmSettings):\n    type = 'mine'\n"
    )
    install("my-package", {"mine": "my_package:Mine"}, source=source)
    with pytest.raises(PluginError, match=r"the plug-in 'mine' \(my_package\) has settings and no implementation"):
        method(naming("mine").federation)


def test_a_name_that_is_defined_twice_is_refused(install: Install, nesterov: None) -> None:
    install("my-other", {"nesterov": "my_other:Mine", "fedavg": "my_other:Mine"})
    with pytest.raises(PluginError, match=r"'nesterov' is defined twice, by my-other 1.0 and by silotune-nesterov 0.1"):
        naming("nesterov")
    with pytest.raises(
        PluginError, match=r"'fedavg' is defined twice, by silotune and by my-other 1.0: rename it in my-other, or"
    ):
        naming("fedavg")
    with plugins.only(["silotune-nesterov"]):
        assert naming("nesterov").federation.algorithm.type == "nesterov"


def test_a_package_adds_a_task(install: Install) -> None:
    source = (
        "from silotune.data.rows import Layout, Task\n"
        "TASK = Task(name='mine', summary='rows of mine', prompt='{text}', answer='label', metric='accuracy',\n"
        "            options=('a', 'b'), layouts=(Layout({'text': 'text'}, answer='label'),), folder='mine')\n"
        "OTHER = 'no task'\n"
    )
    install("my-package", {"mine": "my_package:TASK", "other": "my_package:OTHER"}, source=source, group="tasks")
    found = task_named("mine")
    assert found is not None and found.options == ("a", "b")
    assert plugins_of(from_mapping({"data": {"task": "mine"}})) == {"my-package": "1.0"}
    with pytest.raises(PluginError, match="the plug-in 'other' of my-package 1.0 is not a Task of that name"):
        task_named("other")


def test_the_list_calls_what_does_the_work_and_tells_of_misspelt_groups(
    install: Install, nesterov: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        "from silotune.settings.algorithms import AlgorithmSettings\n\n"
        "class Mine(AlgorithmSettings):\n    type = 'mine'\n\n"
        "    @classmethod\n    def implementation(cls):\n        import nothing_like_this\n"
    )
    install("my-package", {"mine": "my_package:Mine"}, source=source)
    install("my-other", {"mine": "my_other:Mine"}, group="algorithm")
    command(as_json=True)
    rows = {row["name"]: row["fault"] for row in json.loads(capsys.readouterr().out)}
    assert rows == {
        "mine": "the implementation of the plug-in 'mine' cannot be had: No module named 'nothing_like_this'",
        "nesterov": "",
    }
    command()
    told = capsys.readouterr().err
    assert "my-other: unknown group of entry points 'silotune.algorithm': did you mean 'silotune.algorithms'?" in told


def test_a_run_folder_says_which_package_it_was_made_with(tmp_path: Path, install: Install, nesterov: None) -> None:
    config = naming("nesterov")
    used = {"silotune-nesterov": "0.1.0"}
    made = RunFolder.create(tmp_path, "run", config=config.model_dump(mode="json"), plugins=used)
    assert config_of(made) == config
    sys.path.remove(str(tmp_path))
    plugins.installed.cache_clear()
    with pytest.raises(MissingPackageError, match=r"made with plug-ins of silotune-nesterov 0.1.0: install them first"):
        config_of(made)


# --- at a site --------------------------------------------------------------------------------------------------------


def refused(document: Mapping[str, object], allowed: tuple[str, ...]) -> str:
    with pytest.raises(PolicyError) as caught, plugins.only(allowed):
        check_plugins(document, allowed)
        read_setup(document)
    return str(caught.value)


def test_a_site_uses_what_its_policy_allows_in_the_version_that_was_signed(nesterov: None) -> None:
    document = setup_of(naming("nesterov"), base="0" * 64)
    assert document["plugins"] == {"silotune-nesterov": "0.1.0"}
    with plugins.only(["silotune-nesterov"]):
        check_plugins(document, ["silotune-nesterov"])
        assert read_setup(document).config.federation.algorithm.type == "nesterov"
    newer = {**document, "plugins": {"silotune-nesterov": "0.2.0"}}
    assert "uses 'silotune-nesterov' 0.2.0, and version 0.1.0 is installed here" in refused(
        newer, ("silotune-nesterov",)
    )
    absent = {**document, "plugins": {"my-absent": "1.0"}}
    assert "uses 'my-absent' 1.0, and it is not installed here" in refused(absent, ("my-absent",))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_site_imports_nothing_that_its_policy_does_not_allow(nesterov: None, hidden: bool) -> None:
    """Whether the setup says which packages it uses or names their algorithm without a word."""
    document = setup_of(naming("nesterov"), base="0" * 64)
    for name in [name for name in sys.modules if name.startswith("silotune_nesterov")]:
        del sys.modules[name]
    said = refused({**document, "plugins": {}} if hidden else document, ())
    named = "policy rule 'plugins': the run uses plug-ins of 'silotune-nesterov'"
    assert said.startswith("policy rule 'setup': " if hidden else named)
    assert "silotune_nesterov" not in sys.modules


def test_a_setup_names_no_package_that_its_run_does_not_use(nesterov: None) -> None:
    document = {**setup_of(naming("fedavg"), base="0" * 64), "plugins": {"silotune-nesterov": "0.1.0"}}
    assert refused(document, ("silotune-nesterov",)).startswith("policy rule 'plugins': the run's setup")


def test_every_group_has_a_table() -> None:
    from silotune.settings.adapters import ADAPTERS
    from silotune.settings.aggregation import AGGREGATIONS
    from silotune.settings.objectives import OBJECTIVES

    groups = {table.group for table in (ADAPTERS, AGGREGATIONS, ALGORITHMS, OBJECTIVES)}
    assert groups | {"tasks"} == set(plugins.GROUPS.values())
