"""Reads Markdown files for the tests of the documentation: code blocks, commands, links and tables."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXT_FOR_A_FILE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END$", flags=re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The contents of the fenced code blocks of a language, those within lists too."""
    found = FENCED.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(text) for _, tongue, text in found if tongue == language]


def running_text(page: Path) -> str:
    """A page without its fenced code blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def command_lines(page: Path) -> list[list[str]]:
    """The commands of all shell blocks as words, comments and here-documents left out; a backslash joins lines."""
    shell = [re.sub(r"<<'END'$.*?^END$", "", block, flags=re.MULTILINE | re.DOTALL) for block in blocks(page, "bash")]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def written_files(page: Path) -> dict[str, str]:
    """The files that a page has its reader write with ``cat``: name -> text."""
    return {name: text for block in blocks(page, "bash") for name, text in TEXT_FOR_A_FILE.findall(block)}


def inline_commands(page: Path) -> list[list[str]]:
    """The commands that stand as code in the running text, such as ``silotune tasks``."""
    return [shlex.split(code) for code in re.findall(r"`(silotune [a-z][^`]*)`", running_text(page))]


def links(page: Path) -> list[str]:
    """Targets of the links and pictures that lead to files of the repository."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", running_text(page))
    return [target for target in targets if "://" not in target]


def tables(page: Path) -> list[tuple[list[str], list[list[str]]]]:
    """The tables: cells of the head, and of every row below it."""
    found = re.findall(r"^(\|.+)\n\|[-| ]+\|\n((?:\|.*\n?)+)", running_text(page), flags=re.MULTILINE)
    return [(_cells(head), [_cells(row) for row in rows.splitlines()]) for head, rows in found]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]
