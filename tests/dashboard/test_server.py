"""The dashboard: what it finds, what it serves to whom, and what it sends when a folder changes."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finished_grid import finished_grid
from finished_run import finished_run
from silotune.dashboard.board import Board
from silotune.dashboard.pages import Pages
from silotune.dashboard.server import HEADERS, _changes, is_loopback, listen, make_app
from silotune.errors import ConfigError, RunFolderError
from silotune.record.runs import RunFolder


def pages(folder: Path) -> Pages:
    return Pages(Board.open(folder))


class Visitor:
    """A browser that keeps cookies, without a server between."""

    def __init__(self, folder: Path, token: str, host: str) -> None:
        self._app, self._host, self._cookies = make_app(pages(folder), token=token), host, httpx.Cookies()

    def request(self, verb: str, path: str, **more: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(
                transport=transport, base_url=f"http://{self._host}", cookies=self._cookies
            ) as browser:
                answer = await browser.request(verb, path, **more)
                self._cookies = browser.cookies
                return answer

        return asyncio.run(ask())

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.request("GET", path, **more)


def client(folder: Path, *, token: str = "", host: str = "127.0.0.1:8642") -> Visitor:
    return Visitor(folder, token, host)


def begun(root: Path, name: str) -> RunFolder:
    run = RunFolder.create(root, name, config={"federation": {"rounds": 9}})
    run.append("events", {"event": "run_started", "time": 1.0, "modes": ["federated"]})
    run.part("federated").append("metrics", {"round": 1, "accuracy": 0.25})
    return run


def test_the_list_shows_every_run_and_leads_to_its_page(tmp_path: Path) -> None:
    finished_run(tmp_path, "done")
    begun(tmp_path / "more", "half")
    visitor = client(tmp_path)
    page = visitor.get("/").text
    assert '<a href="/run/done">done</a>' in page and '<a href="/run/more/half">more/half</a>' in page
    assert "80.0 %" in page and "1 of 9" in page
    assert "<h1>half" in visitor.get("/run/more/half").text
    assert visitor.get("/run/nothing").status_code == 404


@pytest.mark.parametrize("path", ["/run/../../etc/passwd", "/run/%2e%2e/secret", "/run//etc/passwd"])
def test_a_path_never_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    begun(tmp_path, "secret")
    begun(tmp_path / "runs", "own")
    assert client(tmp_path / "runs").get(path).status_code == 404


def test_a_link_to_another_folder_is_not_followed(tmp_path: Path) -> None:
    begun(tmp_path, "secret")
    begun(tmp_path / "runs", "own")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    assert sorted(Board.open(tmp_path / "runs").runs) == ["own"]


def test_a_run_with_the_name_of_a_script_is_escaped(tmp_path: Path) -> None:
    run = begun(tmp_path, "run")
    run.path.rename(tmp_path / "<script>alert(1)")
    visitor = client(tmp_path)
    page = visitor.get("/").text
    assert "&lt;script&gt;alert(1)" in page and page.count("<script") == 1, "our own script alone"
    (address,) = re.findall(r'href="(/run/[^"]*)"', page)
    assert "&lt;script&gt;alert(1)" in visitor.get(address).text


@pytest.mark.parametrize("name", ["a?b#c", "100%41", "ö ü", "a&b=c", "back\\slash"])
def test_a_run_of_any_name_has_a_page(tmp_path: Path, name: str) -> None:
    begun(tmp_path, "run").path.rename(tmp_path / name)
    visitor = client(tmp_path)
    (address,) = re.findall(r'href="(/run/[^"]*)"', visitor.get("/").text)
    answer = visitor.get(address)
    assert answer.status_code == 200 and "/live?page=/run/" in answer.text
    (live,) = re.findall(r'data-live="([^"]*)"', answer.text)
    assert httpx.URL(live).params["page"] == f"/run/{name}" or "back" in name


def test_a_part_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    secret = begun(tmp_path, "secret")
    run = RunFolder.create(tmp_path / "runs", "own", config={})
    (run.path / "federated").symlink_to(secret.path / "federated")
    assert "25.0 %" not in client(tmp_path / "runs").get("/run/own").text


def test_every_answer_has_strict_headers_and_only_reading_is_allowed(tmp_path: Path) -> None:
    begun(tmp_path, "run")
    visitor = client(tmp_path)
    for path in ("/", "/nothing", "/page.css", "/page.js", "/icon.svg"):
        answer = visitor.get(path)
        assert all(answer.headers[name] == value for name, value in HEADERS.items())
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    for verb in ("POST", "PUT", "DELETE", "PATCH"):
        assert visitor.request(verb, "/").status_code == 405
    page = visitor.get("/").text
    assert not re.search(r"(?:src|href)=\"(?![/#])", page) and " style=" not in page and " onclick" not in page


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:8642", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_a_name_of_another_machine_is_refused_where_no_token_is_asked_for(tmp_path: Path, host: str, code: int) -> None:
    begun(tmp_path, "run")
    assert client(tmp_path).get("/", headers={"host": host}).status_code == code


TOKEN = "abcdefghijklmnop0123"


def test_beyond_this_machine_nothing_is_shown_without_the_token(tmp_path: Path) -> None:
    begun(tmp_path, "run")
    visitor = client(tmp_path, token=TOKEN, host="server.example:8642")
    for path in ("/", "/run/run", "/live?page=/", "/page.css", "/?token=wrong", f"/?token={TOKEN}x"):
        assert visitor.get(path).status_code == 401, path
    assert visitor.get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    answer = visitor.get(f"/run/run?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/run/run")
    cookie = answer.headers["set-cookie"].lower()
    away = visitor.get(f"http://server.example:8642//evil.example/?token={TOKEN}")
    assert away.headers["location"] == "/evil.example/"
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert visitor.get("/run/run").status_code == 200, "by the cookie"


def test_a_token_beside_ascii_is_refused_and_breaks_nothing(tmp_path: Path) -> None:
    begun(tmp_path, "run")
    assert client(tmp_path, token=TOKEN).get("/?token=%C3%A9%F0").status_code == 401


async def _sent(shown: Pages, path: str, change: Callable[[], None]) -> list[dict[str, str]]:
    """What comes at first, and after a change."""
    stream = _changes(shown, path, 0.01)
    told = []
    async for text in stream:
        if text.startswith("event: sections"):
            told.append(json.loads(text.split("data: ", 1)[1]))
            if len(told) == 2:
                break
            change()
    await stream.aclose()
    return told


def test_only_the_sections_that_changed_are_sent(tmp_path: Path) -> None:
    run = begun(tmp_path, "run")
    first, second = asyncio.run(
        _sent(
            pages(tmp_path), "/run/run", lambda: run.part("federated").append("metrics", {"round": 2, "accuracy": 0.75})
        )
    )
    assert "25.0 %" in first["head"] and "about" in first
    assert "75.0 %" in second["head"] and "curves" in second and "about" not in second


def test_a_new_run_comes_into_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silotune.dashboard.board.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("silotune.dashboard.board.LOOK_REST", 0)
    begun(tmp_path, "run")
    first, second = asyncio.run(_sent(pages(tmp_path), "/", lambda: begun(tmp_path, "later") and None))
    assert "/run/later" not in first["runs"] and "/run/later" in second["runs"]


def test_a_folder_that_goes_away_ends_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silotune.dashboard.board.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("silotune.dashboard.board.LOOK_REST", 0)
    begun(tmp_path, "run")
    begun(tmp_path, "other")
    shown = pages(tmp_path)

    async def last() -> str:
        text = ""
        async for text in _changes(shown, "/run/run", 0.01):
            if text.startswith("event: sections"):
                (tmp_path / "run" / "config.json").unlink()
        return text

    assert asyncio.run(last()).startswith("event: gone")


def test_too_many_open_pages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silotune.dashboard.server.MOST_LISTENERS", 0)
    begun(tmp_path, "run")
    assert client(tmp_path).get("/live?page=/").status_code == 503
    assert client(tmp_path).get("/live?page=/nothing").status_code in (404, 503)


def test_a_grid_shows_its_cells_and_what_they_claim_so_far(tmp_path: Path) -> None:
    finished_grid(tmp_path / "grid", failed=("medical, nano, ia3, fedavg, alpha 0.1, seed 2",))
    shown = pages(tmp_path)
    page = shown.at("/grid/grid", waits=True)
    assert page is not None
    assert "23 of 24" in page.sections["head"]
    assert "learning together beats learning alone by 20.0 points" in page.sections["claims"]
    assert "the loss is not finite" in page.sections["failures"]
    assert page.sections["cells"].count("state done") == 23 and page.sections["cells"].count("state failed") == 1
    single = Pages(Board.open(tmp_path / "grid")).at("/", waits=True)
    assert single is not None and single.sections["head"].count("23 of 24") == 1


def test_a_damaged_grid_is_told_in_one_line(tmp_path: Path) -> None:
    finished_grid(tmp_path / "grid", seeds=(0,))
    cell = {name: [name] for name in ("task", "model", "adapter", "algorithm", "partition", "seed", "modes", "digest")}
    odd = json.dumps({"cells": [{**cell, "folder": "cells/x"}]})
    for content in ("{", "[]", '{"cells": [{"task": 1}]}', '{"cells": 3}', odd):
        (tmp_path / "grid" / "grid.json").write_text(content)
        page = pages(tmp_path).at("/grid/grid", waits=True)
        assert page is not None and 'class="faults"' in page.sections["head"], content


def test_a_folder_without_runs_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run and no grid"):
        Board.open(tmp_path)
    with pytest.raises(RunFolderError, match="is not a folder"):
        Board.open(tmp_path / "nothing")


def test_a_port_in_use_is_refused_in_one_line() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="is in use: give another one with --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="give a name or address of this machine"):
        listen("no.such.host.invalid", 0)


def test_addresses_that_only_this_machine_reaches() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8")] == 4 * [True]
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil", "")] == 5 * [False]


@pytest.fixture
def silent_folder(tmp_path: Path) -> Iterator[Path]:
    finished_run(tmp_path, "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    yield tmp_path
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, "something was written"


def test_nothing_is_written_to_the_folders(silent_folder: Path) -> None:
    visitor = client(silent_folder)
    assert [visitor.get(path).status_code for path in ("/", "/run/run", "/page.js")] == [200, 200, 200]


def test_pages_are_made_one_at_a_time_from_many_threads(tmp_path: Path) -> None:
    for number in range(5):
        begun(tmp_path, f"run-{number}")
    shown = pages(tmp_path)
    seen: list[object] = []
    threads = [threading.Thread(target=lambda: seen.append(shown.at("/"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and len({id(page) for page in seen}) == 1


def test_a_socket_is_open_before_the_address_is_told() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=5):
        pass
