"""What README and docs have people type exists, files that they write are valid, and the README's Python runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import silotune
from markdown import PAGES, ROOT, blocks, command_lines, inline_commands, links, written_files
from silotune.benchmark.expand import Changes, expand
from silotune.benchmark.schema import Grid
from silotune.cli.main import build_app
from silotune.config import load_config, validated
from silotune.deploy.charter import Charter
from silotune.deploy.kits import FederationPlan
from silotune.shipped import find

README = ROOT / "README.md"
TINY = (
    "data.num_train=40", "data.num_validation=6", "data.num_test=12", "data.partition.clients=2",
    "training.max_steps=1", "federation.rounds=1", "evaluation.bootstrap_samples=0",
)  # fmt: skip
PLACEHOLDERS = {"CONFIG", "RUN.json", "NAME", "DIR"}
SHELL = {"python", "pip", "source", "git", "cd", "cat", "for", "done", "sed", "grep"}  # what may stand beside silotune


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def parsed(words: list[str]) -> click.Context:
    """The innermost context of a command that starts with ``silotune``; unknown commands and options raise."""
    command = typer.main.get_command(build_app())
    context = click.Context(command, info_name=words[0])
    rest = words[1:]
    while isinstance(command, click.Group):
        if not rest:
            return context  # a group alone shows its help
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None and name is not None, words
        command = found
        if not isinstance(command, click.Group):
            return command.make_context(name, rest, parent=context)
        context = click.Context(command, info_name=name, parent=context)
    raise AssertionError("no command of silotune")


def check_config(context: click.Context, made: set[str], folder: Path) -> None:
    """The configuration that a command names exists and takes its changes.

    ``made`` are the files that earlier commands made; ``folder`` holds those that the page has its reader write.
    """
    name = context.params.get("config")
    if not name or name in made or name in PLACEHOLDERS:
        return
    place = folder / name if (folder / name).is_file() else ROOT / name
    load_config(place if place.is_file() else find(name), context.params.get("settings") or ())


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_first_commands_are_quickstart_and_test() -> None:
    assert command_lines(README)[:2] == [["make", "quickstart"], ["make", "test"]]
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist_with_their_options_and_configurations(page: Path, tmp_path: Path) -> None:
    made: set[str] = set()
    for name, text in written_files(page).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for words in command_lines(page):
        if words[0] == "silotune":
            context = parsed(words)
            check_config(context, made, tmp_path)
            made |= {str(context.params["out"])} if context.params.get("out") else set()
        elif words[0] == "make":
            assert set(words[1:]) <= targets(), words
        elif words[0].endswith("python") and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file() or (tmp_path / words[1]).is_file(), words
        else:
            assert Path(words[0]).name in SHELL, words


VALID = {  # a key that tells what a file is -> what must take it
    "sites": lambda document: validated(FederationPlan, document, source="page"),
    "parties": lambda document: validated(Charter, document, source="page"),
    "seeds": lambda document: expand(validated(Grid, document, source="page"), Changes()),
}


@pytest.mark.parametrize("page", [page for page in PAGES if written_files(page)], ids=name_of)
def test_files_that_a_page_has_written_are_valid(page: Path) -> None:
    for name, text in written_files(page).items():
        if name.endswith(".py"):
            compile(text, name, "exec")
        if name.endswith(".toml"):
            document = tomllib.loads(text)
            for key in VALID.keys() & document.keys():
                VALID[key](document)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name_of)
def test_the_python_of_a_page_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, name_of(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_running_text_exist(page: Path) -> None:
    for words in inline_commands(page):
        if "..." not in words and words[1] != "COMMAND":
            with contextlib.suppress(click.MissingParameter):  # the text may leave a command's arguments out
                parsed(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    for target in links(page):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_the_layout_names_what_there_is() -> None:
    tree = next(block for block in blocks(ROOT / "docs" / "layout.md", "text") if block.startswith("src/silotune/"))
    folder, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else (name if name == "src/silotune/" else "")
        assert (ROOT / folder / name if line.startswith("  ") else ROOT / name).exists(), line
        named.add(name.rstrip("/") if line.startswith("  ") else "")
    inside = {path.name for path in (ROOT / "src" / "silotune").iterdir()}
    assert inside - named - {"__init__.py", "__main__.py", "__pycache__", "py.typed"} == set()


def test_the_exit_codes_are_those_of_the_errors() -> None:
    from silotune import errors

    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"\| (\d+) \|", page)} == codes | {0, 130}


@pytest.mark.end_to_end
def test_the_python_of_the_page_about_python_runs(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One block after the other, with sizes for a test."""
    real, sizes = silotune.run, [text for text in TINY if "partition" not in text]
    small = (*sizes, f"model.name={str(tiny_folder)!r}", "model.max_length=128")
    monkeypatch.setattr(silotune, "run", lambda config, changes=(), **more: real(config, [*changes, *small], **more))
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        exec(compile(block, "docs/python.md", "exec"), known)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    said = capsys.readouterr().out
    assert "federated 1 of" in said and "unknown key 'ronds': did you mean 'rounds'?" in said


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[str, Path]:
    """What the README's Python prints, with sizes for a test, and the run folder that it makes."""
    root, real = tmp_path_factory.mktemp("runs"), silotune.run
    small = (*TINY, f"model.name={str(tiny_folder)!r}", f"record.folder={str(root)!r}")
    (block,) = blocks(README, "python")
    assert len(block.splitlines()) <= 11
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(silotune, "run", lambda config, changes=(): real(config, [*changes, *small]))
        patch.chdir(tmp_path_factory.mktemp("here"))
        exec(compile(block, "README.md", "exec"), {})
    (folder,) = root.iterdir()
    return out.getvalue(), folder


@pytest.mark.end_to_end
def test_the_python_of_the_readme_runs(ran: tuple[str, Path]) -> None:
    assert all(word in ran[0] for word in ("together: ", "alone: ", "on validation: ", " instead of "))


@pytest.mark.end_to_end
def test_every_file_and_field_of_a_run_folder_is_documented(ran: tuple[str, Path]) -> None:
    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    files = {path.name for path in ran[1].rglob("*") if path.is_file()}
    assert {name for name in files if name not in page} == set()
    documents: list[dict[str, Any]] = []
    for path in ran[1].rglob("*.json*"):
        if path.name not in ("config.json", "adapter_config.json"):
            documents += (
                [json.loads(line) for line in path.read_text("utf-8").splitlines()]
                if path.suffix == ".jsonl"
                else [json.loads(path.read_text("utf-8"))]
            )
    for document in documents[:]:
        documents += [
            document[name] for name in ("server", "metrics", "federated") if isinstance(document.get(name), dict)
        ]
    unknown = {key for document in documents for key in document if f"`{key}`" not in page}
    assert unknown == set()
