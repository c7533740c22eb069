"""Hook of mkdocs.yml: a link to a file outside docs/, which the site does not have, becomes the file's name as code.

On a page of the repository such a link works; the site has no address of the repository to lead to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)[^)]*\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The text of a page as the site shows it; mkdocs calls this for every page."""
    return named_outside(markdown, Path(page.file.abs_src_path).parent, Path(config.docs_dir))


def named_outside(markdown: str, folder: Path, docs: Path) -> str:
    """The text of a page in ``folder``, with the names of files in place of links that leave ``docs``."""

    def shown(found: re.Match[str]) -> str:
        words, target = found[1], (folder / found[2]).resolve()
        if target.is_relative_to(docs.resolve()):
            return found[0]
        name = f"`{target.relative_to(docs.resolve().parent)}`"
        return name if words.strip("`") == name.strip("`") else f"{words} ({name})"

    return LINK.sub(shown, markdown)
