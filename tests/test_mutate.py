from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "mutate.py"
    spec = importlib.util.spec_from_file_location("mutate", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("a < b", ["a < b -> a <= b"]),
        ("a < b == c", ["a < b == c -> a <= b == c", "a < b == c -> a < b != c"]),
        ("a in b", ["a in b -> a not in b"]),
        ("a + b", ["a + b -> a - b"]),
        ("a += b", ["a += b -> a -= b"]),
        ("a and b", ["a and b -> a or b"]),
        ("not a", ["not a -> a"]),
        ("-a", ["-a -> a"]),
        ("a[0]", ["0 -> 1"]),
        ("a = True", ["True -> False"]),
        ("min(a)", ["min -> max"]),
        ("np.floor(a)", ["np.floor -> np.ceil"]),
        ("sorted(a)", ["sorted(a) -> sorted(a, reverse=True)"]),
        ("sorted(a, reverse=b)", ["sorted(a, reverse=b) -> sorted(a)"]),
        ("a if b else c", ["b -> not b"]),
        ("while a.b:\n    pass", ["a.b -> not a.b"]),
        ("def f(a: int | None = None) -> int | None:\n    raise E(1 + 2)", []),
        ("f'{a + b}'", []),
        ("zip(a, b, strict=True)", []),
        ("@dataclass(frozen=True)\nclass A:\n    b: str", []),
        ("if TYPE_CHECKING:\n    a = 1", []),
    ],
)
def test_every_change_by_hand(mutate: ModuleType, source: str, changes: list[str]) -> None:
    assert [mutant.change for mutant in mutate.mutants(source)] == changes


def test_a_mutant_is_the_whole_module_with_one_change(mutate: ModuleType) -> None:
    source = "def f(a):\n    # Why.\n    if a > 1:\n        return a * 2\n    return a"
    found = mutate.mutants(source)
    assert [(mutant.line, mutant.change) for mutant in found] == [
        (3, "a > 1 -> a >= 1"),
        (3, "1 -> 2"),
        (4, "a * 2 -> a / 2"),
        (4, "2 -> 3"),
    ]
    assert found[2].source == "def f(a):\n    if a > 1:\n        return a / 2\n    return a"


def test_a_seed_draws_one_change_on_each_of_so_many_lines(mutate: ModuleType) -> None:
    drawn = mutate.drawn(["methods/aggregate.py", "methods/ranks.py"], 12, 3)
    assert len({(name, mutant.line) for name, mutant in drawn}) == 12
    assert drawn == mutate.drawn(["methods/ranks.py", "methods/aggregate.py"], 12, 3)
    assert drawn != mutate.drawn(["methods/aggregate.py", "methods/ranks.py"], 12, 4)


def test_every_pattern_of_the_table_finds_files(mutate: ModuleType) -> None:
    found = mutate.modules()
    assert {"data/partition.py", "privacy/secure_sum/sharing.py"} <= set(found)
    assert all(files for files in found.values())


def test_lines_are_named_by_module(mutate: ModuleType) -> None:
    lines = (mutate.ROOT / mutate.PACKAGE / "methods/ranks.py").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "if found[name] < 1" in text)
    assert [(name, mutant.line, mutant.change) for name, mutant in mutate.at(f"methods/ranks.py:{line}")] == [
        ("methods/ranks.py", line, "found[name] < 1 -> found[name] <= 1"),
        ("methods/ranks.py", line, "1 -> 2"),
    ]
    assert len(mutate.at(f"methods/ranks.py:{line}-{line + 9}")) > 2
    with pytest.raises(SystemExit, match="give a module of the package and lines"):
        mutate.at("methods/ranks.py")


def test_what_pytest_says_of_a_change(mutate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "silotune"
    package.mkdir(parents=True)
    (package / "one.py").write_text("def f(a):\n    return a < 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('one', 'src/silotune/one.py')\n"
        "one = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(one)\n"
        "def test_zero():\n    assert one.f(0) and not one.f(2)\n"
    )
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = end_to_end: slow\n")
    whole = (package / "one.py").read_text()
    edge, number = mutate.mutants(whole)

    def said(mutant: Any) -> str:
        result: str = mutate.outcome(tmp_path, "one.py", mutant, ["tests/test_one.py"], 60)
        return result

    assert said(edge) == "survived"
    wrong = mutate.Mutant(2, "a < 1 -> a > 1", whole.replace("<", ">"))
    assert said(wrong) == "killed by test_one.py::test_zero"
    assert (package / "one.py").read_text() == whole
    monkeypatch.setattr(mutate, "EQUIVALENT", {("one.py", "return a < 1", number.change): "of no use"})
    assert said(number) == "equivalent: of no use"
    (tmp_path / "tests" / "test_one.py").write_text("")
    with pytest.raises(SystemExit, match="no test ran"):
        said(edge)
