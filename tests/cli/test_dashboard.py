"""``silotune dashboard`` and the page of ``silotune report``, at the edge."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kits
from finished_run import finished_run


def test_save_writes_one_file(silotune: Callable[..., Any], tmp_path: Path) -> None:
    finished_run(tmp_path / "runs", "demo")
    finished_run(tmp_path / "runs", "other")
    said = silotune("dashboard", tmp_path / "runs", "--save", tmp_path / "all.html")
    assert (said.code, said.out) == (0, f"written: {tmp_path / 'all.html'}\n")
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "demo" in page and "other" in page and "<script" not in page
    silotune("dashboard", tmp_path / "runs" / "demo", "--save", tmp_path / "one.html")
    assert "each alone: mean" in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_a_saved_list_leads_nowhere(silotune: Callable[..., Any], tmp_path: Path) -> None:
    """A file has no server behind it: a link in it would be a dead one."""
    finished_run(tmp_path / "runs", "demo")
    finished_run(tmp_path / "runs", "other")
    silotune("dashboard", tmp_path / "runs", "--save", tmp_path / "all.html")
    assert "href=" not in (tmp_path / "all.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["FOLDER"], "holds no run and no grid"),
        (["FOLDER/nothing"], "is not a folder"),
        (["RUN", "--save", "FOLDER"], "is a folder: name a file"),
        (["RUN", "--token-file", "FOLDER/nothing"], "holds no token"),
        (["--kit", "FOLDER"], "unpack a kit there"),
        (["RUN", "--host", "no.such.host.invalid"], "give a name or address of this machine"),
    ],
)
def test_bad_input_is_one_line(silotune: Callable[..., Any], tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "empty").mkdir()
    run = finished_run(tmp_path / "runs", "demo").path
    given = [each.replace("FOLDER", str(tmp_path / "empty")).replace("RUN", str(run)) for each in arguments]
    said = silotune("dashboard", *given)
    assert said.code != 0 and told in said.err and said.err.count("\n") == 1 and said.err.startswith("error: ")


def test_without_its_packages_it_says_how_to_get_them(
    silotune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path, "demo").path
    monkeypatch.setitem(sys.modules, "starlette", None)
    said = silotune("dashboard", run)
    assert "pip install 'silotune[dashboard]'" in said.err and said.err.count("\n") == 1 and said.out == ""
    assert silotune("dashboard", run, "--save", tmp_path / "page.html").code == 0, "a file needs no server"


def test_a_kit_shows_its_sites_and_certificates(silotune: Callable[..., Any], tmp_path: Path) -> None:
    place = kits.make(tmp_path / "kits", ["hospital-a", "hospital-b"])
    for kit, told in (("coordinator", "the coordinator is stopped"), ("hospital-a", "hospital-b")):
        assert silotune("dashboard", "--kit", place / kit, "--save", tmp_path / "page.html").code == 0
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert told in page and "ca.crt" in page and "3649" in page
    assert "a site&#39;s" not in page and "submitter" in silotune("dashboard", "--kit", place / "researcher").err


def test_a_report_of_one_run_writes_its_page(silotune: Callable[..., Any], tmp_path: Path) -> None:
    run = finished_run(tmp_path, "demo").path
    assert f"written: {run / 'report.html'}" in silotune("report", run).out
    assert (run / "report.html").is_file()
    silotune("report", run, "--out", tmp_path / "elsewhere", "--json")
    assert (tmp_path / "elsewhere" / "report.html").is_file()
    (run / "report.html").unlink()
    assert silotune("report", run, "--json").code == 0 and not (run / "report.html").exists()
    assert "--out goes with one folder" in silotune("report", run, run, "--out", tmp_path).err
