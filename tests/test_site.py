"""The documentation builds as a site without a warning, shows every page, and fetches nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from markdown import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder))
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def name_on_site(page: Path) -> Path:
    place = page.relative_to(DOCS)
    return place.with_name("index.html") if place.name == "README.md" else place.with_suffix(".html")


@pytest.mark.end_to_end
def test_every_page_is_there_with_its_code_as_code(site: Path) -> None:
    pages = sorted(DOCS.rglob("*.md"))
    assert len(pages) > 30
    for page in pages:
        text = (site / name_on_site(page)).read_text(encoding="utf-8")
        assert "```" not in text, f"{page.name}: a code block that the site shows as text; indent it by four in a list"


@pytest.mark.end_to_end
def test_tables_are_tables(site: Path) -> None:
    for page in sorted(DOCS.rglob("*.md")):
        text = (site / name_on_site(page)).read_text(encoding="utf-8")
        assert "|---|" not in text, f"{page.name}: a table that the site shows as text; leave a line free before it"


@pytest.mark.end_to_end
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"<(?:(?:script|img|iframe)[^>]*\ssrc|link[^>]*\shref)=\"(?:https?:)?//[^\"]+")
    pages = sorted(site.rglob("*.html"))
    assert pages and [found for page in pages for found in fetched.findall(page.read_text(encoding="utf-8"))] == []


@pytest.mark.end_to_end
def test_the_search_is_local(site: Path) -> None:
    assert "tutorials/hospital.html" in (site / "search" / "search_index.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("[the example](../examples/own_data.py)", "the example (`examples/own_data.py`)"),
        ("[benchmarks/README.md](../benchmarks/README.md#results)", "`benchmarks/README.md`"),
        ("[policy](policy.md#rules), [site](https://a.b/../c)", "[policy](policy.md#rules), [site](https://a.b/../c)"),
    ],
)
def test_a_link_that_leaves_the_docs_becomes_a_name(text: str, shown: str) -> None:
    spec = importlib.util.spec_from_file_location("site_links", ROOT / "scripts" / "site_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.named_outside(text, DOCS, DOCS) == shown
