"""Renders the templates of reports and pages: every text is escaped, and none may act on a terminal or turn letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from silotune.record.printable import printable

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


@cache
def environment(folders: tuple[Path, ...] = (TEMPLATES,)) -> Environment:
    """The templates in these folders; values in those of HTML are escaped, unless they are markup already."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader([str(folder) for folder in folders]),
        autoescape=lambda name: bool(name) and str(name).endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    made.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return made


def rendered(name: str, view: Mapping[str, Any], *, folders: Sequence[Path] = (TEMPLATES,)) -> str:
    """A template filled with the values of a view."""
    return environment(tuple(folders)).get_template(name).render(**view)


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
