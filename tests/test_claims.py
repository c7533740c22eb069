"""Every claim of docs/security.md and docs/faults.md names the tests that prove it, and these tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from attacks.moves import MOVES
from markdown import tables

ROOT = Path(__file__).resolve().parent
PAGES = ("security.md", "faults.md")


def rows() -> list[tuple[str, list[str]]]:
    return [(page, row) for page in PAGES for _, listed in tables(ROOT.parent / "docs" / page) for row in listed]


def names_in(path: Path) -> set[str]:
    """Test functions of a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def unproved(cell: str) -> list[str]:
    """What a row's last cell refers to and there is not; the whole cell where it refers to nothing."""
    named = re.findall(r"`([^`]+)`", cell)
    if not named:
        return [cell]
    faults = []
    for reference in named:
        place, _, wanted = (part.strip() for part in reference.partition(":"))
        if place == "moves":
            faults += [name for name in wanted.split(", ") if name not in MOVES]
        elif not (ROOT / place).is_file() or not any(wanted in name for name in names_in(ROOT / place)) or not wanted:
            faults.append(reference)
    return faults


def test_every_row_names_a_test_that_there_is() -> None:
    found = rows()
    assert {page for page, _ in found} == set(PAGES) and len(found) > 80
    assert [(page, row[0], fault) for page, row in found for fault in unproved(row[-1])] == []


def test_every_table_has_the_column() -> None:
    for page in PAGES:
        heads = [head for head, _ in tables(ROOT.parent / "docs" / page)]
        assert heads and all(head[-1] == "test" for head in heads), page


def test_every_move_proves_a_claim() -> None:
    cells = " ".join(row[-1] for page, row in rows() if page == "security.md")
    cited = {name for listed in re.findall(r"`moves: ([^`]+)`", cells) for name in listed.split(", ")}
    assert set(MOVES) - cited == set()


@pytest.mark.parametrize(
    "cell", ["", "nobody looked", "`moves: magic`", "`deploy/test_link.py: no_such_test`", "`deploy/test_none.py: x`"]
)
def test_a_claim_without_a_test_shows(cell: str) -> None:
    assert unproved(cell)
