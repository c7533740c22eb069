"""What all commands share at the edge: the console, and one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table

from silotune.record.printable import one_line, printable

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the configuration; repeatable."),
]
ModeName = Annotated[str, typer.Option("--mode", help="federated, centralized, or isolated/CLIENT.")]


class _PrintableConsole(Console):
    """A console that lets no text act on the terminal; rich's own styles, which are no text, still work."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escapes everything that is shown: lines, cells of tables, titles, bars. What is said above and below a table
        is not folded to the table's width, and a table in a pipe has no frame."""
        if isinstance(renderable, Table):
            if not self.is_terminal:
                renderable.box, renderable.pad_edge = None, False
            above, below, renderable.title, renderable.caption = renderable.title, renderable.caption, None, None
            around = [part for part in (above, renderable, below) if part is not None]
            renderable = Group(*around) if len(around) > 1 else renderable
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def stdout() -> Console:
    """A console on the present standard output; square brackets in texts are printed as they are."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The same on the present standard error."""
    return _console(sys.stderr)


_WIDE = 1000
"""Columns of what is no terminal: a row of a table is one line, and no word is parted."""


def _console(file: TextIO) -> Console:
    width = None if file.isatty() or "COLUMNS" in os.environ else _WIDE
    return _PrintableConsole(file=file, width=width, markup=False, highlight=False)


def say(text: str, *, is_error: bool = False) -> None:
    """Prints one line, whatever the text holds: a reason that came with a reply must not look like lines of ours."""
    typer.echo(one_line(text), err=is_error)


def say_to(console: Console, text: str) -> None:
    """Prints one line, as ``say`` does, above what the console shows; a long one is not cut."""
    console.print(one_line(text), soft_wrap=True)


def write_text(text: str) -> None:
    """Prints a text of any number of lines, or a piece of one, and no end of line of its own."""
    typer.echo(printable(text), nl=False)


@contextlib.contextmanager
def reserved_stdout(is_reserved: bool) -> Iterator[None]:
    """Inside the block, everything that is printed goes to stderr, so that stdout gets the JSON object alone."""
    with contextlib.redirect_stdout(sys.stderr) if is_reserved else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Prints a value as JSON; NaN and infinities become null."""
    from silotune.record.files import plain

    write_text(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
