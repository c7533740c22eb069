"""The generated pages are up to date, and what the written ones quote is in the code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tiny
from markdown import ROOT, blocks
from silotune.benchmark.expand import Changes, expand
from silotune.benchmark.schema import Grid
from silotune.config import validated
from silotune.data import tasks
from silotune.deploy.charter import Charter
from silotune.deploy.kits import FederationPlan
from silotune.federation.site.policy import Policy
from silotune.record.runs import RunFolder
from silotune.record.signatures import new_key


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    for path, text in script().documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run 'make docs'"


def test_every_setting_is_described() -> None:
    undescribed = re.findall(r"^\| `(\w+)` \|.*\|  \|$", script().configuration(), flags=re.MULTILINE)
    assert undescribed == []


def test_every_command_is_there() -> None:
    pages = script().commands()
    for command in ("quickstart", "run", "resume", "evaluate", "generate", "chat", "export", "report", "doctor",
                    "benchmark"):  # fmt: skip
        assert f"## silotune {command}\n" in pages
    assert "## silotune configs copy\n" in pages and "\x1b" not in pages


def test_every_rule_of_a_policy_is_described() -> None:
    page = ROOT / "docs" / "policy.md"
    text = page.read_text(encoding="utf-8")
    assert [name for name in Policy.model_fields if f"`{name}`" not in text and name != "format"] == []
    example = tomllib.loads(re.sub("AAAA[^ ]+", new_key().public.split()[1], blocks(page, "toml")[0]))
    assert validated(Policy, example, source="example").smallest_count == 5


def test_the_plan_and_the_charter_in_the_docs_are_valid() -> None:
    plan, charter = (tomllib.loads(text) for text in blocks(ROOT / "docs" / "provision.md", "toml"))
    assert tuple(validated(FederationPlan, plan, source="example").sites) == tuple(charter["parties"])
    assert validated(Charter, charter, source="example").federation == plan["name"]


def test_every_key_of_a_grid_is_described() -> None:
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    assert [name for name in Grid.model_fields if f"`{name}`" not in page] == []
    example = tomllib.loads(blocks(ROOT / "docs" / "benchmark.md", "toml")[0])
    assert len(expand(validated(Grid, example, source="example"), Changes())) == 3 * 3


def test_quoted_errors_stand_in_the_code() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    joined = re.sub(r"\"\s*\n\s*f?\"", "", sources)  # one text over several lines of code
    table = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").partition("## Common errors")[2]
    quoted = [
        code for row in re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE) for code in re.findall("`(.+?)`", row)
    ]
    pieces = [piece.strip(" .:") for code in quoted for piece in re.split(r"\.\.\.|\bN\b|'\w+'|\?", code)]
    assert len(pieces) > 20
    missing = [piece for piece in pieces if len(piece) > 3 and piece not in joined]
    assert missing == []


CODE = blocks(ROOT / "CONTRIBUTING.md", "python")


def test_recipes_are_short() -> None:
    assert len(CODE) == 6
    assert max(len(code.splitlines()) for code in CODE) < 30


def test_the_recipe_for_an_attack_is_the_tier_s_own() -> None:
    attack, lie = CODE[0].splitlines()
    assert attack in (ROOT / "tests" / "attacks" / "moves.py").read_text(encoding="utf-8")
    assert lie in (ROOT / "tests" / "attacks" / "test_hostile_site.py").read_text(encoding="utf-8")


def test_the_recipe_for_a_task_works() -> None:
    (task,) = eval("[" + CODE[1] + "]", vars(tasks).copy())
    example = tasks.to_example(task, {"text": "We drew lots.", "label": 2, "journal": "A"}, where="x", number=1)
    assert example.answer == "methods" and example.fields["journal"] == "A"


PIECE = re.compile(r"^# (\S+\.py)(?:, in (\w+))?$", flags=re.MULTILINE)


def apply_recipe(code: str, package: Path) -> None:
    """Puts each piece of a recipe into its file: last in the table that it names, or before that table."""
    _, *parts = PIECE.split(code)
    pieces = list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))
    assert len({file for file, _, _ in pieces}) <= 2, "a recipe touches two files at most"
    for file, table, piece in pieces:
        place = package / file
        text = place.read_text(encoding="utf-8")
        named = table or next(table for each, table, _ in pieces if each == file and table is not None)
        (found,) = re.finditer(
            rf"^{named}\b.*? = [^\n]*?[({{](?P<inner>.*?)(?P<end>[)}}])$", text, re.MULTILINE | re.DOTALL
        )
        if table is None:
            text = text[: found.start()] + piece.strip() + "\n\n\n" + text[found.start() :]
        else:
            inner = found["inner"].rstrip().rstrip(",") + ",\n" + piece.strip() + "\n"
            text = text[: found.start("inner")] + inner + text[found.start("end") :]
        place.write_text(text, encoding="utf-8")


RUN = """
import json, sys
from silotune.config import from_mapping, overlaid
from silotune.experiment.run import run_experiment
document, *changes = map(json.loads, sys.argv[1:])
for change in changes:
    run_experiment(from_mapping(overlaid(document, change)))
"""
DOCUMENT = {
    "model": {"max_length": 128},
    "adapter": {"rank": 2},
    "data": {"num_train": 24, "num_validation": 6, "num_test": 6, "partition": {"clients": 2}},
    "training": {"batch_size": 4, "max_steps": 1, "objective": "choice"},
    "federation": {"rounds": 2},
    "evaluation": {"bootstrap_samples": 0},
}


def runs_with(recipe: str, folder: Path, model: Path, *changes: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Adapters of runs with these changes, in a copy of the package that holds a recipe."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    apply_recipe(recipe, folder / "src" / "silotune")
    document = {**DOCUMENT, "record": {"folder": str(folder), "name": "run"}}
    document["model"] = {**DOCUMENT["model"], "name": str(model)}
    paths = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    words = map(json.dumps, (document, *changes))
    subprocess.run([sys.executable, "-c", RUN, *words], check=True, env=paths, timeout=400)
    names = ["run", *(f"run-{number}" for number in range(2, len(changes) + 1))]
    return [RunFolder.open(folder / name).part("federated").load_adapter()[0] for name in names]


@pytest.mark.end_to_end
def test_the_recipe_for_an_adapter_adds_one(tiny_folder: Path, tmp_path: Path) -> None:
    (loha,) = runs_with(
        CODE[2], tmp_path, tiny_folder, {"adapter": {"type": "loha", "rank": 2, "targets": "all-linear"}}
    )
    assert loha and all("hada_" in name for name in loha)


@pytest.mark.end_to_end
def test_the_recipe_for_an_algorithm_adds_one(tiny_folder: Path, tmp_path: Path) -> None:
    algorithms = ({"type": "diloco", "server_momentum": 0.5}, {"type": "diloco", "server_momentum": 0.0}, "fedavg")
    changes = [{"federation": {"algorithm": algorithm}} for algorithm in algorithms]
    with_momentum, without, fedavg = runs_with(CODE[3], tmp_path, tiny_folder, *changes)
    tiny.assert_same_bits(without, fedavg)
    assert any(not torch.equal(with_momentum[name], tensor) for name, tensor in fedavg.items())


@pytest.mark.end_to_end
def test_the_recipe_for_a_rule_for_factors_adds_one(tiny_folder: Path, tmp_path: Path) -> None:
    ways = (("warm-b", 1), ("freeze-a", 1), ("warm-b", 2))
    changes = [{"federation": {"lora": rule, "rounds": rounds}} for rule, rounds in ways]
    first, frozen, second = runs_with(CODE[4], tmp_path, tiny_folder, *changes)
    tiny.assert_same_bits(first, frozen)
    assert any("lora_A" in name and not torch.equal(second[name], tensor) for name, tensor in frozen.items())


@pytest.mark.end_to_end
def test_the_recipe_for_an_objective_adds_one(tiny_folder: Path, tmp_path: Path) -> None:
    focal, choice = runs_with(
        CODE[5], tmp_path, tiny_folder, {"training": {"objective": {"type": "focal", "gamma": 1.0}}}, {}
    )
    assert any(not torch.equal(focal[name], tensor) for name, tensor in choice.items())
